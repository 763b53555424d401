import itertools
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT

import autoresearch as ar

SVG = "{http://www.w3.org/2000/svg}"
NOTHING = "nothing better than the baseline was kept"


def dot(bpb, status="discard", by="llm", number=1, runs=1, **other):
    """Return an experiment whose runs all had this score."""
    report = {"val_bpb": bpb, "train_seconds": 60 / runs, "total_seconds": 80 / runs}
    reports = [] if status == "crash" else [dict(report) for _ in range(runs)]
    return ar.Experiment(number, by, **{"description": "an idea", "status": status,
                                        "reason": "because", "runs": reports} | other)


BASELINE, KEPT = dot(1.45, "keep", "baseline", 0, 3), dot(1.40, "keep", runs=2)


def confirmed(budget=60.0, incumbent=1, gain=0.048):
    before, after = ([{"val_bpb": bpb}] * 5 for bpb in (1.46, 1.46 - gain))
    return {f"{budget:g}": {"budget": budget, "incumbent": incumbent, "n": 5, "gain": gain,
                            "error": 0.002, "baseline_runs": before, "incumbent_runs": after}}


def nodes(judged, kind, claims=None, *controls):
    picture = ElementTree.fromstring(ar.progress_svg(judged, claims or {}, 60, *controls))
    return list(picture.iter(SVG + kind))


def words(judged, claims=None):
    return ["".join(node.itertext()) for node in nodes(judged, "text", claims)]


@pytest.mark.parametrize("noise", [0.0, 0.004])
@pytest.mark.parametrize("judged", [[BASELINE], [BASELINE, dot(1.45)],
                                    [BASELINE, *(dot(0, "crash") for _ in range(3))]])
def test_a_night_without_a_gain_is_drawn_and_says_so(judged, noise, monkeypatch):
    monkeypatch.setattr(ar, "pooled_noise", lambda groups: noise)
    assert NOTHING in words(judged, confirmed())
    for lines in ar.summary(judged, confirmed(), 60), ar.summary([], {}, 0):
        assert lines[0] == NOTHING and "±" not in "".join(lines)


@pytest.mark.parametrize("claims", [{}, confirmed(incumbent=7)])
def test_a_gain_is_as_selected_until_it_is_confirmed_for_this_incumbent(claims, monkeypatch):
    monkeypatch.setattr(ar, "pooled_noise", lambda groups: 0.006)
    for lines in ar.summary([BASELINE, KEPT], claims, 60), words([BASELINE, KEPT], claims):
        assert lines[0] == "1.450 to 1.400 bits per byte"
        error = ar.standard_error(3, 2, 0.006)
        assert lines[1] == f"gain at 60 s +0.0500 ± {error:.4f}, as selected (see --confirm)"
        assert not any("confirmed on" in line for line in lines)


def test_each_budget_at_which_a_gain_was_confirmed_has_a_line():
    claims = confirmed(30, gain=-0.2) | confirmed() | confirmed(120, incumbent=7)
    for lines in words([BASELINE, KEPT], claims), ar.summary([BASELINE, KEPT], claims, 60):
        assert [line for line in lines if "gain" in line] == [
            "gain at 60 s +0.0480 ± 0.0020, confirmed on 5 fresh seeds",    # and not as selected
            "gain at 30 s -0.2000 ± 0.0020, confirmed on 5 fresh seeds"]


def test_the_gain_that_is_printed_is_that_of_the_judges_score(monkeypatch):
    base, best = dot(1.5, "keep", "baseline", 0, 3), dot(1.4, "keep", runs=2)
    base.runs[0]["val_bpb"], best.runs[0]["val_bpb"] = 1.8, 1.2
    monkeypatch.setattr(ar, "score", max)
    first, second, *_ = ar.summary([base, best], {}, 60)
    assert first.startswith("1.800 to 1.400") and second.startswith("gain at 60 s +0.4000 ±")


def test_what_the_newest_run_of_the_incumbent_did_has_a_line_if_prepare_py_told_it():
    base, best = dot(1.5, "keep", "baseline", 0, 3), dot(1.4, "keep", runs=2)
    best.runs[0]["did"] = "100 steps"
    assert not any("newest" in line for line in ar.summary([base, best], {}, 60))
    best.runs[1]["did"] = "310 steps, loss < 3"
    assert "the incumbent's newest run: 310 steps, loss < 3" in words([base, best])


