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
            "usage": {"prompt_tokens": "100", "completion_tokens": 30.0}}   # some write them so


def set_only(monkeypatch, **variables: str):
    """Set these variables, and no other that concerns an endpoint."""
    for form in ar.FORMATS:
        for name in (*form.urls, *form.keys):
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def server():
    return ScriptedLLM([])


@pytest.fixture
def client(server, monkeypatch):
    """client(code, body, url, **headers): an LLM whose server answers so."""
    set_only(monkeypatch, OPENAI_API_KEY=KEY, ANTHROPIC_API_KEY=KEY)

    def make(code: int, body: object, url: str = server.url, model="m", **headers: str) -> ar.LLM:
        server.script[:], server.requests[:] = [lambda h: h.send(code, body, **headers)], []
        return ar.LLM(url, model)
    return make


@pytest.mark.parametrize("body, complete", [
    (answer(EDIT), True), (answer(PARTS), True), (answer(None, reasoning_content=EDIT), True),
    (answer(EDIT, None), True), ("\ufeff\n" + json.dumps(answer(EDIT)), True),
    *[(answer(EDIT, end), False) for end in ("length", "content_filter", "MAX_TOKENS")],
    (answer(EDIT, "STOP"), True), (answer(EDIT + "\ud83d"), True),
    (answer(" \n"), False), (answer(None, refusal="no"), False), (answer(EDIT, "error"), False),
    (answer(EDIT) | {"error": None}, True)])
def test_a_reply_is_read_in_whatever_form_it_comes_and_its_tokens_count(client, body, complete):
    got = client(200, body).ask(PROMPT, [])
    assert got.complete is complete
    assert not complete or got.text in (EDIT, EDIT + "?")       # half a character becomes a "?"
    assert (got.input_tokens, got.output_tokens) == (100, 30)


def test_anthropic_is_asked_in_its_format_and_cached_tokens_count(client, server):
    body = {"content": PARTS, "stop_reason": "end_turn", "usage": {
        "input_tokens": 10, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 70,
        "output_tokens": 30}}
    got = client(201, body, server.anthropic_url).ask(PROMPT, ["reply", "complaint"])
    assert (got.text, got.input_tokens, got.output_tokens) == (EDIT, 100, 30) and got.complete
    path, headers, sent = server.requests[0]
    assert path.endswith("/v1/messages") and headers["x-api-key"] == KEY
    assert [said["role"] for said in sent["messages"]] == ["user", "assistant", "user"]
    marks = ["cache_control" in part for part in sent["messages"][0]["content"]]
    assert marks == [False, True, False] and sent["max_tokens"] == 32_000


@pytest.mark.parametrize("wire", ["url", "anthropic_url"])
@pytest.mark.parametrize("code, error, too_long", [
    (401, f"no such key: {KEY}", False), (404, "nobody", False), (307, "elsewhere", False),
    (200, "no credits", False), (408, "", False), (503, "Loading model", False),
    (429, "Rate limit reached: 6000 tokens in context", False),
    (400, "max_tokens: 32000 > 8192", False), (500, "context size", True),
    (400, "9810 tokens do not fit in 8192", True), (413, "", True),
    (422, "Context length exceeded", True)])
def test_a_refusal_is_told_in_the_servers_words(client, server, code, error, too_long, wire):
    body = {"error": {"message": error}} if code < 500 else error
    llm = client(code, body, getattr(server, wire), Location="http://x.invalid")
    with pytest.raises(ar.Away) as caught:
        llm.ask(PROMPT, [])
    reason, long = caught.value.args
    assert f"HTTP {code} from http://127" in reason and error.replace(KEY, "KEY") in reason
    assert long is too_long


@pytest.mark.parametrize("wire", ["url", "anthropic_url"])
@pytest.mark.parametrize("body", [
    "<html>context</html>", "[" * 9999, '{"choices": [{', "null", "[1]", "{}", "7",
    '{"choices": [7]}', '{"choices": [{"message": {"content": [7]}}], "content": [7]}',
    'data: {"choices": [{"delta": {"content": "the context"}}]}'])
def test_what_is_no_answer_is_shown_in_the_servers_words(client, server, body, wire):
    with pytest.raises(ar.Away) as caught:
        client(200, body, getattr(server, wire)).ask(PROMPT, [])
    reason, too_long = caught.value.args
    assert body[:60].replace('"', "'") in reason and not too_long


@pytest.mark.parametrize("code, offered, named, model", [
    (200, {"data": [{"id": "one"}]}, None, "one"),
    (200, {"models": [{"name": "one"}]}, None, "one"),
    (404, "no", "m", "m"), (503, "no", "m", "m"),
    (200, {"data": [{"id": "one"}, {"id": "two"}]}, None, "--model .*'one', 'two'"),
    *[(200, nothing, None, "--model") for nothing in (
        {"data": []}, [{"id": "one"}], {"data": [7]}, "<html>", {"error": "no such path"})],
    (401, "no", "m", "HTTP 401"), (401, "no", None, "HTTP 401"), (404, "no", None, "HTTP 404")])
def test_a_start_finds_a_wrong_key_and_takes_the_model_named_or_the_only_one(
        server, monkeypatch, code, offered, named, model):
    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", lambda h: h.send(code, offered))
    llm = ar.LLM(server.url, named)
    if len(model) > 3:
        with pytest.raises(ar.Stop, match=model):
            llm.greet()
    else:
        assert f" {model} at {server.url}" in llm.greet() and llm.model == model


