"""The driver, through its front door: real subprocesses, real kills, a scripted LLM on loopback."""

import asyncio
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
import types

import pytest
from conftest import TINY, edit

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
        monkeypatch.setattr(ar, "RUNS", 1 if name == "greedy" else ar.RUNS)
        for effect, share in zip((0, 1, 2, 4), shares, strict=True):
            assert abs(kept_share(effect, name == "more code") - share) < 0.015


def test_a_gain_of_nothing_is_no_gain_and_not_a_number_never_wins():
    assert ar.judge([1.0], [1.0], 0.0, False) == "discard"
    assert ar.judge([float("nan")], [1.0], 0.1, False) == "discard"


def test_a_candidate_may_be_asked_for_more_runs_than_the_baseline(monkeypatch):
    monkeypatch.setattr(ar, "RUNS", ar.BASELINE_RUNS + 1)
    exp = ar.Experiment(1, "llm", runs=[{"val_bpb": 1.0}] * ar.RUNS)
    assert ar.judge(exp.scores, [2.0], 0.1, False) == "keep"


def test_comments_are_no_code_and_change_no_fingerprint():
    same = TINY.replace("# channels", "# words").replace("WIDTH = 16", "WIDTH = (\n16)")
    assert ar.program_of(same) == ar.program_of(TINY)
    assert ar.program_of(TINY.replace("= 16", "= 17"))[0] != ar.program_of(TINY)[0]
    documented = TINY.replace("train():\n", "train():\n    'A text.'\n")
    assert ar.program_of(documented) == ar.program_of(TINY)


def test_noise_is_pooled_over_the_newest_files_that_ran_more_than_once():
    assert ar.pooled_noise([[1.0, 3.0], [10.0], [5.0, 5.0, 8.0]]) == pytest.approx((8 / 3) ** 0.5)
    assert ar.pooled_noise([[1.0]]) == 0.0
    groups = [[1.0, 9.0], *[[1.0, 2.0], [1.0]] * ar.NOISE_PROGRAMS]
    some = [a_judged(0, scores) for scores in groups]
    assert ar.noise_of(some) == pytest.approx(0.5 ** 0.5) and ar.noise_of(some[:-2]) > 2


# The ledger and the prompt


def a_judged(number: int, scores: list[float], status: str = "discard", **more) -> ar.Experiment:
    runs = [{"val_bpb": score, "test_bpb": 7.770777, "peak_memory_mb": 300, "train_seconds": 60,
             "total_seconds": 66, "num_steps": 10, "num_tokens": 60_000} for score in scores]
    return ar.Experiment(number, "llm", f"idea {number} " + "x" * 90, f"because {number}",
                         status=status, reason=f"-0.0100 against #{number // 9}", runs=runs,
                         counted=len(runs), **more)


def test_the_history_grows_at_its_end_and_is_bounded_and_never_has_test_bpb():
    lab = types.SimpleNamespace(conditions={"test_secret": 1}, program="", active=[], llm=None)
    lab.judged = [a_judged(i, [1.5], "keep" if i % 40 == 0 else "discard") for i in range(301)]
    lab.incumbent, lab.history = lab.judged[280], ar.HISTORY
    prompt = "".join(ar.make_prompt(lab, None))
    assert len(prompt) < 60_000 and "7.770777" not in prompt and "test_secret" not in prompt
    assert all(f"#{i} keep" in prompt for i in range(0, 301, 40))
    assert all(f"    why: because {i}\n" in prompt for i in range(301 - ar.HISTORY, 301))
    assert "#199 discard" not in prompt
    everything, lab.judged = lab.judged, lab.judged[:ar.HISTORY]
    for lab.incumbent in everything[:1]:
        shorter = "".join(ar.make_prompt(lab, None)[:-1])
        lab.judged = lab.judged[:-1]
        assert shorter.startswith("".join(ar.make_prompt(lab, None)[:-1]))


def test_what_a_row_shows_is_a_row_of_its_columns_alone():
    def row_of(exp):
        return dict(zip(ar.COLUMNS, ar.row_of(exp).split("\t"), strict=True))

    row, crash = row_of(a_judged(3, [1.25, 1.5])), row_of(a_judged(3, [1.25], "crash"))
    assert row["val_bpb"] == "1.375000" and row["runs"].count(",") == 1
    assert crash["val_bpb"] == crash["test_bpb"] == "0.000000"