def test_without_any_noise_no_error_is_invented():
    base, best = dot(1.5, "keep", "baseline", 0), dot(1.4, "keep", "llm", 1)
    assert ar.summary([base, best], {}, 60)[1].startswith("gain at 60 s +0.1000 ± nan, as sel")


def test_a_summary_counts_what_came_of_the_night_and_its_tokens():
    judged = [BASELINE, KEPT, dot(1.5, input_tokens=1000, output_tokens=70), dot(0, "crash")]
    assert ar.summary(judged, {}, 60)[-2:] == [
        "3 experiments: 1 kept, 1 discarded, 1 crashed", "4 minutes; tokens: 1,000 in, 70 out"]


@pytest.mark.parametrize("status, bpb", [("keep", "1.400000"), ("crash", "no score")])
def test_the_verdict_of_a_crash_has_no_score(status, bpb):
    line = ar.line_of(dot(1.4, status))
    assert re.fullmatch(rf"#1 +llm +{bpb}  {status} +an idea  \[because\]", line)


def test_every_experiment_is_a_dot_in_its_researchers_colour_and_outliers_are_at_an_edge():
    judged = [BASELINE, KEPT, dot(0, "crash", "search"), dot(9.9, by="human"), dot(1.42),
              dot(0.1)]
    base, kept, crash, far, pale, low = dots = nodes(judged, "circle")
    assert [node.get("class").split() for node in dots] == [[exp.by, exp.status] for exp in judged]
    assert crash.get("cy") == far.get("cy") == str(-ar.LINE)
    assert int(low.get("cy")) == ar.HEIGHT + ar.LINE
    assert 0 == int(base.get("cy")) < int(pale.get("cy")) < int(kept.get("cy")) <= ar.HEIGHT


def test_the_stairs_lead_over_the_kept_dots_to_the_end_in_the_colour_of_who_made_most_of_them():
    searched = [dot(1.46, by="search") for _ in range(9)]
    judged = [BASELINE, KEPT, *searched, dot(1.39, "keep", "human", 3), dot(1.38, "keep")]
    dots = [node for node in nodes(judged, "circle") if node.get("class").endswith("keep")]
    steps = "".join(f"H{node.get('cx')}V{node.get('cy')}" for node in dots)
    stairs, = nodes(judged, "path")
    assert stairs.get("d") == f"M0 0{steps}H{ar.WIDTH}"
    assert stairs.get("class") == "llm"


def test_a_control_is_drawn_in_the_same_frame_in_its_own_colour():
    control = [BASELINE, dot(1.6, "keep", "search", runs=2), dot(1.451, by="search")]
    places = [int(node.get("cy")) for node in nodes([BASELINE, KEPT], "circle", {}, control)]
    assert len(set(places)) == 4 and min(places) == 0 and max(places) == ar.HEIGHT
    assert nodes([BASELINE, KEPT], "path", {}, control)[0].get("class") == "search"


def test_luck_alone_makes_no_high_stairs():
    base, best = dot(1.5, "keep", "baseline", 0, 3), dot(1.499, "keep", runs=2)
    assert int(nodes([base, best], "circle")[1].get("cy")) < ar.LINE
    base.runs[0]["val_bpb"] = 1.52
    assert int(nodes([base, best], "circle")[1].get("cy")) < ar.HEIGHT / 5


DESCRIPTIONS = ["a longer window: twice", "</text><&\x00\ud800]]>", "", "W" * 300, "m" * 300,
                "TABLE_ROWS 131072 -> 65536, WIDTH 64 -> 32", "更大的词表" * 20, "🚀" * 50,
                "(all) of it", ": ; ,"]


