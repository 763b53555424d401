"""The driver, through its front door: real subprocesses, real kills, a scripted LLM on loopback."""

import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
from conftest import ROOT, TINY, edit

sys.path.insert(0, str(ROOT))
import autoresearch as ar  # noqa: E402

BETTER = edit("LR = 0.02               # of each weight", "LR = 0.06", "a higher rate")
WORSE = edit("LR = 0.02               # of each weight", "LR = 0.00001", "hardly any rate")


def consistent(lab) -> list[dict]:
    """Check what has to be true of a folder whenever no driver runs in it, and return its rows."""
    rows = lab.rows()
    assert len({row["experiment"] for row in rows}) == len(rows), "no row is doubled"
    assert all(None not in row.values() and len(row) == len(ar.COLUMNS) for row in rows)
    kept = [row for row in rows if row["status"] == "keep"]
    if kept:
        best = lab.folder / "runs" / f"{int(kept[-1]['experiment']):04d}" / "train.py"
        assert lab.train.read_text() == best.read_text(), "train.py is the incumbent"
    return rows


# The judge


def kept_share(effect: float, tries: int = 10_000) -> tuple[float, float]:
    """Simulate candidates better by `effect` noises. Returns the shares kept and run twice."""
    luck, kept, twice = random.Random(0), 0, 0
    for _ in range(tries):
        incumbent = [luck.gauss(0, 1) for _ in range(3)]
        runs = [luck.gauss(-effect, 1)]
        if (verdict := ar.judge(runs, incumbent, 1.0)) == "again":
            twice += 1
            verdict = ar.judge([*runs, luck.gauss(-effect, 1)], incumbent, 1.0)
        kept += verdict == "keep"
    return kept / tries, twice / tries


def test_the_judge_keeps_what_its_docstring_says():
    promised = [int(n) / 100 for n in re.findall(r"(\d+)%", ar.judge.__doc__)]
    none, one_look, greedy, *some = promised[:6]
    share, twice = kept_share(0)
    assert greedy == 0.5 and abs(share - none) < 0.015 and abs(twice - one_look) < 0.015
    for effect, expected in zip((1, 2, 4), some):
        assert abs(kept_share(effect)[0] - expected) < 0.015


def test_the_greedy_rule_is_one_setting_away(monkeypatch):
    monkeypatch.setattr(ar, "RUNS", 1)
    monkeypatch.setattr(ar, "WIN", 0)
    assert ar.judge([0.999], [1.0, 1.0, 1.0], 0.5) == "keep"
    assert ar.judge([1.0], [1.0], 0.5) == "discard"


def test_noise_is_pooled_over_all_files_that_ran_more_than_once():
    assert ar.pooled_noise([[1.0, 3.0], [10.0], [5.0, 5.0, 8.0]]) == pytest.approx((8 / 3) ** 0.5)
    assert ar.pooled_noise([[1.0]]) == 0.0


# The screen

REFUSED = {
    "import os": "import of os",
    "from torch import multiprocessing": "multiprocessing",
    "import torch.utils.cpp_extension": "cpp_extension",
    "open('x')": "open()",
    "torch.load('x')": "torch.load",
    "np.memmap('val.bin')": "np.memmap",
    "torch.manual_seed(137)": "seed",
    "np.random.default_rng(137)": "seed",
    "torch.Generator()": "seed",
    "exec('1')": "exec()",
    "getattr(torch, 'lo' + 'ad')": "getattr()",
    "().__class__": ".__class__",
    "prepare.BUDGET": "prepare.BUDGET",
    "prepare.batches = None": "assignment to prepare.batches",
    "F.cross_entropy = None": "assignment to F.cross_entropy",
    "torch.Tensor.float = None": "assignment to torch.Tensor.float",
    "import time; time.monotonic = None": "assignment to time.monotonic",
    "torch._C._nn.cross_entropy_loss = None": "assignment to torch._C",
    "del prepare.batches": "assignment to prepare.batches",
    "for prepare.batches in []: pass": "assignment to prepare.batches",
    "import __main__": "import of __main__",
    "import sys": "import of sys",
    "import gc": "import of gc",
    "import threading": "import of threading",
    "from prepare import evaluate": "prepare.evaluate",
    "import prepare as p; p.EVAL_ROWS = 1": "assignment to p.EVAL_ROWS",
    "torch.set_rng_state(0)": "seed",
    "from random import Random": "import of random.Random",
    "import random; random._os.system('x')": "._os",
    "batch = prepare.batches(1).gi_frame": ".gi_frame",
    "import random; r = random": "another name for random",
    "np.random.SFC64(1)": "seed",
    "torch.overrides.TorchFunctionMode": "overrides",
    "torch.ones(1).numpy().tofile('x')": ".tofile",
    "from math import *": "import of math.*",
    "def f(:": "syntax error in line",
}