@pytest.mark.parametrize("damage", [
    lambda text: text + text.splitlines()[1][:-3], lambda text: text.splitlines(True)[0],
    lambda text: "", lambda text: text.replace("keep", "discard")], ids=range(4))
def test_a_ledger_that_does_not_agree_with_runs_is_mended_and_the_old_one_is_saved(
        measured, monkeypatch, damage):
    ledger = measured.folder / "results.tsv"
    whole = ledger.read_text()
    damaged = damage(whole)
    ledger.write_text(damaged)
    assert "baseline" in measured.drive("--experiments", 0)
    assert ledger.read_text() == damaged, "the summary alone changes nothing: a driver may work"
    measured.drive("--experiments", 1, "--researcher", "search")
    rows = consistent(measured)
    assert ledger.read_text().startswith(whole) and len(rows) == 2
    assert not damaged or (measured.folder / "results.old").read_text() == damaged
    assert measured.train.stat().st_size


# A night


@pytest.mark.parametrize("wire", ["url", "anthropic_url"])
def test_an_llm_proposes_and_no_prompt_has_test_bpb_or_the_key(measured, llm, wire):
    server = llm([BETTER, WORSE, edit("BATCH = 8", "BATCH = 4"), WORSE])
    measured.env |= {"OPENAI_API_KEY": "sk-very-secret", "ANTHROPIC_API_KEY": "sk-very-secret"}
    output = measured.drive("--experiments", 2, "--base-url", getattr(server, wire))
    rows = consistent(measured)
    first = next(row for row in rows if row["description"] == "a higher rate")
    assert first["by"] == "llm" and first["status"] == "keep"
    assert len(first["runs"].split(",")) == ar.RUNS
    assert int(first["input_tokens"]) == 100 and int(first["output_tokens"]) == 30
    assert re.search(r"tokens: [\d,]+ in", output)
    saved = experiment(measured, int(first["experiment"]))
    assert saved["model"] == "scripted" and saved["why"] == "It should help."
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
            parts = body["messages"][0]["content"]
            assert ["cache_control" in part for part in parts][-2:] == [True, False]
    for file in measured.folder.rglob("*"):
        assert not file.is_file() or b"sk-very-secret" not in file.read_bytes()


def test_a_prompt_tells_what_a_run_did_and_between_keeps_begins_as_the_last(measured, llm):
    server = llm([any_rate()])
    measured.drive("--experiments", 4, "--base-url", server.url)
    prompts = ["".join(m["content"] for m in body["messages"]) for _, _, body in server.requests]
    assert len(prompts) >= 4
    for a, b in zip(prompts, prompts[1:]):
        assert len(os.path.commonprefix([a, b])) > 0.8 * len(a)
    assert "; 10 steps of none\n    why: It should help." in prompts[-1]
    assert "Its newest run: 10 steps of none" in prompts[-1] and "torch: " in prompts[-1]
    assert "The end of its newest log, as data: loss 3.5\n" in prompts[-1]


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
    output = hasty.drive("--experiments", 3, "--base-url", llm([mood]).url)
    rows = consistent(hasty)
    assert len(rows) >= 4 and "search" in [row["by"] for row in rows]
    if mood is not silent and mood != "nonsense":
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


def test_a_wrong_key_ends_the_start_with_the_servers_words(measured, llm, monkeypatch):
    measured.env |= {"OPENAI_API_KEY": "sk-very-secret"}
    server = llm([BETTER])
    refuse = status(401, "no: sk-very-secret")
    monkeypatch.setattr(server.RequestHandlerClass, "do_GET", refuse)
    output = measured.drive("--base-url", server.url, code=1)
    assert "HTTP 401" in output.splitlines()[-1] and "sk-very-secret" not in output
    assert len(consistent(measured)) == 1


def test_a_prompt_that_is_too_long_gets_half_of_the_history(measured, llm):
    server = llm([WORSE, status(400, "maximum context length is 8192 tokens"), any_rate()])
    measured.drive("--experiments", 2, "--base-url", server.url)
    assert [row["by"] for row in consistent(measured)] == ["baseline", "llm", "llm"]


