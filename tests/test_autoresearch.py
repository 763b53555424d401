"""The driver, through its front door: real subprocesses, real kills, a scripted LLM on loopback."""

import contextlib
import errno
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

import pytest
from conftest import TINY, Handler, edit

import autoresearch as ar

RATE = "LR = 0.02               # of each weight"
BETTER = edit(RATE, "LR = 0.06", "a higher rate")
WORSE = edit(RATE, "LR = 0.00001", "hardly any rate")
CRASH = edit("    return model", "    return 1 / 0", "a division")


def any_rate(comment: str = ""):
    """Answers that all differ, and are all worse."""
    numbers = itertools.count(1)
    return lambda handler: handler.reply(edit(RATE, f"LR = {next(numbers)}e-7{comment}", "hardly"))


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


def experiment(lab, number: int) -> dict:
    return json.loads((lab.folder / f"runs/{number:04d}/experiment.json").read_text())


# The judge


def kept_share(effect: float, longer: bool, tries: int = 5_000) -> float:
    """Simulate candidates better by `effect` noises; return the share that is kept."""
    rng, kept = random.Random(0), 0
    for _ in range(tries):
        incumbent = [rng.gauss(0, 1) for _ in range(3)]
        runs = []
        while (verdict := ar.judge(runs, incumbent, 1.0, longer)) == "again":
            runs.append(rng.gauss(-effect, 1))
        kept += verdict == "keep"
    return kept / tries


def test_the_judge_keeps_what_its_docstring_says(monkeypatch):
    promised = {name: [int(n) / 100 for n in re.findall(r"(\d+)%", shares)] for name, shares in
                re.findall(r"(more code|anything else|greedy)  (.*)", ar.judge.__doc__)}
    assert len(promised) == 3
    for name, shares in promised.items():
        monkeypatch.setattr(ar, "RUNS", 1 if name == "greedy" else 2)
        for effect, share in zip((0, 1, 2, 4), shares, strict=True):
            assert abs(kept_share(effect, name == "more code") - share) < 0.015


def test_a_gain_of_nothing_is_no_gain_and_not_a_number_never_wins():
    assert ar.judge([1.0], [1.0], 0.0, False) == "discard"
    assert ar.judge([float("nan")], [1.0], 0.1, False) == "discard"


def test_a_candidate_may_be_asked_for_more_runs_than_the_baseline(monkeypatch):
    monkeypatch.setattr(ar, "RUNS", ar.BASELINE_RUNS + 1)
    exp = ar.Experiment(1, "llm", runs=[{"val_bpb": 1.0}] * ar.RUNS)
    assert ar.judge(exp.scores, [2.0], 0.1, False) == "keep"


def test_comments_are_no_code():
    assert ar.code_lines("a = 1   # why\n\n# what\nb = (1 +\n     2)\n") == 2


def test_noise_is_pooled_over_the_newest_files_that_ran_more_than_once():
    assert ar.pooled_noise([[1.0, 3.0], [10.0], [5.0, 5.0, 8.0]]) == pytest.approx((8 / 3) ** 0.5)
    assert ar.pooled_noise([[1.0]]) == 0.0
    rows = [{"runs": "1.0,9.0"}] + [{"runs": "1.0,2.0"}, {"runs": "1.0"}] * ar.NOISE_FILES
    assert ar.noise_of(rows) == pytest.approx(0.5 ** 0.5) and ar.noise_of(rows[:-2]) > 2


# The search


def test_search_finds_the_knobs_in_force_and_moves_them_in_their_own_way():
    source = ('"""\nV = 1.2.3\n"""\nA = 8 if CUDA else 2\nB = 2 ** 15  # x\nC = 0.95\nD = "x"\n'
              "e = 3\nF = A * 2\nG = 0\n")
    for cuda, a in (False, "2"), (True, "8"):
        texts = " ".join(text for text, _ in ar.search(random.Random(0), source, cuda))
        assert dict(re.findall(r"(\w+) (\S+) ->", texts)) == {"A": a, "B": "32768", "C": "0.95"}
    assert (ar.moved(4096, 0.1), ar.moved(4096, -0.1)) == (8192, 2048)
    assert ar.moved(7, 0.01) == 8 and ar.moved(7, -0.01) == 6 and ar.moved(1, -1) == 1
    assert 0.95 < ar.moved(0.95, 0.5) < 1 and 0.5 < ar.moved(0.95, -0.5) < 0.95
    assert ar.moved(0.02, 0.5) == pytest.approx(0.02 * 2.718 ** 0.5, rel=0.01)