@pytest.mark.parametrize("line", REFUSED)
def test_the_screen_refuses(line):
    source = TINY.replace("import prepare\n", f"import prepare\nimport numpy as np\n{line}\n", 1)
    with pytest.raises(ar.Unusable) as refusal:
        ar.screen(source, {})
    assert REFUSED[line] in str(refusal.value)


@pytest.mark.parametrize("line", [
    "torch.backends.cuda.matmul.allow_tf32 = True", "import math, time, dataclasses",
    "model = torch.compile(nn.Linear(1, 1))", "from torch.optim import Muon", "a = '{}'.format(1)",
    "torch._dynamo.config.cache_size_limit = 64", "from collections import defaultdict"])
def test_the_screen_lets_pass(line):
    ar.screen(TINY.replace("import prepare\n", f"import prepare\n{line}\n", 1), {})


def test_a_change_of_comments_or_formatting_is_a_duplicate():
    seen = {ar.screen(TINY, {}): 7}
    same = TINY.replace("# channels", "# other words").replace("WIDTH = 16", "WIDTH = (16)")
    with pytest.raises(ar.Unusable, match="experiment 7"):
        ar.screen(same.replace("def train():\n", 'def train():\n    """A docstring."""\n'), seen)
    assert ar.screen(TINY.replace("16", "17"), seen)


# Replies


def test_an_edit_has_to_match_once_and_the_nearest_lines_are_shown_if_not():
    assert "WIDTH = 32\n" in ar.apply_reply(edit("WIDTH = 16              # channels   ",
                                                 "WIDTH = 32"), TINY)[1]
    with pytest.raises(ar.Unusable, match="in no place(.|\n)*LR = 0.02  "):
        ar.apply_reply(edit("LR = 0.03               # of each weight", "LR = 1"), TINY)
    with pytest.raises(ar.Unusable, match=r"in \d+ places, lines"):
        ar.apply_reply(edit("", "x"), TINY)


@pytest.mark.parametrize("reply, reason", [
    ("no form at all", "DESCRIPTION"),
    ("DESCRIPTION: x\n\nnothing more", "neither SEARCH/REPLACE"),
    ("DESCRIPTION: x\n```python\na\n```\n```python\nb\n```", "2 fences"),
    ("DESCRIPTION: x\n<<<<<<< SEARCH\na\n=======\nb\n", "not closed"),
    ("DESCRIPTION: x\n<<<<<<< SEARCH\n=======\nb\n>>>>>>> REPLACE", "the SEARCH is empty")])
def test_an_unclear_reply_is_never_guessed_at(reply, reason):
    with pytest.raises(ar.Unusable, match=reason):
        ar.apply_reply(reply, TINY)


def test_a_reply_may_be_a_whole_file_or_have_windows_line_ends():
    whole = "**DESCRIPTION:** all new\n\n```python\nx = 1\n```\n"
    assert ar.apply_reply(whole, TINY) == ("all new", "x = 1\n")
    crlf = edit("LR = 0.02               # of each weight", "LR = 1").replace("\n", "\r\n")
    assert "LR = 1\n" in ar.apply_reply(crlf, TINY)[1]


# The search


def test_search_finds_the_knobs_in_force_and_moves_them_in_their_own_way():
    source = "A = 8 if CUDA else 2\nB = 2 ** 15  # x\nC = 0.95\nD = 'x'\ne = 3\nF = A * 2\nG = 0\n"
    assert [(k.name, k.value) for k in ar.find_knobs(source, False)] == [
        ("A", 2), ("B", 32768), ("C", 0.95)]
    assert [k.value for k in ar.find_knobs(source, True)] == [8, 32768, 0.95]
    assert (ar.moved(4096, 0.1), ar.moved(4096, -0.1)) == (8192, 2048)
    assert ar.moved(7, 0.01) == 8 and ar.moved(7, -0.01) == 6 and ar.moved(1, -1) == 1
    assert 0.95 < ar.moved(0.95, 0.5) < 1 and 0.5 < ar.moved(0.95, -0.5) < 0.95
    assert ar.moved(0.02, 0.5) == pytest.approx(0.02 * 2.718 ** 0.5, rel=0.01)


def test_search_never_proposes_the_same_program_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ar.Experiment(0, "baseline", source=TINY, fingerprint=ar.fingerprint(TINY))
    seen, rows = {base.fingerprint: 0}, []
    for number in range(1, 150):
        exp = ar.search(ar.Experiment(number, "search"), base, rows, False, seen)
        assert not exp.problem and exp.fingerprint not in seen
        assert all(old != new for _, old, new in ar.MOVE.findall(exp.description))
        seen[exp.fingerprint] = number
        rows.append({"by": "search", "description": exp.description, "reason": "-0.1 (-1 noise)"})