def test_a_halved_history_grows_back_and_a_conversation_that_is_too_long_begins_anew(
        measured, monkeypatch):
    monkeypatch.chdir(measured.folder)
    args = types.SimpleNamespace(researcher="llm", confirm=None, experiments=None, tokens=None,
                                 budget=None, base_url="http://127.0.0.1:9/v1", model="m")
    lab, exp = ar.Lab(args), ar.Experiment(1, "llm", turns=["a reply", "a complaint"])

    async def answers(*call):
        return ar.Answer(BETTER, True, "stop", 1, 1, {})
    monkeypatch.setattr(ar, "in_thread", answers)
    for history in 50, 25, 12, 6, 3, 1:
        lab.note_absence(exp, "too long", True)
        assert lab.history == history and exp.turns == []
    lab.pause = 0
    asyncio.run(lab.ask(exp))
    assert lab.history == 2 and exp.turns == [BETTER.strip()]


def test_what_a_night_may_cost_is_bounded_and_search_goes_on(hasty, llm):
    server = llm([any_rate()])
    output = hasty.drive("--experiments", 4, "--tokens", 200, "--base-url", server.url)
    assert len(server.requests) <= 3 and "tokens are used (--tokens)" in output
    assert "search" in [row["by"] for row in consistent(hasty)]


def cut(handler):
    handler.reply("DESCR", choices=[{"message": {"content": "DESCR"}, "finish_reason": "length"}])


def test_a_cut_reply_goes_back_as_not_whole(measured, llm):
    server = llm([cut, cut, BETTER])
    output = measured.drive("--experiments", 1, "--base-url", server.url)
    assert "the reply is not complete (length)" in output
    said = [body["messages"][-1]["content"] for _, _, body in server.requests]
    assert any("is not complete (length): be brief" in text for text in said)
    row = consistent(measured)[1]
    assert row["description"] == "a higher rate" and int(row["input_tokens"]) >= 200


# What a person does


@pytest.mark.parametrize("to", ["comments", "the baseline"])
def test_a_comment_only_edit_stays_and_the_baseline_put_back_is_measured(measured, llm, to):
    measured.drive("--experiments", 1, "--base-url", llm([BETTER]).url)
    best = measured.train.read_text()
    mine = TINY if to == "the baseline" else best.replace("# channels", "# my words")
    measured.train.write_text(mine)
    output = measured.drive("--experiments", 1, "--researcher", "search")
    rows = consistent(measured)
    if to == "comments":
        assert "the same program with other comments" in output
        assert rows[-1]["by"] == "search"
        assert (measured.folder / "runs/0001/train.py").read_text() == mine
    else:
        assert rows[-1]["by"] == "human" and rows[-1]["status"] == "discard"
        assert measured.train.read_text() == best


def test_a_persons_edit_becomes_a_candidate_and_is_saved_first(measured):
    mine = TINY.replace("LR = 0.02", "LR = 0.06")
    measured.train.write_text(mine)
    output = measured.drive("--experiments", 1, "--researcher", "search")
    row = consistent(measured)[1]
    assert row["by"] == "human" and "train.py was edited" in output
    assert (measured.folder / "runs" / "0001" / "train.py").read_text() == mine


@pytest.mark.parametrize("researcher", ["search", "llm"])
def test_an_edit_made_while_it_runs_is_the_next_candidate(measured, llm, researcher):
    flags = ["--base-url", llm([any_rate("  # sleep 2")]).url] if researcher == "llm" else []
    process = measured.start("--researcher", researcher, "--experiments", 3, *flags)
    measured.wait_for(lambda: list(measured.folder.glob("runs/000[1-9]/run-0.log")), "a run")
    mine = TINY.replace("LR = 0.02", "LR = 0.0707")
    measured.train.write_text(mine)
    assert process.wait(timeout=90) == 0
    rows = consistent(measured)
    by = [row["by"] for row in rows]
    number = int(rows[by.index("human")]["experiment"])
    assert (measured.folder / "runs" / f"{number:04d}" / "train.py").read_text() == mine


@pytest.mark.parametrize("flags, said", [
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--budget", "0"], "--budget has to be at least 0.1"), (["--budget", "x"], "invalid float"),
    (["--experiments", "-1"], "at least 0"), (["--workers", "0"], "--workers has to be at least 1"),
    (["--researcher", "llm"], "needs ANTHROPIC_API_KEY"), (["--launch", "'srun"], "launch"),
    (["--launch", "srunx -N1"], "No such file or directory: 'srunx'")])
