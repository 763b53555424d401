"""Draws the README's picture again from the ledgers of the recorded nights: python tests/draw.py"""

import csv
import json
import sys
from pathlib import Path

BUDGET = 30     # seconds of each run in the recorded nights
TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import autoresearch as ar  # noqa: E402


def recorded(night: str) -> list[ar.Experiment]:
    """Return the experiments of a recorded night. Its runs share what its rows give in total."""
    with open(TESTS / f"{night}.tsv", encoding="utf-8", newline="") as ledger:
        return [experiment(row) for row in csv.DictReader(ledger, dialect="excel-tab")]


def experiment(row: dict[str, str]) -> ar.Experiment:
    scores = [float(bpb) for bpb in row["runs"].split(",") if bpb]
    runs = [{"val_bpb": bpb, "test_bpb": float(row["test_bpb"]),
             "train_seconds": float(row["train_seconds"]) / len(scores),
             "total_seconds": float(row["total_seconds"]) / len(scores)} for bpb in scores]
    return ar.Experiment(
        int(row["experiment"]), row["by"], row["description"], status=row["status"],
        reason=row["reason"], runs=runs, commit=row["commit"],
        input_tokens=int(row["input_tokens"]), output_tokens=int(row["output_tokens"]))


def picture() -> str:
    """Return the LLM's night, and that of the search beside it as its control."""
    confirmed = json.loads((TESTS / "night.json").read_text("utf-8"))
    return ar.progress_svg(recorded("night"), confirmed, BUDGET, recorded("search"))


if __name__ == "__main__":
    (TESTS / "night.svg").write_text(picture(), "utf-8")