# The ledger and the prompt


def a_row(number: int, status: str = "discard", by: str = "llm", score: float = 1.5) -> dict:
    return dict(zip(ar.COLUMNS, [
        "abcdef0", f"{score:.6f}", "0.3", status, f"idea {number} " + "x" * 90, str(number), by,
        f"{score:.6f}", "7.770777", f"-0.0100 (-1.2 noise) against #{number // 9}", "60.0", "66.0",
        "100", "30", "2026-01-01T00:00:00+00:00"]))


def common(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))


def test_the_history_only_grows_and_300_experiments_of_it_still_fit():
    rows = [a_row(0, "keep", "baseline")] + [
        a_row(i, "keep" if i % 40 == 0 else "crash" if i % 9 == 0 else "discard")
        for i in range(1, 301)]
    texts = ["\n".join(ar.history_lines(rows[:n])) for n in range(1, 302)]
    grew = sum(b.startswith(a) for a, b in zip(texts, texts[1:]))
    assert grew >= 300 - 300 * 2 // ar.HISTORY_FULL, "folding breaks the prefix only now and then"
    assert len(texts[-1]) < 40_000
    assert all(f"#{i} keep" in texts[-1] for i in range(40, 301, 40))
    assert "7.770777" not in texts[-1]


def test_a_torn_last_line_is_cut_off_and_a_broken_one_is_named(measured, monkeypatch, capsys):
    monkeypatch.chdir(measured.folder)
    ledger = measured.folder / "results.tsv"
    whole = ledger.read_text()
    torn = whole + whole.splitlines()[1][:-3]
    ledger.write_text(torn)
    assert "baseline" in measured.drive("--experiments", 0)
    assert ledger.read_text() == torn, "the summary alone changes nothing: a driver may be at work"
    assert len(ar.read_ledger()) == 1 and ledger.read_text() == whole
    assert "cut off a partly written last line" in capsys.readouterr().out
    ledger.write_text(whole.rstrip("\n"))
    assert len(ar.read_ledger()) == 1 and ledger.read_text() == whole, "only its end was missing"
    ledger.write_text(whole + "what is this\n" + whole.splitlines(True)[1])
    assert "results.tsv line 3 is not a row" in measured.drive("--experiments", 0, code=1)
    assert "what is this" in ledger.read_text()


# The plot

SVG = "{http://www.w3.org/2000/svg}"


def dot(val, status="discard", by="llm", description="an idea", runs=1, test=0.0):
    """A ledger row, as results.tsv gives it: all strings."""
    return {"val_bpb": f"{val:.6f}", "status": status, "by": by, "description": description,
            "runs": ",".join([f"{val:.6f}"] * runs), "test_bpb": f"{test:.6f}"}


BASELINE = dot(1.45, "keep", "baseline", "baseline", runs=3, test=1.47)


def night(experiments, seed=0):
    """A plausible ledger: 8% crashes, 10% keeps, the rest a little worse than the incumbent."""
    rng, rows, best = random.Random(seed), [BASELINE], 1.45
    for _ in range(experiments):
        by, luck = rng.choice(["llm", "search", "human"]), rng.random()
        if luck < 0.08:
            rows.append(dot(0, "crash", by))
        elif luck < 0.18:
            best -= rng.uniform(0.003, 0.03) * (best - 1)
            rows.append(dot(best, "keep", by, "what helped " * rng.randint(1, 4), 2, best + 0.02))
        else:
            rows.append(dot(best + abs(rng.gauss(0, 0.01)), "discard", by))
    return rows


def words(svg):
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def drawn(svg, look):
    """How many marks of a look there are: each is one M of a path."""
    return sum(node.get("d").count("M") for node in ElementTree.fromstring(svg).iter(f"{SVG}path")
               if look in node.get("class").split())


@pytest.mark.parametrize("noise", [0.0, 0.004])
@pytest.mark.parametrize("rows", [
    [], [BASELINE], [dot(0, "crash")] * 3, [BASELINE] + [dot(0, "crash")] * 9,
    [BASELINE, dot(1.44, "keep")], [BASELINE, dot(1.45), dot(9.9)], night(3), night(30)])
def test_any_ledger_gives_a_well_formed_picture(rows, noise):
    assert ElementTree.fromstring(ar.progress_svg(rows, noise)).tag == f"{SVG}svg"


