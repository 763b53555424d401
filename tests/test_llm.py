"""The LLM's client against the answers that real servers give, over loopback."""

import json

import pytest
from conftest import ScriptedLLM, edit

import autoresearch as ar

EDIT = edit("LR = 0.02", "LR = 0.06", "a higher rate")
PARTS = [{"type": "thinking", "thinking": [{"text": "a draft"}]}, {"type": "text", "text": EDIT}]
PROMPT = ["the rules", "the incumbent", "the history", "what holds now"]
KEY = "sk-very-secret"


def answer(text: object, finish: object = "stop", **message) -> dict:
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": finish}],
            "usage": {"prompt_tokens": "100", "completion_tokens": 30.0,    # some write them so
                      "prompt_tokens_details": {"cached_tokens": 70}}}


@pytest.fixture(scope="module")
def server():
    return ScriptedLLM([])


@pytest.fixture
def client(server, monkeypatch):
    """client(code, body, url, **headers): an LLM whose server answers so."""
    for name in "OPENAI_API_KEY", "ANTHROPIC_API_KEY":
        monkeypatch.setenv(name, KEY)

    def make(code: int, body: object, url: str = server.url, **headers: str) -> ar.LLM:
        server.script[:], server.requests[:] = [lambda h: h.send(code, body, **headers)], []
        return ar.LLM(url, "m")
    return make


@pytest.mark.parametrize("body, whole", [
    *[(answer(text), True) for text in (EDIT, PARTS)], (answer(None, reasoning=EDIT), True),
    (answer(EDIT, None), True), ("\ufeff\n" + json.dumps(answer(EDIT)), True),
    *[(answer(EDIT, end), False) for end in ("length", "content_filter", "model_length")],
    (answer(None, reasoning="hm"), False), (answer(EDIT, refusal="no"), False),
    (answer("") | {"choices": []}, False),
    (answer(EDIT) | {"error": "busy", "choices": [answer(EDIT)["choices"][0] | {"error": None}]},
     False)])
def test_a_reply_is_read_in_whatever_form_it_comes_and_its_tokens_count(client, body, whole):
    got = client(200, body).ask(PROMPT, [])
    assert got.whole is whole and (not whole or got.text == EDIT)
    assert (got.input_tokens, got.cached_tokens, got.output_tokens) == (100, 70, 30)


def test_anthropic_is_asked_in_its_format_and_cached_tokens_count(client, server):
    body = {"content": PARTS, "stop_reason": "end_turn", "usage": {
        "input_tokens": 10, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 70}}
    got = client(201, body, server.anthropic_url).ask(PROMPT, ["reply", "complaint"], room=50_000)
    assert (got.text, got.input_tokens, got.cached_tokens, got.whole) == (EDIT, 100, 70, True)
    path, headers, sent = server.requests[0]
    assert path.endswith("/v1/messages") and headers["x-api-key"] == KEY
    assert [said["role"] for said in sent["messages"]] == ["user", "assistant", "user"]
    marks = ["cache_control" in part for part in sent["messages"][0]["content"]]
    assert marks == [False, True, False] and sent["max_tokens"] == 50_000


STREAM = 'data: {"choices": [{"delta": {"content": "the context"}}]}'
REFUSALS = [
    (401, f"no such key: {KEY}", "stop"), (402, "no credit", "stop"), (404, "nobody", "stop"),
    (400, "max_tokens: 16000 > 8192 output tokens", "stop"), (307, "http://else.where", "stop"),
    (429, "slow down", "away"), (529, "overloaded", "away"), (200, "no credits", "away"),
    (200, "context length exceeded", "long"), (500, "context size", "long"),
    (400, "9810 tokens do not fit in 8192", "long"), (413, "", "long")]


@pytest.mark.parametrize("code, words, kind", REFUSALS)
def test_a_refusal_ends_a_start_only_before_its_first_good_reply(client, code, words, kind):
    llm = client(code, {"error": words}, Location=words, Retry_After="7")
    for llm.answered in False, True:
        expected = ar.Stop if kind == "stop" and not llm.answered else ar.Away
        with pytest.raises(expected) as error:
            llm.ask(PROMPT, [])
        said = str(error.value.args[0])
        assert f"HTTP {code} from http://127" in said and words.replace(KEY, "") in said
        assert KEY not in said and (expected is not ar.Stop or "--base-url" in said)
        assert code != 429 or error.value.args[1] == 7
        assert expected is ar.Stop or error.value.args[2] is (kind == "long")


@pytest.mark.parametrize("body", ["<html>", "[" * 9999, '{"choices": [{', "null", "[1]", STREAM])
def test_what_is_no_answer_is_shown_in_the_servers_words(client, body):
    with pytest.raises(ar.Away) as error:
        client(200, body).ask(PROMPT, [])
    said = error.value.args[0]
    assert type(error.value) is ar.Away and body[:60].replace('"', "'") in said
    assert ("a stream" in said) is (body == STREAM)


@pytest.mark.parametrize("offered, choice", [
    ({"data": [{"id": "nomic-embed"}, {"id": "tts-1"}, {"id": "chat"}]}, "chat"),
    ([{"id": "chat"}], "chat"), ({"models": [{"name": "chat"}]}, "chat"), ({"data": []}, None),
    ({"error": "no such path"}, None), ({"data": [{"id": f"m{i}"} for i in range(21)]}, None)])
def test_the_first_chat_model_is_chosen_or_a_choice_asked_for(client, server, offered, choice,
                                                              monkeypatch):
    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", lambda h: h.send(200, offered))
    llm = client(200, answer(EDIT))
    if choice:
        assert llm.choose_model() == choice
    else:
        with pytest.raises(ar.Stop, match="--model"):
            llm.choose_model()


@pytest.mark.parametrize("prompt_tokens, warned", [(100, False), (4096, True), (9000, False)])
def test_a_prompt_that_the_server_cut_is_noticed_once(client, prompt_tokens, warned, capsys):
    llm = client(200, answer(EDIT) | {"usage": {"prompt_tokens": prompt_tokens}})
    for _ in range(2):
        llm.ask(PROMPT, [])
    assert capsys.readouterr().out.count("OLLAMA_CONTEXT_LENGTH") == warned


def test_a_server_on_this_machine_is_asked_without_proxy_and_netrc(client, server, tmp_path,
                                                                   monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert client(200, answer(EDIT)).ask(PROMPT, []).whole
    _, headers, sent = server.requests[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert [said["content"] for said in sent["messages"]] == [
        "the rules", "the incumbentthe historywhat holds now"]


@pytest.mark.parametrize("url, kind, why", [
    ("http://127.0.0.1:9/v1", ar.Away, "Connection refused"),
    ("localhost:9/v1", ar.Stop, "No connection adapters")])
def test_a_connection_that_fails_says_why(url, kind, why):
    with pytest.raises(kind, match=why):
        ar.LLM(url, "m").ask(PROMPT, [])


@pytest.mark.parametrize("base, url", [
    ("http://x/v1/chat/completions/", "http://x/v1"), ("http://x/v1//", "http://x/v1"),
    ("http://x/anthropic", "http://x/anthropic/v1"), (None, "http://y/v1")])
def test_a_base_url_is_taken_in_its_usual_forms(base, url, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://y")
    assert ar.LLM(base, "m").url == url
