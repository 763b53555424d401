"""The driver with the real prepare.py and real runs. All its other tests have scripted runs."""

import json

from conftest import Handler

import autoresearch as ar


def test_a_first_start_measures_the_baseline_and_goes_on_with_search(lab):
    script = lab.folder / "autoresearch.py"
    script.write_text(script.read_text().replace("BASELINE_RUNS = 3 ", "BASELINE_RUNS = 2 "))
    output = lab.drive("--experiments", 1, "--data", lab.text, "--budget", 0.3, "--workers", 2)
    rows = lab.rows()
    assert (lab.folder / "results.tsv").read_text().splitlines()[0] == "\t".join(ar.COLUMNS)
    assert [row["by"] for row in rows] == ["baseline", "search"]
    assert len(rows[0]["runs"].split(",")) == 2 and rows[0]["status"] == "keep"
    assert "set ANTHROPIC_API_KEY" in output, "a line says how to connect an LLM"
    assert "baseline" in output and "1 experiments: " in output
    assert (lab.folder / "progress.svg").read_text().startswith("<svg")
    assert " -> " in rows[1]["description"]
    conditions = json.loads((lab.folder / "runs/conditions.json").read_text())
    assert conditions["torch"] and conditions["threads"] == 1 and conditions["train_tokens"] > 1e5


def test_a_start_without_data_ends_with_the_words_of_prepare_py(lab):
    output = lab.drive("--data", "/nowhere", code=1)
    assert "--data /nowhere" in output.splitlines()[-1] and not lab.rows()


def test_a_wrong_key_of_a_provider_is_named_before_the_baseline_runs(lab, llm):
    server = llm(["nothing"])
    server.RequestHandlerClass = type("Refusing", (Handler,), {"do_GET": lambda h: h.send(401, "")})
    url = f"{server.url}//api.openai.com/v1"
    assert "HTTP 401" in lab.drive("--data", lab.text, "--base-url", url, code=1)
    assert not (lab.folder / "runs/0000").exists() and not server.requests