def test_the_picture_in_the_readme_is_what_its_log_gives(monkeypatch):
    monkeypatch.setattr(ar, "LEDGER", ROOT / "tests" / "night.tsv")
    rows = ar.read_ledger(mend=False)
    picture = ROOT / "tests" / "night.svg"
    noise = ar.pooled_noise([ar.scores_of(row) for row in rows])
    assert ar.progress_svg(rows, noise) == picture.read_text("utf-8")


def test_the_title_has_baseline_best_gain_and_its_standard_error():
    rows = [BASELINE, dot(1.40, "keep", runs=2)]
    # 0.006 * sqrt(1/3 + 1/2) = 0.0055
    title = "baseline 1.4500 → best 1.4000: gain 0.0500 ± 0.0055"
    assert title in words(ar.progress_svg(rows, 0.006))


def test_every_experiment_is_drawn_once():
    rows = night(200)
    svg = ar.progress_svg(rows, 0.004)
    for status in ("keep", "crash"):
        assert drawn(svg, status) == sum(r["status"] == status for r in rows)
    discards = sum(r["status"] == "discard" for r in rows)
    assert drawn(svg, "discard") + drawn(svg, "off") == discards


def test_an_outlier_is_marked_at_the_edge_and_does_not_stretch_the_axis():
    rows = [BASELINE, dot(1.44, "keep"), dot(1.45)]
    assert drawn(ar.progress_svg(rows, 0.004), "off") == 0
    svg = ar.progress_svg([*rows, dot(9.9)], 0.004)
    assert drawn(svg, "off") == 1
    assert "9" not in {word[0] for word in words(svg) if "." in word}


def test_a_description_is_shown_as_text_whatever_it_contains():
    rows = [BASELINE, dot(1.40, "keep", description="<script>&\"'\x00\ud800")]
    assert "<script>&\"' −0.0500" in words(ar.progress_svg(rows, 0.004))
    rows = [BASELINE, dot(1.40, "keep", description="x" * 5000)]
    assert max(map(len, words(ar.progress_svg(rows, 0.004)))) < 100