def night(n, shape=1):
    """Return n experiments, every third of which is kept. In shape 9 the last gain most."""
    judged = [dot(1.5, "keep", "baseline", 0, 3)]
    for i in range(1, n):
        status, off = ("keep", 0) if i % 3 == 1 else ("discard", 0.01)
        judged.append(dot(1.49 - 0.3 * (i / n) ** shape + off, status, number=i, runs=2,
                          description=DESCRIPTIONS[i // 3 % len(DESCRIPTIONS)]))
    return judged


@pytest.mark.parametrize("shape, least", [(1, 4), (9, 2)])
@pytest.mark.parametrize("n", [3, 10, 40, 1000])
def test_no_label_lies_over_another_or_over_an_edge_or_the_stairs_of_its_night(n, shape, least):
    labels = []
    stairs = [(int(node.get("cx")), int(node.get("cy")))
              for node in nodes(night(n, shape), "circle") if node.get("class").endswith("keep")]
    for node in nodes(night(n, shape), "text"):
        if node.text.startswith("#"):
            wide = sum(9 if c.isascii() and not c.isupper() else 17 for c in node.text)
            x, y = int(node.get("x")), int(node.get("y"))
            left = x - wide if node.get("class") == "end" else x
            labels.append(y)
            assert -70 <= left and left + wide <= ar.WIDTH + 20 and y <= ar.HEIGHT + ar.LINE
            assert not any(left < x < left + wide and y - 15 < step < y + 3 for x, step in stairs)
    assert min(least, len(ar.kept(night(n))) - 1) <= len(labels) <= 9
    assert all(abs(a - b) >= 20 for a, b in itertools.combinations(labels, 2))


def test_every_gain_that_is_as_high_as_its_name_is_named():
    sizes = [0.01, 0.05, 0.001, 0.04]
    judged, bpb = [BASELINE], 1.45
    for number, size in enumerate(sizes, 1):
        bpb -= size
        judged.append(dot(bpb, "keep", number=number, description="Kneser-Ney: distributions"))
    named = [text for text in words(judged) if text.startswith("#")]
    assert named == ["#2 Kneser-Ney: distri...", "#4 Kneser-Ney: distri..."]


@pytest.mark.parametrize("n", [1, 3, 40, 1000])
@pytest.mark.parametrize("claims", [{}, confirmed() | confirmed(30)])
def test_a_picture_of_any_night_fits_a_readme_and_a_phone(n, claims):
    root, = nodes(night(n), "svg", claims)
    wide, high = map(int, root.get("viewBox").split()[2:])
    assert 1.6 <= wide / high <= 2.6
    assert 17 * 390 / wide > 9          # pixels of a letter on a phone
    assert high * 860 / wide <= 480
    left, top = map(int, root.get("viewBox").split()[:2])
    for node in nodes(night(n), "text", claims):
        assert left <= int(node.get("x")) <= left + wide and top < int(node.get("y")) < top + high


def test_the_axis_tells_where_the_stairs_begin_and_end():
    named = [node.text for node in nodes([BASELINE, dot(1.05, "keep")], "text")
             if node.get("x") == "-8"]
    assert named == ["1.450", "1.350", "1.250", "1.150", "1.050"]


def test_a_line_is_printed_above_the_live_one_which_a_log_does_not_get(
        capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(ar, "LOG", tmp_path / "log.txt")
    live, clear = (f"\r\033[K\033[?7l{text}\033[?7h" for text in ("l词🚀e line", ""))
    for terminal, expected in ((False, "said\n"), (True, f"{live}{clear}said\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        ar.show("l词🚀e line")        # it must not wrap, and some characters are two wide
        ar.say("said")
        assert capsys.readouterr().out == expected
    assert re.fullmatch(r"(\S+ \S+ said\n){2}", (tmp_path / "log.txt").read_text())


SAY = """import sys, autoresearch as ar
{}
ar.say('ü 词'), ar.show('live'), ar.say('2'), ar.say('3')"""
CLOSE = "sys.stdout.close()"


@pytest.mark.parametrize("shell, before, seen", [
    ("{} >&-", "", ""), ("{} >&- 2>&-", "", ""), ("{} > /dev/full", "", ""), ("{}", CLOSE, ""),
    ("{} | true", "import time; time.sleep(0.3)", ""),
    ("PYTHONIOENCODING=ascii {}", "", "? ?\n2\n3\n")])
def test_a_night_outlives_its_terminal_and_leaves_all_that_was_said_in_a_log(
        shell, before, seen, tmp_path):
    (tmp_path / "runs").mkdir()
    command = shell.format(f'{sys.executable} -c "$SAY"')
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SAY": SAY.format(before or "pass"),
                          "PYTHONUNBUFFERED": ""})      # what was not written waits for the exit
    assert (result.returncode, result.stdout, result.stderr) == (0, seen, "")
    log = (tmp_path / "runs" / "log.txt").read_text("utf-8")
    assert [line.split(" ", 2)[2] for line in log.splitlines()] == ["ü 词", "2", "3"]