def test_bad_flags_get_one_clear_line(measured, flags, said):
    process = subprocess.run(measured.command(*flags), cwd=measured.folder, env=measured.env,
                             capture_output=True, text=True)
    assert process.returncode in (1, 2) and said in process.stderr
    assert "Traceback" not in process.stderr and len(process.stderr.splitlines()) <= 2


def test_missing_files_and_forbidden_places_get_one_clear_line(measured, llm):
    server = llm([BETTER])
    (measured.folder / "program.md").rename(measured.folder / "away.md")
    output = measured.drive("--base-url", server.url, code=1)
    assert "program.md cannot be read" in output.splitlines()[-1]
    shutil.rmtree(measured.folder / "runs")
    (measured.folder / "runs").write_text("a file in the way")
    output = measured.drive(code=1)
    assert "File exists: 'runs'" in output.splitlines()[-1]


def test_other_conditions_are_refused_by_name(measured):
    output = measured.drive("--budget", 0.4, code=1)
    assert "was measured with budget 60.0 and this start has 0.4" in output
    assert not (measured.folder / "runs/0001").exists(), "before anything is proposed"
    measured.env |= {"SCRIPTED_DATA": "another"}
    output = measured.drive(code=1)
    assert "was measured with data scripted and this start has another" in output
    assert len(consistent(measured)) == 1


def test_a_second_driver_in_the_same_folder_is_refused(measured):
    first = measured.start("--researcher", "search")
    measured.wait_for(lambda: list(measured.folder.glob("runs/0001/run-0.log")), "the first run")
    assert "another driver works in this folder" in measured.drive(code=1)
    first.terminate()
    first.communicate(timeout=60)


def test_a_file_system_without_locks_gets_a_warning(monkeypatch, capsys, tmp_path):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(ar.fcntl, "flock", no_locks)
    monkeypatch.chdir(tmp_path)
    ar.lock_folder()
    assert "this file system has no locks" in capsys.readouterr().out


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_runs_and_prints_the_summary(measured, sign):
    measured.train.write_text(TINY.replace("LR = 0.02", "LR = 0.03  # sleep 100"))
    process = measured.start("--researcher", "search")
    measured.wait_for(lambda: list(measured.folder.glob("runs/0001/run-0.log")), "a run")
    process.send_signal(sign)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + sign and "0 experiments: 0 kept" in output
    assert f"stopped by {sign.name}" in (measured.folder / "runs/log.txt").read_text()
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


@pytest.mark.parametrize("gone", ["runs", "runs/0000", ""])
def test_a_ledger_that_runs_does_not_account_for_is_refused_with_the_command_to_begin_anew(
        measured, gone):
    ledger = measured.folder / "results.tsv"
    if gone:
        shutil.move(measured.folder / gone, measured.folder / "away")
    else:
        ledger.write_text(ledger.read_text() + "what is this\n")
    before = ledger.read_text()
    output = measured.drive(code=1)
    assert "results.tsv has more lines" in output and "git checkout train.py" in output
    assert ledger.read_text() == before


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
    measured.wait_for(lambda: experiment(measured, 0)["fresh"].get("#1 at 60 s"), "a run")
    process.kill()
    process.communicate()
    output = measured.drive("--confirm", 2)
    assert "confirmed on 2 fresh seeds" in output and "researcher" not in output
    state = json.loads((measured.folder / "runs/confirmed.json").read_text())["60"]
    assert len(state["baseline_runs"]) == len(state["incumbent_runs"]) == state["n"] == 2
    assert state["gain"] == pytest.approx(0.1, abs=0.05) and state["error"] > 0
    assert len(experiment(measured, 0)["runs"]) == 3 and experiment(measured, 0)["tries"] == 5
    assert measured.rows() == before, "the ledger stays as it is"
    assert "confirmed on 2 fresh seeds" in (measured.folder / "progress.svg").read_text()
    measured.drive("--experiments", 1, "--base-url", llm([edit("LR = 0.06", "LR = 0.1")]).url)
    assert "as selected" in (measured.folder / "progress.svg").read_text()


