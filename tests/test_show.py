import inspect
import re
import sys
import textwrap
from xml.etree import ElementTree

import pytest
from conftest import ROOT

import autoresearch as ar

SVG = "{http://www.w3.org/2000/svg}"


def dot(val, status="discard", by="llm", number=1, runs=1, **other):
    """A ledger row, as results.tsv gives it: all strings."""
    return {"val_bpb": f"{val:.6f}", "status": status, "by": by, "experiment": str(number),
            "runs": "" if status == "crash" else ",".join([f"{val:.6f}"] * runs),
            "description": "an idea", "test_bpb": f"{val + 0.02:.6f}", "reason": "because",
            "train_seconds": "60", "total_seconds": "80", "input_tokens": "500",
            "output_tokens": "30"} | other


BASELINE, KEPT = dot(1.45, "keep", "baseline", 0, 3), dot(1.40, "keep", runs=2)
CONFIRMED = {"incumbent": 1, "n": 5, "gain": 0.048, "error": 0.002}     # no test_gain
NOTHING = "nothing better than the baseline was kept"


def nodes(rows, kind, confirmed=None):
    return list(ElementTree.fromstring(ar.progress_svg(rows, confirmed or {})).iter(SVG + kind))


@pytest.mark.parametrize("noise", [0.0, 0.004])
@pytest.mark.parametrize("rows", [[], [BASELINE], [dot(0, "crash")] * 3, [BASELINE, dot(1.45)]])
def test_a_ledger_without_a_gain_is_drawn_and_says_so(rows, noise, monkeypatch):
    monkeypatch.setattr(ar, "pooled_noise", lambda groups: noise)
    assert NOTHING in [node.text for node in nodes(rows, "text", CONFIRMED)]
    report = ar.summary(rows, CONFIRMED, [])
    assert NOTHING in report if rows else "Nothing is measured yet" in report
    assert "±" not in report and "--confirm" not in report


@pytest.mark.parametrize("confirmed", [{}, CONFIRMED | {"incumbent": 7}, {"incumbent": 1}])
def test_a_gain_is_as_selected_until_it_is_confirmed_for_this_incumbent(confirmed, monkeypatch):
    monkeypatch.setattr(ar, "pooled_noise", lambda groups: 0.006)
    for given, title in ((confirmed, "gain 0.050 ± 0.005, as selected"),   # 0.006 √(1/3 + 1/2)
                         (CONFIRMED, "gain 0.048 ± 0.002, confirmed on 5 fresh seeds")):
        report = ar.summary([BASELINE, KEPT], given, [])
        drawn = [node.text for node in nodes([BASELINE, KEPT], "text", given)]
        assert title in drawn and title in report
        assert report.endswith("--confirm 5") == (given is confirmed)


def test_a_summary_counts_what_came_of_the_night_and_tokens_only_with_an_llm():
    rows = [BASELINE, KEPT, dot(1.5), dot(0, "crash", train_seconds="", total_seconds="")]
    report = ar.summary(rows, {}, [])
    assert "3 experiments: 1 kept, 1 discarded, 1 crashed; 75% of the time was" in report
    assert re.search(r"#1 .*1\.400000 .*an idea .*test_bpb 1\.420000", report)
    assert "tokens" not in report
    report = ar.summary(rows, {}, [ar.Experiment(1, "llm", calls=3, runs=[{}], cached_tokens=7),
                                   ar.Experiment(2, "llm", calls=1)])
    assert "2000 tokens in (7 cached), 120 out, 4 calls, 3 led to nothing" in report


def test_every_experiment_is_drawn_once_in_its_researchers_colour_and_outliers_at_an_edge(
        monkeypatch):
    monkeypatch.setattr(ar, "pooled_noise", lambda groups: 0.004)
    rows = [BASELINE, KEPT, dot(0, "crash", "search", val_bpb=""), dot(9.9),
            dot(1.2, by="<&\x00>")]
    edge = {n.text: int(n.get("y")) - 6 for n in nodes(rows, "text") if n.text in ("×", "▲")}
    assert edge == {"×": ar.HEIGHT, "▲": 0}
    dots = nodes(rows, "circle")
    assert [n.get("r") for n in dots] == ["7", "7", "4"] and dots[2].get("cy") == f"{ar.HEIGHT}"
    groups = {g.find(SVG + "text").text: g.get("fill") for g in nodes(rows, "g")}
    assert groups["● llm: 1 of 2 kept"] == ar.COLOURS["llm"] and "● <& >: 0 of 1 kept" in groups
    x, y = int(dots[1].get("cx")), int(dots[1].get("cy"))
    steps = [n.get("d") for n in nodes(rows, "path")]
    assert steps[0].endswith(f"H{x}") and steps[1:] == [f"M{x} {y}H{ar.WIDTH}"]
    for noise, thick in (0, "2"), (0.004, "14"), (1, "17"):     # visible, to scale, bounded
        monkeypatch.setattr(ar, "pooled_noise", lambda groups, noise=noise: noise)
        assert nodes(rows, "path")[0].get("stroke-width") == thick


def test_a_line_is_printed_above_the_live_one_which_a_log_does_not_get(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "5")
    for terminal, expected in ((False, "said\n"), (True, "\r\033[Klive\r\033[Ksaid\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        ar.show("live line")
        ar.say("said")
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("night", ["night", "search"])
def test_the_pictures_of_the_readme_are_what_their_ledgers_give(night, monkeypatch):
    tests = ROOT / "tests"
    monkeypatch.setattr(ar, "LEDGER", tests / f"{night}.tsv")
    confirmed = ar.read_json(tests / f"{night}.json")
    picture = ar.progress_svg(ar.read_ledger(repair=False), confirmed)
    assert picture == (tests / f"{night}.svg").read_text("utf-8")
    if night == "night":
        gain = f"{confirmed['gain']:.3f} ± {confirmed['error']:.3f}"
        assert f"**{gain}**" in (ROOT / "README.md").read_text("utf-8")


def test_the_loop_in_the_readme_is_the_code():
    loop = inspect.getsource(ar.Lab.research).split('"""\n')[1]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert textwrap.indent(textwrap.dedent(loop), "    ") in readme