def test_search_always_finds_a_program_that_is_new():
    seen = {ar.screen(TINY)}
    for number in range(1, 60):
        candidates = ar.search(random.Random(number), TINY, False)
        text, source = next(c for c in candidates if ar.screen(c[1]) not in seen)
        seen.add(ar.screen(source))
        moves = re.findall(r"\w+ (\S+) -> ([^\s,]+)", text)
        assert moves and all(old != new for old, new in moves)


# The ledger and the prompt


def a_row(number: int, status: str = "discard", by: str = "llm", score: float = 1.5) -> dict:
    return dict(zip(ar.COLUMNS, [
        "abcdef0", f"{score:.6f}", "0.3", status, f"idea {number} " + "x" * 90, str(number), by,
        f"{score:.6f}", "7.770777", f"-0.0100 (-1.2 noise) against #{number // 9}", "60.0", "66.0",
        "100", "30", "2026-01-01T00:00:00+00:00"]))


def test_the_history_mostly_grows_at_its_end_and_is_bounded():
    rows = [a_row(0, "keep", "baseline")] + [
        a_row(i, "keep" if i % 40 == 0 else "crash" if i % 9 == 0 else "discard")
        for i in range(1, 301)]
    exps = {i: ar.Experiment(i, "llm", idea=f"because {i}" * (i > 0)) for i in range(301)}
    texts = ["".join(ar.history(rows[:n], exps, ar.HISTORY)) for n in range(1, 302)]
    grew = sum(b.startswith(a) for a, b in zip(texts, texts[1:]))
    assert grew >= 300 - 300 // ar.IDEAS - 300 // (ar.HISTORY // 2)
    assert len(texts[-1]) < 40_000
    assert all(f"#{i} keep" in texts[-1] for i in range(40, 301, 40))
    assert all(f"because {i}\n" in texts[-1] for i in range(301 - ar.IDEAS, 301))
    assert "because 200\n" not in texts[-1] and "7.770777" not in texts[-1]
    assert len(list(ar.history(rows, exps, 1))) < 5


def test_a_torn_last_line_is_cut_off_and_a_broken_one_is_named(measured, monkeypatch, capsys):
    monkeypatch.chdir(measured.folder)
    ledger = measured.folder / "results.tsv"
    whole = ledger.read_text()
    torn = whole + whole.splitlines()[1][:-3]
    ledger.write_text(torn)
    assert "baseline" in measured.drive("--experiments", 0)
    assert ledger.read_text() == torn, "the summary alone changes nothing: a driver may be at work"
    assert len(ar.read_ledger(repair=True)) == 1 and ledger.read_text() == whole
    assert "cut off a partly written last line" in capsys.readouterr().out
    ledger.write_text(whole + "what is this\n" + whole.splitlines(True)[1])
    assert "results.tsv line 3 is not a row" in measured.drive("--experiments", 0, code=1)
    assert "what is this" in ledger.read_text()


# A night


def test_a_first_start_measures_the_baseline_and_goes_on_with_search(lab):
    output = lab.drive("--experiments", 1, "--data", lab.text, "--budget", 0.3, "--workers", 2)
    rows = consistent(lab)
    assert (lab.folder / "results.tsv").read_text().splitlines()[0] == "\t".join(ar.COLUMNS)
    assert [row["by"] for row in rows] == ["baseline", "search"]
    assert len(rows[0]["runs"].split(",")) == 3 and rows[0]["status"] == "keep"
    assert "set ANTHROPIC_API_KEY" in output, "a line says how to connect an LLM"
    assert "baseline" in output and "1 experiments: " in output
    assert (lab.folder / "progress.svg").read_text().startswith("<svg")
    assert " -> " in rows[1]["description"]
    conditions = json.loads((lab.folder / "runs/conditions.json").read_text())
    assert conditions["torch"] and conditions["threads"] == 1 and conditions["train_tokens"] > 1e5