def test_the_whole_prompt_is_sent_with_the_key(client, server):
    assert client(200, answer(EDIT)).ask(PROMPT, []).complete
    _, headers, sent = server.requests[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert [said["content"] for said in sent["messages"]] == [
        "the rules", "the incumbentthe historywhat holds now"]


@pytest.mark.parametrize("url, why", [
    ("http://127.0.0.1:9/v1", "Connection refused"), ("http:///v1", "Invalid URL")])
def test_a_connection_that_fails_says_why(url, why):
    llm = ar.LLM(url, "m")
    assert f" m at {url} " in llm.greet(), "it may be there later"
    with pytest.raises(ar.Away, match=why):
        llm.ask(PROMPT, [])
    with pytest.raises(ar.Stop, match=f"{why}.*--base-url"):
        ar.LLM(url, None).greet()


def test_a_url_without_its_beginning_is_refused_at_once():
    with pytest.raises(ar.Stop, match="ollama/v1 has to begin with http"):
        ar.LLM("ollama/v1", "m")


@pytest.mark.parametrize("base, url", [
    ("http://x/v1/chat/completions/", "http://x/v1"), ("'http://x/v1//'\r", "http://x/v1"),
    ("http://x/anthropic", "http://x/anthropic/v1"),
    ("http://x/anthropic/v1/messages", "http://x/anthropic/v1"),
    ("http://me:secret@x/v1", "http://x/v1"), ("http://x/a@b", "http://x/a@b"),
    ("https://api.anthropic.com", "https://api.anthropic.com/v1")])
def test_a_base_url_is_taken_in_its_usual_forms_and_without_its_password(base, url, monkeypatch):
    set_only(monkeypatch)
    assert ar.LLM(base, "m").url == url


OAI, ANT = {"OPENAI_API_KEY": "o"}, {"ANTHROPIC_API_KEY": "a"}
TOKEN = {"ANTHROPIC_AUTH_TOKEN": "t", "ANTHROPIC_BASE_URL": "http://x"}
SENT = {key: {"Authorization": f"Bearer {key}"} for key in ("o", "t", "no-key")}
SENT["a"] = {"x-api-key": "a"}


@pytest.mark.parametrize("variables, base_url, model, expected", [
    (OAI, None, None, "OpenAI home o"), (ANT, None, None, "Anthropic home a"),
    (OAI | ANT, None, None, "Anthropic home a"), (OAI | ANT, None, "claude-x", "Anthropic home a"),
    (OAI | ANT, None, "gpt-5.5", "OpenAI home o"), (OAI, None, "claude-x", "OpenAI home o"),
    (OAI | ANT | {"OPENAI_BASE_URL": "http://x/v1"}, None, None, "OpenAI http://x/v1 o"),
    (OAI | ANT | {"OPENAI_BASE_URL": "http://x/v1"}, None, "claude-x", "Anthropic home a"),
    (OAI | TOKEN, None, "gpt-oss:20b", "Anthropic http://x/v1 t"),
    # The older name of a variable, and empty ones. A gateway's key never goes to the provider.
    (OAI | {"OPENAI_API_BASE": "http://x/v1"}, None, None, "OpenAI http://x/v1 o"),
    (OAI | {"OPENAI_BASE_URL": "", "OPENAI_API_BASE": "http://x"}, None, None, "OpenAI http://x o"),
    (OAI | {"ANTHROPIC_API_KEY": ""}, None, None, "OpenAI home o"),
    (TOKEN | ANT, None, None, "Anthropic http://x/v1 t"),
    # A flag: its format is told by its address, whatever the host is called.
    (OAI | ANT, "http://my-anthropic-proxy:8/v1", None, "OpenAI http://my-anthropic-proxy:8/v1 o"),
    (ANT, "http://x/v1", None, "OpenAI http://x/v1 no-key"),
    (OAI | ANT, "https://api.anthropic.com", "gpt-5.5", "Anthropic home a"),
    (OAI | ANT, "http://x/anthropic/", None, "Anthropic http://x/anthropic/v1 a"),
    ({"OPENAI_API_KEY": "'o\u200b\n'\r"}, None, None, "OpenAI home o")])
def test_what_was_set_decides_who_is_asked(variables, base_url, model, expected, monkeypatch):
    set_only(monkeypatch, **variables)
    llm = ar.LLM(base_url, model)
    place = "home" if llm.url == llm.format.home else llm.url
    assert f"{type(llm.format).__name__} {place} {llm.key}" == expected
    assert llm.model == (model or (llm.format.model if place == "home" else ""))
    assert llm.headers == llm.format.headers | SENT[llm.key]


def test_nothing_is_asked_if_nothing_is_set(monkeypatch):
    set_only(monkeypatch, OPENAI_API_KEY="", ANTHROPIC_BASE_URL="")
    assert ar.find_format(None) is None and ar.find_format("http://x") is not None


def test_the_first_line_says_who_is_asked_by_which_variable_and_that_it_costs(monkeypatch):
    monkeypatch.setattr(ar.LLM, "http", lambda *args: ["m"])    # so that no provider is asked
    set_only(monkeypatch, **OAI | ANT)
    line = ar.LLM(None, "gpt-5.5").greet()
    assert "gpt-5.5 at https://api.openai.com/v1 (OPENAI_API_KEY); it may cost money" in line
    set_only(monkeypatch)
    assert "m at http://x/v1 (no key)" in ar.LLM("http://x/v1", None).greet()