def test_a_gain_is_confirmed_at_other_budgets_beside_the_nights_own(measured, llm):
    measured.drive("--experiments", 1, "--base-url", llm([BETTER]).url)
    conditions = (measured.folder / "runs/conditions.json").read_text()
    for budget in [], ["--budget", 30], ["--budget", 120]:
        output = measured.drive("--confirm", 1, *budget)
    assert (measured.folder / "runs/conditions.json").read_text() == conditions
    state = json.loads((measured.folder / "runs/confirmed.json").read_text())
    assert list(state) == ["60", "30", "120"] and state["120"]["budget"] == 120
    assert {run["val_bpb"] for run in state["30"]["baseline_runs"]}.isdisjoint(
        run["val_bpb"] for run in state["60"]["baseline_runs"]), "seeds that decided nothing"
    for text in output, (measured.folder / "progress.svg").read_text():
        assert "gain at 60 s" in text and "at 30 s +0." in text and "at 120 s +0." in text
    assert "budget 60.0 and this start has 30.0" in measured.drive("--budget", 30, code=1)


@pytest.mark.parametrize("workers, printed, gpus", [
    (2, "MIG-a,3", ["MIG-a", "3"]), (3, "MIG-a,3", ["MIG-a", "3", "MIG-a"]), (2, "", ["", ""])])