@pytest.mark.parametrize("wire", ["url", "anthropic_url"])
def test_an_llm_proposes_and_no_prompt_has_test_bpb_or_the_key(measured, llm, wire):
    server = llm([BETTER, WORSE, edit("BATCH = 8", "BATCH = 4"), WORSE])
    measured.env |= {"OPENAI_API_KEY": "sk-very-secret", "ANTHROPIC_API_KEY": "sk-very-secret"}
    output = measured.drive("--experiments", 2, "--base-url", getattr(server, wire))
    rows = consistent(measured)
    first = next(row for row in rows if row["description"] == "a higher rate")
    assert first["by"] == "llm" and first["status"] == "keep" and first["runs"].count(",") == 1
    assert int(first["input_tokens"]) == 100 and int(first["output_tokens"]) == 30
    assert "cached" in output
    saved = experiment(measured, int(first["experiment"]))
    assert saved["model"] == "scripted" and saved["idea"] == "It should help."
    assert (measured.folder / "runs/0001/response-0.json").exists()
    for path, headers, body in server.requests:
        sent = json.dumps(body)
        assert not any(row["test_bpb"][:6] in sent for row in rows)
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


def test_a_prompt_tells_what_a_run_did_and_between_keeps_begins_as_the_last(measured, llm):
    server = llm([any_rate()])
    measured.drive("--experiments", 4, "--base-url", server.url)
    prompts = ["".join(m["content"] for m in body["messages"]) for _, _, body in server.requests]
    assert len(prompts) >= 4
    for a, b in zip(prompts, prompts[1:]):
        assert len(os.path.commonprefix([a, b])) > 0.8 * len(a)
    assert "; 10 steps, 1000 tokens/s\n    why: It should help." in (
        prompts[-1])
    assert "the newest took 10 steps, 1000 tokens/s" in prompts[-1] and "torch: " in prompts[-1]


def test_what_is_wrong_goes_back_twice_at_most_and_a_crash_with_its_log(measured, llm):
    server = llm(["nonsense", edit(RATE, "LR = = 1"), CRASH])
    output = measured.drive("--experiments", 1, "--base-url", server.url)
    row = consistent(measured)[1]
    assert row["status"] == "crash" and "goes back to the LLM" in output
    assert row["val_bpb"] == row["test_bpb"] == "0.000000"
    assert int(row["input_tokens"]) == 300, "what led to nothing was paid for as well"
    assert (measured.folder / "runs/0001/prompt-2.md").exists()
    assert (measured.folder / "runs/0001/reply-2.md").read_text() == CRASH


def test_a_crash_goes_back_with_the_end_of_its_log_as_data(measured, llm):
    server = llm([CRASH, BETTER])
    measured.drive("--experiments", 1, "--base-url", server.url)
    said = [body["messages"][-1]["content"] for _, _, body in server.requests]
    said = next(text for text in said if "ZeroDivisionError" in text)
    assert "as data" in said and not re.search(r"[\x00-\x09\x0b-\x1f]", said)
    assert max(map(len, said.splitlines())) < 250
    assert consistent(measured)[1]["description"] == "a higher rate"


def test_a_whole_file_written_for_an_older_incumbent_is_asked_for_again(measured, llm):
    def whole(handler):
        time.sleep(1)       # the other, which takes 4 s, has the accelerator by then
        handler.reply(f"DESCRIPTION: all new\n\n```python\n{TINY.replace('16', '17')}```\n")

    measured.train.write_text(TINY + "# sleep 2\n")
    for path in measured.folder.glob("runs/0000/*"):
        path.write_text(path.read_text().replace(json.dumps(TINY)[1:-1],
                                                 json.dumps(TINY + "# sleep 2\n")[1:-1])
                        if path.suffix == ".json" else TINY + "# sleep 2\n")
    server = llm([BETTER, whole])
    output = measured.drive("--experiments", 2, "--base-url", server.url)
    assert "the incumbent has changed since" in output
    consistent(measured)


