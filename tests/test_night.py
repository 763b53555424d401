"""The recorded night: its ledgers, its program, its replies, and what README says of it."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys

import draw
import pytest
from conftest import ROOT

import autoresearch as ar

TESTS = ROOT / "tests"
README = (ROOT / "README.md").read_text("utf-8")
REPLIES = json.loads((TESTS / "night_replies.json").read_text("utf-8"))
PROGRAM = (TESTS / "night.py").read_text("utf-8")


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> str:
    """The train.py that the night began with: its program, less the diff."""
    folder = tmp_path_factory.mktemp("night")
    (folder / "train.py").write_text(PROGRAM, "utf-8")
    shutil.copy(TESTS / "night.diff", folder)
    subprocess.run(["git", "apply", "--reverse", "night.diff"], cwd=folder, check=True)
    return (folder / "train.py").read_text("utf-8")


def test_the_diff_leads_from_the_train_py_of_the_night_to_its_program(before):
    first, *_, last = ar.kept(draw.recorded("night"))
    assert ar.program_of(before)[0][:7] == first.commit
    assert ar.program_of(PROGRAM)[0][:7] == last.commit


def test_the_recorded_replies_lead_from_the_train_py_of_the_night_to_its_program(before):
    verdicts = [exp.status for exp in sorted(draw.recorded("night"), key=lambda exp: exp.number)
                if exp.by == "llm"]
    source = before
    for reply, verdict in zip(REPLIES, verdicts, strict=True):
        changed = ar.apply_reply(reply, source)[1]      # raises Unusable if it does not fit
        source = changed if verdict == "keep" else source
    assert source == PROGRAM


def test_both_nights_had_the_same_judge_and_at_least_40_experiments():
    for night in "night", "search":
        judged = draw.recorded(night)
        assert len(judged) > 40 and judged[0].by == "baseline"
    assert {exp.by for exp in draw.recorded("search")} == {"baseline", "search"}


def test_the_picture_of_the_readme_is_what_its_ledgers_give():
    assert draw.picture() == (TESTS / "night.svg").read_text("utf-8")


def test_the_readme_has_the_confirmed_gains_at_each_budget():
    for night in "night", "search":
        for claim in ar.read_json(TESTS / f"{night}.json").values():
            assert f"{claim['gain']:+.3f} ± {claim['error']:.3f}" in README


def test_recorded_replies_are_served_as_an_endpoint_while_they_fit(measured, before):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, TESTS / "recorded_llm.py", str(port)]
    measured.env["OPENAI_BASE_URL"] = f"http://127.0.0.1:{port}/v1"
    measured.train.write_text(before, "utf-8")
    for path in measured.folder / "runs", measured.folder / "results.tsv":
        path.rename(path.with_name(f"{path.name}.old"))
    with subprocess.Popen(command) as endpoint:
        measured.wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "a port")
        output = measured.drive("--experiments", 2, "--budget", 5)
        endpoint.kill()
    assert f"researcher  recorded at http://127.0.0.1:{port}/v1 (no key)" in output
    assert (measured.folder / "runs/0001/reply-0.md").read_text("utf-8") == REPLIES[0]
    assert "34 replies are left, and the next one is for another incumbent" in output