def test_workers_share_the_cores_and_the_gpus(workers, printed, gpus, monkeypatch, tmp_path):
    warning = "print('UserWarning: CUDA: is old', flush=True)"
    (tmp_path / "prepare.py").write_text(f"{warning}; print('{printed}', flush=True); {warning}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ar.os, "cpu_count", lambda: 12)
    env = asyncio.run(ar.environments(types.SimpleNamespace(workers=workers, launch=[])))
    assert [e["CUDA_VISIBLE_DEVICES"] for e in env] == gpus
    assert {e["TORCHINDUCTOR_COMPILE_THREADS"] for e in env} == {str(12 // workers)}


# What one machine, one reply or one file must not do


DEEP = {"a sum": f"X = {'1 + ' * 1000}1",
        "an elif": "if 0:\n    X = 1\n" + "elif 0:\n    X = 1\n" * 4000,
        "brackets": f"X = {'[' * 300}{']' * 300}", "a NUL": "X = 'a\0b'"}


@pytest.mark.parametrize("what", DEEP)
def test_a_reply_that_python_itself_fails_on_ends_no_start(measured, llm, what):
    server = llm([edit(RATE, f"{RATE}\n{DEEP[what]}", what), BETTER])
    output = measured.drive("--experiments", 1, "--base-url", server.url)
    assert len(consistent(measured)) == 2
    if what != "an elif":       # a newer Python reads as many as that
        assert "goes back to the LLM" in output and consistent(measured)[1]["status"] == "keep"


def test_a_program_that_is_not_utf_8_is_refused_in_words():
    with pytest.raises(ar.Unusable, match="does not parse: 'utf-8' codec"):
        ar.program_of("# fine\n# caf\udce9\n")


def test_a_program_that_python_itself_fails_on_is_named_at_the_start(measured):
    (measured.folder / "results.tsv").unlink()
    shutil.rmtree(measured.folder / "runs")
    measured.train.write_text(TINY + DEEP["a sum"])
    last = measured.drive("--experiments", 1, code=1).splitlines()[-1]
    assert "train.py: it does not parse: maximum recursion depth" in last


def test_with_two_workers_a_keep_never_undoes_another(measured, llm):
    """Both start from #0. The second to end is built again on the first, and runs again."""
    slow = edit("BATCH = 8", "BATCH = 4  # sleep 1.5", "a batch")
    server = llm([edit(RATE, "LR = 0.06", "a higher rate"), slow, any_rate()])
    measured.drive("--experiments", 2, "--workers", 2, "--base-url", server.url)
    rows = {row["description"]: row for row in consistent(measured)}
    assert rows["a higher rate"]["status"] == "keep"
    if (row := rows["a batch"])["status"] == "keep":
        assert "LR = 0.06" in measured.train.read_text()
    number = rows["a higher rate"]["experiment"]
    assert f"against #{number}" in row["reason"]
    assert "LR = 0.06" in (measured.folder / f"runs/000{row['experiment']}/train.py").read_text()


def test_a_duplicate_keeps_its_description(measured, llm):
    measured.drive("--experiments", 2, "--base-url", llm([WORSE]).url)
    row = consistent(measured)[2]
    assert row["description"] == "hardly any rate" and "the same program as #1" in row["reason"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null", '"high"'])
def test_a_report_without_a_finite_score_is_no_score(measured, llm, value):
    script = measured.folder / "prepare.py"
    bad = f"json.loads('{value}') if 'LR = 0.06' in source else score + 5"
    script.write_text(script.read_text().replace("test_bpb=score + 5", f"test_bpb={bad}"))
    measured.drive("--experiments", 1, "--base-url", llm([BETTER]).url)
    assert "no finite number" in consistent(measured)[1]["reason"]


def test_without_noise_nothing_is_divided_by_it(measured, llm):
    script = measured.folder / "autoresearch.py"
    script.write_text(script.read_text().replace("RUNS = 2 ", "RUNS = 1 ").replace(
        "BASELINE_RUNS = 3 ", "BASELINE_RUNS = 1 "))
    shutil.rmtree(measured.folder / "runs")
    (measured.folder / "results.tsv").unlink()
    measured.drive("--experiments", 1, "--base-url", llm([BETTER]).url)
    assert re.fullmatch(r"[+-]0\.\d{4} against #0", consistent(measured)[1]["reason"])


@pytest.mark.parametrize("change, to", [
    ("return fmean(scores)", "return max(scores)"), ("WIN = 1.0 ", "WIN = 3.0 "),
    ("noise * math.sqrt", "2 * noise * math.sqrt"), ("BASELINE_RUNS = 3 ", "BASELINE_RUNS = 4 ")])
def test_another_judge_does_not_go_on_with_the_ledger_of_this_one(measured, change, to):
    script = measured.folder / "autoresearch.py"
    changed = script.read_text().replace(change, to)
    assert changed != script.read_text()
    script.write_text(changed)
    ledger = (measured.folder / "results.tsv").read_text()
    assert "was measured with judge" in measured.drive("--experiments", 1, code=1)
    assert (measured.folder / "results.tsv").read_text() == ledger, "it is refused as it stands"


@pytest.mark.parametrize("name", ["conditions.json", "confirmed.json", "0000/experiment.json"])
@pytest.mark.parametrize("damage", ["", "[1", "null", "[7]"])
def test_a_damaged_file_in_runs_gets_one_line(measured, name, damage):
    (measured.folder / "runs" / name).write_text(damage)
    output = measured.drive("--experiments", 1, "--researcher", "search", code=1)
    last = output.splitlines()[-1]
    assert name in output and "begin anew: d=old/$(date +%s); mkdir -p $d; mv results.tsv" in last


def test_an_experiment_that_cannot_be_read_keeps_its_number_and_its_folder(measured):
    of_another_version = vars(ar.Experiment(7, "llm", turns=[BETTER])) | {"other": 1}
    for number, text in (7, json.dumps(of_another_version)), (8, "damaged"):
        (measured.folder / f"runs/000{number}").mkdir()
        (measured.folder / f"runs/000{number}/experiment.json").write_text(text)
    output = measured.drive("--experiments", 1, "--researcher", "search")
    assert re.search("runs/0007/experiment.json is skipped.*'other'", output)
    assert "runs/0008/experiment.json is skipped" in output
    assert (measured.folder / "runs/0008/experiment.json").read_text() == "damaged"
    assert [row["experiment"] for row in consistent(measured)] == ["0", "9"]


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_program_md_of_any_editor_is_read_and_its_absence_does_no_harm(measured, llm, code):
    def removes_it(handler):
        (measured.folder / "program.md").unlink()
        handler.reply("no proposal")

    (measured.folder / "program.md").write_text("Wärmer", code)
    server = llm([removes_it, BETTER])
    measured.drive("--experiments", 1, "--base-url", server.url)
    assert len(server.requests) > 1
    assert {body["messages"][0]["content"][-7:] for _, _, body in server.requests} == {"\nWärmer"}


@pytest.mark.parametrize("closed", [">&-", "2>&1 | true", "> /dev/full"])
def test_a_night_goes_on_without_its_terminal_and_leaves_a_trace(measured, closed):
    command = shlex.join(measured.command("--experiments", 2, "--researcher", "search"))
    subprocess.run(["bash", "-c", f"{command} {closed}"], cwd=measured.folder, env=measured.env,
                   check=False, timeout=60, capture_output=True)
    assert len(consistent(measured)) == 3
    assert "2 experiments: " in (measured.folder / "runs/log.txt").read_text()


def test_time_does_not_count_while_the_driver_stands_still(measured):
    script = measured.folder / "prepare.py"
    script.write_text(script.read_text().replace('"training", limit=60', '"training", limit=3'))
    measured.train.write_text(TINY.replace("LR = 0.02", "LR = 0.03  # sleep 1.5"))
    process = measured.start("--experiments", 1, "--researcher", "search")
    measured.wait_for((measured.folder / "runs/0001/run-0.log").exists, "a run")
    time.sleep(0.7)         # now it trains
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert consistent(measured)[1]["status"] != "crash"


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
        assert len(kept["runs"]) == ar.RUNS and kept["tries"] <= ar.RUNS + 1, "one run is lost"
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
if "--devices" in sys.argv: sys.exit()
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
    begin = """print(sys.argv[sys.argv.index("--key") + 1], '{"event": "begins"}', flush=True)"""
    (measured.folder / "prepare.py").write_text(DEAF.format(rest=f"{begin}\n{flood}"))
    measured.drive("--researcher", "search", "--experiments", 1)
    row = consistent(measured)[1]
    assert row["status"] == "crash" and "flooded its log" in row["reason"]
    assert (measured.folder / "runs/0001/run-0.log").stat().st_size < ar.LOG_LIMIT * 1.1
    assert not alive(int((measured.folder / "grandchild").read_text()))


FLAKY = """
[ -e {flag} ] || {{ touch {flag}; echo srun: error: node failure; exit 1; }}
exec "$@"
"""


def test_a_run_that_did_not_start_says_nothing_about_its_candidate(measured, llm):
    (measured.folder / "flaky.sh").write_text(FLAKY.format(flag="failed-once"))
    server = llm([BETTER])
    output = measured.drive("--experiments", 1, "--launch", "sh flaky.sh", "--base-url", server.url)
    assert "did not start: ended without a report, before it started, by code 1: srun" in output
    row = consistent(measured)[1]
    assert row["status"] == "keep" and row["description"] == "a higher rate"
    assert all(experiment(measured, 1)["turns"]) and len(experiment(measured, 1)["turns"]) == 1


def test_runs_that_never_start_end_the_driver_with_their_reason(measured):
    script = measured.folder / "autoresearch.py"
    pauses = f"FALSE_STARTS = {str(ar.FALSE_STARTS)[1:-1]}"
    assert pauses in script.read_text()
    script.write_text(script.read_text().replace(pauses, "FALSE_STARTS = 0, 0.1, 0.1"))
    output = measured.drive("--researcher", "search", "--launch", "sh -c 'kill -9 $$'", code=1)
    assert "3 runs in a row did not even start" in output.splitlines()[-1]
    assert "by signal 9 (out of memory?)" in output and len(consistent(measured)) == 1


TROUBLE = """
trap 'rm -f running' EXIT
n=$(ls runs/*/run-*.log | wc -l)
if [ $n -ge 6 ] && [ $n -le 9 ]; then export TROUBLE=1; fi
exec "$@"
"""


def test_if_the_incumbent_crashes_as_well_the_machine_is_to_blame(measured, llm):
    """Runs 6 to 9 of the folder crash, whatever they train."""
    (measured.folder / "trouble.sh").write_text(TROUBLE)
    output = measured.drive("--researcher", "search", "--launch", "sh trouble.sh",
                            "--experiments", 4)
    assert "the machine is in trouble: " in output
    status = [row["status"] for row in consistent(measured)]
    assert status.count("crash") == ar.CRASHES - 1 and len(status) == 5


def test_if_the_incumbent_runs_the_candidate_is_to_blame(measured, llm):
    crash = [edit(RATE, f"LR = {i} / 1 / 0") for i in range(1, 20)]
    output = measured.drive("--experiments", 1, "--base-url", llm(crash).url)
    assert "the incumbent, runs once more: 3 crashes in a row" in output
    assert consistent(measured)[1]["status"] == "crash" and "in trouble" not in output


def test_runs_get_no_secrets_and_no_descriptors(measured):
    measured.env |= {"HF_TOKEN": "hf-very-secret", "OPENAI_API_KEY": "sk-very-secret",
                     "SOME_SETTING": "fine"}
    look = "env > environment; ls /proc/$$/fd > open; exec"
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
    assert len(rows) == 5 and {"baseline", "llm"} <= {row["by"] for row in rows}
    finished = [row["finished"] for row in rows]
    assert finished == sorted(finished), "the order of the log is the order of judgement"