# An LLM in a bad mood


def silent(handler):
    time.sleep(60)


def status(code: int, words: str = "no"):
    def answer(handler):
        time.sleep(0.5)     # later than a good reply that is on its way
        handler.send(code, {"error": {"message": words}})
    return answer


@pytest.fixture
def hasty(measured):
    """A lab with a budget of 2 s, so that an accelerator is idle after 0.4 s."""
    conditions = measured.folder / "runs/conditions.json"
    conditions.write_text(conditions.read_text().replace("60.0", "2.0"))
    return measured


@pytest.mark.parametrize("mood", [silent, status(500), status(402), "nonsense"])
def test_search_has_an_accelerator_that_the_llm_leaves_idle(hasty, llm, mood):
    first = [] if mood is silent or mood == "nonsense" else [WORSE]     # else it is a refusal
    output = hasty.drive("--experiments", 3, "--base-url", llm([*first, mood]).url)
    rows = consistent(hasty)
    assert len(rows) >= 4 and "search" in [row["by"] for row in rows]
    if first:
        assert 1 <= output.count("asked again at times") <= 2, "said once an outage"


def test_a_last_reply_that_comes_too_late_makes_no_further_row(measured, llm):
    conditions = measured.folder / "runs/conditions.json"
    conditions.write_text(conditions.read_text().replace("60.0", "10.0"))   # idle after 2 s

    def late(handler):
        while len(measured.rows()) < 2:     # the search's is the one that was asked for
            time.sleep(0.001)
        handler.reply("nonsense")

    measured.drive("--experiments", 1, "--base-url", llm(["nonsense", "nonsense", late]).url)
    assert [row["by"] for row in consistent(measured)] == ["baseline", "search"]


def test_a_model_that_never_fits_is_asked_less_and_less_often(hasty, llm):
    server = llm(["nonsense"])
    process = hasty.start("--base-url", server.url)
    hasty.wait_for(lambda: len(server.requests) > 3, "requests")
    time.sleep(1)
    process.terminate()
    process.communicate(timeout=60)
    assert len(server.requests) < 12, "and not hundreds"


def test_a_refusal_after_a_good_reply_is_an_outage_and_ends(measured, llm):
    server = llm([WORSE, status(402, "no credit"), status(402, "no credit"), any_rate()])
    output = measured.drive("--experiments", 2, "--base-url", server.url)   # so only one asks on
    assert output.count("no credit") == 1 and "it answers again" in output
    assert [row["by"] for row in consistent(measured)].count("llm") == 2


def test_a_first_refusal_ends_the_driver_with_the_servers_words(measured, llm):
    measured.env |= {"OPENAI_API_KEY": "sk-very-secret"}
    server = llm([status(401, "no: sk-very-secret")])
    output = measured.drive("--base-url", server.url, code=1)
    assert "HTTP 401" in output.splitlines()[-1] and "sk-very-secret" not in output
    assert len(consistent(measured)) == 1


def test_a_wrong_key_of_a_provider_is_named_before_the_baseline_runs(lab, llm):
    server = llm(["nothing"])
    server.RequestHandlerClass = type("Refusing", (Handler,), {"do_GET": lambda h: h.send(401, "")})
    url = f"{server.url}//api.openai.com/v1"
    assert "HTTP 401" in lab.drive("--data", lab.text, "--base-url", url, code=1)
    assert not (lab.folder / "runs/0000").exists() and not server.requests


def test_a_prompt_that_is_too_long_gets_half_of_the_history(measured, llm):
    server = llm([WORSE, status(400, "maximum context length is 8192 tokens"), any_rate()])
    output = measured.drive("--experiments", 2, "--base-url", server.url)
    assert f"gets {ar.HISTORY // 2} experiments" in output
    assert len(consistent(measured)) == 3