def test_labels_do_not_overlap_and_the_biggest_gain_has_one():
    dots = [(80 + 12 * i, 100 + 5 * i, "what helped " * (1 + i % 3)) for i in range(60)]
    random.Random(0).shuffle(dots)
    flags = ar.place_flags(dots, 10)
    assert len(flags) > 10 and flags[0][:3] == dots[0]
    for (*_, a), (*_, b) in itertools.combinations(flags, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_night_of_1000_is_a_small_picture():
    assert len(ar.progress_svg(night(1000), 0.004).encode()) < 100_000


# A night


def test_a_first_start_measures_the_baseline_and_goes_on_with_search(lab):
    output = lab.drive("--experiments", 1, "--data", lab.text, "--budget", 0.3)
    rows = consistent(lab)
    assert (lab.folder / "results.tsv").read_text().splitlines()[0] == "\t".join(ar.COLUMNS)
    assert [row["by"] for row in rows] == ["baseline", "search"]
    assert len(rows[0]["runs"].split(",")) == 3 and rows[0]["status"] == "keep"
    assert "set ANTHROPIC_API_KEY" in output, "a line says how to connect an LLM"
    assert "baseline 2." in output and "1 experiments: " in output
    assert (lab.folder / "progress.svg").read_text().startswith("<svg")
    for row in rows[1:]:
        assert " -> " in row["description"]


@pytest.mark.parametrize("wire", ["url", "anthropic_url"])
def test_an_llm_proposes_and_no_prompt_has_test_bpb_or_the_key(measured, llm, wire):
    server = llm([BETTER, WORSE, BETTER, edit("BATCH = 8", "BATCH = 4"), WORSE])
    measured.env |= {"OPENAI_API_KEY": "sk-very-secret", "ANTHROPIC_API_KEY": "sk-very-secret"}
    output = measured.drive("--experiments", 2, "--base-url", getattr(server, wire))
    rows = consistent(measured)
    assert rows[1]["by"] == "llm" and rows[1]["description"] == "a higher rate"
    assert rows[1]["status"] == "keep" and len(rows[1]["runs"].split(",")) == 2
    assert int(rows[1]["input_tokens"]) == 100 and int(rows[1]["output_tokens"]) == 30
    assert "70 of them" in output or "cached" in output
    for path, headers, body in server.requests:
        sent = json.dumps(body)
        for row in rows:
            assert row["test_bpb"][:6] not in sent or row["status"] == "crash"
        assert "sk-very-secret" not in sent
        if wire == "url":
            assert path == "/v1/chat/completions" and set(body) == {"model", "messages"}
            assert headers["Authorization"] == "Bearer sk-very-secret"
        else:
            assert path == "/anthropic/v1/messages"
            assert set(body) == {"model", "max_tokens", "system", "messages"}
            assert headers["x-api-key"] == "sk-very-secret" and "Authorization" not in headers
            marked = [part for part in body["system"] + body["messages"][0]["content"]
                      if "cache_control" in part]
            assert len(marked) == 2
    for file in measured.folder.rglob("*"):
        assert not file.is_file() or b"sk-very-secret" not in file.read_bytes()


def test_between_keeps_nine_tenths_of_a_prompt_are_what_they_were(measured, llm):
    luck = itertools.count(1)
    server = llm([lambda h: h.reply(edit("LR = 0.02               # of each weight",
                                         f"LR = {next(luck)}e-7", "hardly any"))])
    shutil.copy(ROOT / "train.py", measured.folder / "long.txt")
    measured.drive("--experiments", 4, "--base-url", server.url)
    prompts = ["".join(m["content"] for m in body["messages"]) for _, _, body in server.requests]
    assert len(prompts) >= 4
    for a, b in zip(prompts, prompts[1:]):
        assert common(a, b) > 0.9 * len(a)


def test_what_is_wrong_goes_back_twice_at_most_and_a_crash_with_its_log(measured, llm):
    crash = edit("    return model", "    return 1 / 0", "a division")
    server = llm(["nonsense", edit("LR = 0.02               # of each weight", "LR = = 1"), crash,
                  edit("BATCH = 8", "import os")])
    measured.drive("--experiments", 2, "--base-url", server.url)
    rows = consistent(measured)
    rows = {row["experiment"]: row for row in rows}
    assert rows["1"]["status"] == rows["2"]["status"] == "crash"
    assert "ZeroDivisionError" in rows["1"]["reason"]
    first = [body["messages"] for _, _, body in server.requests[:3]]
    assert [len(messages) for messages in first] == [2, 4, 4]
    assert "DESCRIPTION" in first[1][3]["content"]
    assert "syntax error in line" in first[2][3]["content"] and "LR = = 1" in first[2][3]["content"]
    folder = measured.folder / "runs" / "0001"
    assert {p.name for p in folder.glob("*.md")} == {
        "prompt.md", "prompt-1.md", "prompt-2.md", "reply.md", "reply-1.md", "reply-2.md"}
    assert "SEARCH matches in no place" in rows["2"]["reason"]


def test_a_proposal_that_fails_before_the_baseline_is_measured_is_logged_after_it(measured, llm):
    (measured.folder / "results.tsv").unlink()
    shutil.rmtree(measured.folder / "runs")
    measured.train.write_text(TINY + "# sleep 0.3\n")
    measured.drive("--experiments", 1, "--base-url", llm(["nonsense"]).url, "--data", measured.text)
    assert [row["status"] for row in consistent(measured)] == ["keep", "crash"]


def test_a_crash_goes_back_with_the_end_of_its_log_as_data(measured, llm):
    crash = edit("    return model", "    return 1 / 0", "a division")
    server = llm([crash, BETTER])
    measured.drive("--experiments", 1, "--base-url", server.url)
    said = server.requests[1][2]["messages"][-1]["content"]
    if "ZeroDivisionError" not in said:         # the second was a draft ahead
        said = server.requests[2][2]["messages"][-1]["content"]
    assert "ZeroDivisionError" in said and "as data" in said
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", said)
    assert max(map(len, said.splitlines())) < 250
    assert consistent(measured)[1]["description"] == "a higher rate"


def drop(handler):
    handler.close_connection = True


FAILURES = {
    "429": lambda h: h.send(429, {"error": "slow down"}, Retry_After="1"),
    "500": lambda h: h.send(500, "oops"),
    "a dropped connection": drop,
    "HTML": lambda h: h.send(200, "<html>gateway</html>"),
    "half of the JSON": lambda h: h.send(200, '{"choices": [{"mess'),
    "null content": lambda h: h.reply(None),
    "nothing in it": lambda h: h.send(200, {"choices": [], "content": []}),
    "a cut reply": lambda h: h.reply("DESCR", stop_reason="max_tokens", choices=[
        {"message": {"content": "DESCR"}, "finish_reason": "length"}]),
}


def test_search_fills_in_while_the_api_is_away_and_the_llm_goes_on_after(measured, llm):
    server = llm([FAILURES["500"], BETTER])
    process = measured.start("--base-url", server.url)
    measured.wait_for(lambda: "llm" in [row["by"] for row in measured.rows()], "the LLM's row")
    process.terminate()
    assert "HTTP 500" in process.communicate(timeout=60)[0]
    by = [row["by"] for row in consistent(measured)[1:]]
    assert "search" in by[:by.index("llm")]


WIRES = pytest.mark.parametrize("wire", ["url", "anthropic_url"])


@WIRES
@pytest.mark.parametrize("name", FAILURES)
def test_a_passing_failure_is_tried_again(llm, name, wire, monkeypatch, tmp_path):
    monkeypatch.setattr(ar.random, "uniform", lambda a, b: 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server, said = llm([FAILURES[name], "fine"]), []
    exp = ar.Experiment(1, "llm")
    monkeypatch.chdir(tmp_path)
    exp.folder.mkdir(parents=True)
    begin = time.monotonic()
    model = ar.LLM(getattr(server, wire), None)
    text = model.ask(exp, ("a", ["b"], "c"), ar.threading.Event(), said.append)
    assert text == "fine" and len(said) == 1 and len(server.requests) == 2
    assert name != "429" or time.monotonic() - begin > 1, "Retry-After is honoured"


@pytest.mark.parametrize("wire, code, remedy", [
    ("url", 400, "--model"), ("anthropic_url", 401, "API key"), ("url", 403, "may not"),
    ("anthropic_url", 404, "base URL"), ("url", 307, "redirect")])
def test_a_refusal_ends_the_driver_with_the_servers_words(measured, llm, wire, code, remedy):
    server = llm([lambda h: h.send(code, {"error": "no: sk-very-secret"}, Location="http://x.y/")])
    measured.env |= {"OPENAI_API_KEY": "sk-very-secret", "ANTHROPIC_API_KEY": "sk-very-secret"}
    output = measured.drive("--base-url", getattr(server, wire), code=1)
    last = output.splitlines()[-1]
    assert f"HTTP {code}" in last and remedy in last and "sk-very-secret" not in output
    assert len(consistent(measured)) == 1


# What a person does


def test_a_persons_edit_becomes_a_candidate_and_is_saved_first(measured):
    mine = TINY.replace("LR = 0.02", "LR = 0.06")
    measured.train.write_text(mine)
    output = measured.drive("--experiments", 1, "--researcher", "search")
    row = consistent(measured)[1]
    assert row["by"] == "human" and "train.py was edited" in output
    assert (measured.folder / "runs" / "0001" / "train.py").read_text() == mine


def test_an_edit_made_while_it_runs_is_the_next_candidate(measured):
    process = measured.start("--experiments", "2", "--researcher", "search")
    measured.wait_for(lambda: list(measured.folder.glob("runs/0001/run-0.log")), "the first run")
    mine = TINY.replace("LR = 0.02", "LR = 0.07")
    measured.train.write_text(mine)
    assert process.wait(timeout=90) == 0
    rows = consistent(measured)
    assert "human" in [row["by"] for row in rows]
    number = next(int(row["experiment"]) for row in rows if row["by"] == "human")
    assert (measured.folder / "runs" / f"{number:04d}" / "train.py").read_text() == mine


@pytest.mark.parametrize("flags, said", [
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--budget", "0"], "0 is no float from 0.1 up"), (["--budget", "x"], "x is no"),
    (["--experiments", "-1"], "-1 is no int"), (["--workers", "0"], "0 is no int from 1"),
    (["--researcher", "llm"], "needs ANTHROPIC_API_KEY"), (["--data", "/nowhere"], "/nowhere"),
    (["--launch", "srunx -N1"], "no program srunx"), (["--launch", "'srun"], "invalid split")])
def test_bad_flags_get_one_clear_line(lab, flags, said):
    process = subprocess.run([sys.executable, "autoresearch.py", *flags], cwd=lab.folder,
                             env=lab.env, capture_output=True, text=True)
    assert process.returncode in (1, 2) and said in process.stderr
    assert "Traceback" not in process.stderr and len(process.stderr.splitlines()) <= 2
    assert not lab.rows()


def test_missing_files_and_forbidden_places_get_one_clear_line(measured, llm):
    server = llm([BETTER])
    (measured.folder / "program.md").rename(measured.folder / "away.md")
    output = measured.drive("--base-url", server.url, code=1)
    assert "program.md cannot be read" in output.splitlines()[-1]
    shutil.rmtree(measured.folder / "runs")
    (measured.folder / "runs").write_text("a file in the way")
    output = measured.drive(code=1)
    assert "File exists: runs" in output.splitlines()[-1]


def test_other_conditions_are_refused_by_name(measured):
    output = measured.drive("--budget", 0.4, code=1)
    assert "was measured with budget 1.0 and this start has 0.4" in output
    output = measured.drive("--launch", "", code=1)
    assert "was measured with data scripted and this start has text0" in output
    assert len(consistent(measured)) == 1


def test_a_second_driver_in_the_same_folder_is_refused(measured):
    first = measured.start("--researcher", "search")
    measured.wait_for(lambda: list(measured.folder.glob("runs/0001/run-0.log")), "the first run")
    assert "another driver works in this folder" in measured.drive(code=1)
    first.terminate()
    first.communicate(timeout=60)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_runs_and_prints_the_summary(measured, sign):
    for path in (measured.train, measured.folder / "runs" / "0000" / "train.py"):
        path.write_text(TINY + "# sleep 100\n")
    process = measured.start("--researcher", "search")
    pid = measured.wait_for(lambda: list(measured.folder.glob("runs/0001/run-0.pid")), "a run")[0]
    number = int(pid.read_text().split()[0])
    process.send_signal(sign)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + sign and "0 experiments: 0 kept" in output
    assert not alive(number) and not pid.exists()
    consistent(measured)


def test_only_a_branch_named_autoresearch_gets_commits_and_of_train_py_alone(measured, llm):
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=measured.folder, check=True, text=True,
                              capture_output=True).stdout
    git("init", "-b", "main")
    git("config", "user.email", "a@b.c")
    git("config", "user.name", "me")
    git("config", "commit.gpgsign", "true")
    git("config", "gpg.program", "false")
    hook = measured.folder / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    git("add", "train.py", "prepare.py")
    git("-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null", "commit", "-m", "start")
    git("checkout", "-b", "autoresearch/tonight")
    (measured.folder / "notes.txt").write_text("mine")
    git("add", "notes.txt")
    measured.drive("--experiments", 1, "--base-url", llm([BETTER]).url)
    row = consistent(measured)[1]
    assert git("log", "-1", "--format=%s").strip() == "a higher rate"
    assert git("show", "--name-only", "--format=").split() == ["train.py"]
    assert row["commit"] == git("rev-parse", "--short=7", "HEAD").strip()
    assert git("diff", "--cached", "--name-only").split() == ["notes.txt"], "the index is as it was"


def test_the_log_alone_is_enough_to_go_on(measured):
    shutil.rmtree(measured.folder / "runs")
    measured.drive("--experiments", 1, "--data", measured.text)
    rows = measured.rows()
    assert [row["by"] for row in rows] == ["baseline", "search"]
    assert rows[1]["status"] == "keep" or measured.train.read_text() == TINY


# Kills

KILLER = """
import os, signal, sys
import autoresearch as ar
left = [int(sys.argv.pop(1))]
def dying(real):
    def call(*args, **more):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    return call
os.replace, os.fsync = dying(os.replace), dying(os.fsync)
sys.exit(ar.main())
"""


def test_killed_before_any_write_of_a_keep_it_goes_on_without_loss(measured, llm, tmp_path):
    (measured.folder / "killer.py").write_text(KILLER)
    shutil.copytree(measured.folder, start := tmp_path / "start")
    server = llm([BETTER])
    for writes in range(1, 100):
        shutil.rmtree(measured.folder / "runs")
        shutil.copytree(start, measured.folder, dirs_exist_ok=True)
        server.requests.clear()
        command = measured.command("--experiments", 1, "--base-url", server.url)
        process = subprocess.run([command[0], "killer.py", str(writes), *command[2:]],
                                 cwd=measured.folder, env=measured.env, timeout=90)
        if process.returncode == 0:
            break
        assert process.returncode == -9
        if len(measured.rows()) < 2:
            measured.drive("--experiments", 1, "--base-url", server.url)
        else:
            measured.drive("--experiments", 1, "--researcher", "search")
        assert [row["status"] for row in consistent(measured)[:2]] == ["keep", "keep"]
        assert len(list(measured.folder.glob("runs/0001/run-*.json"))) == 2, "no run was wasted"
        assert len(server.requests) <= 2, "only a reply that never reached the disk is paid again"
    assert writes > 12


def test_a_kill_between_the_last_baseline_run_and_its_row_wastes_no_run(measured):
    (measured.folder / "results.tsv").unlink()
    measured.drive("--experiments", 1)
    assert [row["by"] for row in consistent(measured)] == ["baseline", "search"]
    assert len(list(measured.folder.glob("runs/0000/run-*.json"))) == 3


def test_killed_between_the_two_writes_of_a_proposal_of_search_an_llm_can_go_on(measured, llm):
    measured.drive("--experiments", 1, "--base-url", llm([BETTER]).url)
    (half := measured.folder / "runs" / "0002").mkdir()
    (half / "train.py").write_text(measured.train.read_text().replace("BATCH = 8", "BATCH = 4"))
    measured.drive("--experiments", 1, "--base-url", llm([BETTER]).url)
    assert consistent(measured)[2]["by"] == "human"


def test_killed_at_random_instants_with_two_workers_it_keeps_every_row(measured):
    luck, before = random.Random(4), []
    for _ in range(5):
        process = measured.start("--researcher", "search", "--workers", 2, start_new_session=True)
        time.sleep(luck.uniform(0.2, 2))
        process.kill()
        process.communicate()
        rows = measured.rows()
        assert [row["experiment"] for row in rows[:len(before)]] == before, "no row was lost"
        before = [row["experiment"] for row in rows if row["finished"]]
    measured.drive("--researcher", "search", "--workers", 2, "--experiments", 2)
    rows = consistent(measured)
    assert len(rows) >= len(before) + 2
    assert not list(measured.folder.glob("runs/*/*.pid"))


# Runs that do not behave, and what comes before their command

DEAF = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time;"
                          "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
open("grandchild", "w").write(str(child.pid))
print("before", flush=True)
{rest}
"""


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks at /proc")
def test_a_run_deaf_to_sigterm_is_ended_with_its_children(measured):
    (measured.folder / "deaf.py").write_text(DEAF.format(rest="time.sleep(600)"))
    process = measured.start("--researcher", "search", "--launch", f"{sys.executable} deaf.py")
    pid = int(measured.wait_for(lambda: (measured.folder / "grandchild").read_text(), "the child"))
    assert alive(pid)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143 and not alive(pid)


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks at /proc")
def test_a_run_that_floods_its_log_is_ended_and_the_log_is_small(measured):
    flood = "while True: os.write(1, b'spam ' * 20000)"
    (measured.folder / "flood.py").write_text(DEAF.format(rest=flood))
    measured.drive("--researcher", "search", "--launch", f"{sys.executable} flood.py",
                   "--experiments", 1)
    row = consistent(measured)[1]
    assert row["status"] == "crash" and "flooded its log" in row["reason"]
    assert (measured.folder / "runs/0001/run-0.log").stat().st_size < ar.LOG_LIMIT * 1.1
    assert not alive(int((measured.folder / "grandchild").read_text()))


def test_a_job_that_never_starts_is_a_crash_with_its_reason(measured):
    measured.drive("--researcher", "search", "--launch", "sh -c 'echo no such partition; exit 3'",
                   "--experiments", 1)
    row = consistent(measured)[1]
    assert "before it started, by code 3: no such partition" in row["reason"]


def test_a_run_that_is_killed_for_its_memory_is_a_crash_and_the_driver_goes_on(measured):
    measured.drive("--researcher", "search", "--launch", "sh -c 'kill -9 $$'", "--experiments", 2)
    assert ["signal 9 (out of memory?)" in row["reason"] for row in consistent(measured)] == [
        False, True, True]


def test_runs_get_no_secrets_no_terminal_and_no_descriptors(measured):
    measured.env |= {"HF_TOKEN": "hf-very-secret", "OPENAI_API_KEY": "sk-very-secret",
                     "SOME_SETTING": "fine"}
    look = ("env > environment; readlink /proc/self/fd/0 > input; ls /proc/$$/fd > open; exec "
            + measured.launch)
    measured.drive("--researcher", "search", "--experiments", 1, "--launch",
                   f"sh -c '{look} \"$@\"' sh")
    seen = (measured.folder / "environment").read_text()
    assert "very-secret" not in seen and "SOME_SETTING=fine" in seen
    assert (measured.folder / "input").read_text().strip() == "/dev/null"
    inherited = {"0", "1", "2"} | {"10", "255"}      # the last two are the shell's own
    assert set((measured.folder / "open").read_text().split()) <= inherited


def test_a_disk_that_is_full_stops_it_cleanly_and_loses_nothing(measured):
    before = (measured.folder / "results.tsv").read_text()
    command = shlex.join(measured.command("--experiments", 1))
    process = subprocess.run(["bash", "-c", f"ulimit -f 0; exec {command}"], cwd=measured.folder,
                             env=measured.env | {"PYTHONDONTWRITEBYTECODE": "1"},
                             capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "File too large" in process.stderr and "what was logged is safe" in process.stderr
    assert (measured.folder / "results.tsv").read_text() == before
    assert consistent(measured)


def test_two_workers_finish_in_any_order_and_the_ledger_is_right(measured, llm):
    rates = itertools.count(1)
    server = llm([lambda h: h.reply(edit("LR = 0.02               # of each weight",
                                         f"LR = {0.02 + next(rates) / 50}", "a rate"))])
    measured.drive("--experiments", 4, "--workers", 2, "--base-url", server.url)
    rows = consistent(measured)
    assert sorted(int(row["experiment"]) for row in rows)[:5] == [0, 1, 2, 3, 4]
    finished = [row["finished"] for row in rows]
    assert finished == sorted(finished), "the order of the log is the order of judgement"