def test_what_a_night_may_cost_is_bounded_and_search_goes_on(hasty, llm):
    server = llm([any_rate()])
    output = hasty.drive("--experiments", 4, "--tokens", 200, "--base-url", server.url)
    assert len(server.requests) <= 3 and "tokens are used (--tokens)" in output
    assert "search" in [row["by"] for row in consistent(hasty)]


def cut(handler):
    handler.reply("DESCR", choices=[{"message": {"content": "DESCR"}, "finish_reason": "length"}])


@pytest.mark.parametrize("second", [cut, status(400, "max_tokens: at most 8192")])
def test_a_cut_reply_is_asked_for_once_more_with_more_room(measured, llm, second):
    server = llm([cut, cut, second, second, *[cut] * (second is not cut), BETTER])
    measured.drive("--experiments", 1, "--base-url", server.url)
    bodies = [json.dumps(body) for _, _, body in server.requests]
    assert str(ar.MORE_ROOM) not in bodies[0] and str(ar.MORE_ROOM) in "".join(bodies[1:4])
    assert sum(str(ar.MORE_ROOM) in body for body in bodies) <= 4
    row = consistent(measured)[1]
    assert row["description"] == "a higher rate" and int(row["input_tokens"]) >= 200


# What a person does


def test_a_persons_edit_becomes_a_candidate_and_is_saved_first(measured):
    mine = TINY.replace("LR = 0.02", "LR = 0.06")
    measured.train.write_text(mine)
    output = measured.drive("--experiments", 1, "--researcher", "search")
    row = consistent(measured)[1]
    assert row["by"] == "human" and "train.py was edited" in output
    assert (measured.folder / "runs" / "0001" / "train.py").read_text() == mine


@pytest.mark.parametrize("researcher", ["search", "llm"])
def test_an_edit_made_while_it_runs_is_the_next_candidate(measured, llm, researcher):
    # Of two experiments the edit is the last; the draft that waits meanwhile is in vain.
    flags = [2, "--base-url", llm([any_rate("  # sleep 2")]).url] if researcher == "llm" else [3]
    process = measured.start("--researcher", researcher, "--experiments", *flags)
    measured.wait_for(lambda: list(measured.folder.glob("runs/000[1-9]/run-0.log")), "a run")
    mine = TINY.replace("LR = 0.02", "LR = 0.0707")
    measured.train.write_text(mine)
    assert process.wait(timeout=90) == 0
    rows = consistent(measured)
    by = [row["by"] for row in rows]
    assert by.index("human") == (2 if researcher == "llm" else by.index("human"))
    number = int(rows[by.index("human")]["experiment"])
    assert (measured.folder / "runs" / f"{number:04d}" / "train.py").read_text() == mine


@pytest.mark.parametrize("flags, said", [
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--budget", "0"], "--budget has to be at least 0.1"), (["--budget", "x"], "invalid float"),
    (["--experiments", "-1"], "at least 0"), (["--workers", "0"], "--workers has to be at least 1"),
    (["--researcher", "llm"], "needs ANTHROPIC_API_KEY"), (["--data", "/nowhere"], "/nowhere"),
    (["--launch", "srunx -N1"], "no program srunx"), (["--launch", "'srun"], "launch")])
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
    assert "was measured with budget 60.0 and this start has 0.4" in output
    assert not (measured.folder / "runs/0001").exists(), "before anything is proposed"
    output = measured.drive("--launch", "", code=1)
    assert "was measured with data scripted and this start has text0" in output
    assert len(consistent(measured)) == 1


def test_a_second_driver_in_the_same_folder_is_refused(measured):
    first = measured.start("--researcher", "search")
    measured.wait_for(lambda: list(measured.folder.glob("runs/0001/run-0.log")), "the first run")
    assert "another driver works in this folder" in measured.drive(code=1)
    first.terminate()
    first.communicate(timeout=60)


def test_a_file_system_without_locks_gets_a_warning(monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(ar.fcntl, "flock", no_locks)
    ar.lock_folder(None)
    assert "this file system has no locks" in capsys.readouterr().out


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_runs_and_prints_the_summary(measured, sign):
    measured.train.write_text(TINY.replace("LR = 0.02", "LR = 0.03  # sleep 100"))
    process = measured.start("--researcher", "search")
    measured.wait_for(lambda: list(measured.folder.glob("runs/0001/run-0.log")), "a run")
    process.send_signal(sign)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + sign and "0 experiments: 0 kept" in output
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


# Claims


def test_the_incumbent_runs_once_more_after_many_discards_in_a_row(measured, llm):
    output = measured.drive("--experiments", ar.RECHECK + 1, "--base-url", llm([any_rate()]).url)
    assert output.count(f"{ar.RECHECK} discards in a row") == 1
    base = experiment(measured, 0)
    assert len(base["runs"]) == 4
    assert consistent(measured)[0]["runs"].count(",") == 2, "its row stays as it was"


def test_a_gain_is_confirmed_on_fresh_seeds_and_a_kill_wastes_no_run(measured, llm):
    assert "nothing was kept" in measured.drive("--confirm", 2, code=1)
    measured.drive("--experiments", 1, "--base-url", llm([BETTER]).url)
    assert "--confirm" in measured.drive("--experiments", 0)
    before = measured.rows()
    best = measured.folder / "runs/0001/train.py"
    best.write_text(best.read_text() + "# sleep 1\n")
    process = measured.start("--confirm", 2)
    measured.wait_for(lambda: experiment(measured, 0)["fresh"].get("1"), "a run")
    process.kill()
    process.communicate()
    output = measured.drive("--confirm", 2)
    assert "confirmed on 2 fresh seeds" in output and "researcher" not in output
    state = json.loads((measured.folder / "runs/confirmed.json").read_text())
    assert len(state["baseline_runs"]) == len(state["incumbent_runs"]) == state["n"] == 2
    assert state["gain"] == pytest.approx(0.1, abs=0.05) and state["error"] > 0
    assert len(experiment(measured, 0)["runs"]) == 3 and experiment(measured, 0)["tries"] == 5
    assert measured.rows() == before, "the ledger stays as it is"
    assert "confirmed on 2 fresh seeds" in (measured.folder / "progress.svg").read_text()
    measured.drive("--experiments", 1, "--base-url", llm([edit("LR = 0.06", "LR = 0.1")]).url)
    assert "as selected" in (measured.folder / "progress.svg").read_text()


def test_a_machine_that_has_changed_its_speed_since_the_verdict_is_noticed():
    runs = [{"val_bpb": 1.0, "num_tokens": tokens, "train_seconds": 10} for tokens in (90, 110, 80)]
    assert ar.Experiment(7, "llm", runs=runs[:2]).drift == ""
    assert "#7 now trains on -20% tokens/s" in ar.Experiment(7, "llm", runs=runs).drift
    assert ar.Experiment(7, "llm", runs=[*runs, runs[0]]).drift == "", "10% is no change"
    assert ar.Experiment(0, "baseline", runs=runs).drift == "", "its verdict took three runs"


# Kills

# Starts the driver again and again, each time in a fresh copy of the folder `start`, and kills it
# before its first write, before its second, and so on; then starts it once more, to its end.
KILLER = """
import itertools, os, pathlib, shutil, signal, sys
import autoresearch as ar

def drive(folder, writes):
    pid = os.fork()
    if pid == 0:
        ar.__file__ = str(folder / "autoresearch.py")
        left = itertools.count(writes, -1)
        def dying(real):
            def call(*args, **more):
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **more)
            return call
        os.replace, os.fsync = dying(os.replace), dying(os.fsync)
        os._exit(ar.main())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for writes in range(100):
    folder = pathlib.Path(f"killed-{writes:02d}").resolve()
    shutil.copytree("start", folder)
    code = drive(folder, writes)
    if code == 0:
        break
    assert code == -9
    if len((folder / "results.tsv").read_text().splitlines()) < 3:
        assert drive(folder, -1) == 0
"""


def test_killed_before_any_write_of_a_keep_it_goes_on_without_loss(measured, llm, tmp_path):
    server = llm([BETTER])
    (measured.folder / "killer.py").write_text(KILLER)
    shutil.copytree(measured.folder, tmp_path / "copy")
    (tmp_path / "copy").rename(measured.folder / "start")
    command = measured.command("--experiments", 1, "--base-url", server.url)
    subprocess.run([command[0], "killer.py", *command[2:]], cwd=measured.folder, env=measured.env,
                   timeout=140, check=True, capture_output=True)
    killed = sorted(measured.folder.glob("killed-*"))
    assert len(killed) > 20
    for folder in killed:
        measured.folder = folder
        rows = consistent(measured)
        assert [row["status"] for row in rows] == ["keep", "keep"] or folder != killed[-1]
        assert rows[1]["description"] == "a higher rate" and rows[1]["status"] == "keep"
        kept = experiment(measured, int(rows[1]["experiment"]))
        assert len(kept["runs"]) == 2 and kept["tries"] <= 3, "only the run in progress is lost"
    paid = len(server.requests) / len(killed)
    assert paid < 3, "what has reached the disk is not paid for again"


def test_a_kill_between_the_last_baseline_run_and_its_row_wastes_no_run(measured):
    (measured.folder / "results.tsv").unlink()
    measured.drive("--experiments", 1)
    assert [row["by"] for row in consistent(measured)] == ["baseline", "search"]
    assert experiment(measured, 0)["tries"] == 3


def test_without_its_ledger_a_folder_begins_with_the_baseline_and_an_edit_waits(measured):
    (measured.folder / "results.tsv").unlink()
    shutil.rmtree(measured.folder / "runs/0000")
    mine = ar.Experiment(1, "human", "mine", source=TINY.replace("LR = 0.02", "LR = 0.06"))
    (measured.folder / "runs/0001").mkdir()
    (measured.folder / "runs/0001/experiment.json").write_text(json.dumps(vars(mine)))
    measured.drive("--experiments", 1)
    assert [row["by"] for row in consistent(measured)] == ["baseline", "human"]


def test_a_candidate_under_which_the_driver_died_twice_is_a_crash(measured):
    measured.train.write_text(TINY.replace("LR = 0.02", "LR = 0.03  # sleep 100"))
    for number in range(2):
        process = measured.start("--researcher", "search", start_new_session=True)
        measured.wait_for((measured.folder / f"runs/0001/run-{number}.log").exists, "a run")
        process.kill()
        process.communicate()
        subprocess.run(["pkill", "-f", str(measured.folder)], check=False)
    measured.drive("--experiments", 1, "--researcher", "search")
    row = consistent(measured)[1]
    assert row["status"] == "crash" and "died 2 times under it" in row["reason"]


def test_killed_at_random_instants_with_two_workers_it_keeps_every_row(measured):
    rng, before = random.Random(4), []
    for _ in range(5):
        process = measured.start("--researcher", "search", "--workers", 2, start_new_session=True)
        time.sleep(rng.uniform(0.2, 2))
        process.kill()
        process.communicate()
        rows = measured.rows()
        assert [row["experiment"] for row in rows[:len(before)]] == before, "no row was lost"
        before = [row["experiment"] for row in rows if row["finished"]]
    measured.drive("--researcher", "search", "--workers", 2, "--experiments", 2)
    rows = consistent(measured)
    assert len(rows) >= len(before) + 2


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


def test_runs_get_no_secrets_and_no_descriptors(measured):
    measured.env |= {"HF_TOKEN": "hf-very-secret", "OPENAI_API_KEY": "sk-very-secret",
                     "SOME_SETTING": "fine"}
    look = ("env > environment; ls /proc/$$/fd > open; exec " + measured.launch)
    measured.drive("--researcher", "search", "--experiments", 1, "--launch",
                   f"sh -c '{look} \"$@\"' sh")
    seen = (measured.folder / "environment").read_text()
    assert "very-secret" not in seen and "SOME_SETTING=fine" in seen
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
    assert len(rows) == 5 and {row["by"] for row in rows} == {"baseline", "llm"}
    finished = [row["finished"] for row in rows]
    assert finished == sorted(finished), "the order of the log is the order of judgement"
