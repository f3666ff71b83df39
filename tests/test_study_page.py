"""The study's page: verdicts follow from paired intervals and nothing else, and missing cells are said."""

import json
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = runpy.run_path(str(ROOT / "tools" / "study_page.py"))
DEEP = "Meta-policies degrade at specific preferences"


def row(worst, mean, seeds):
    """The mean rises a little faster with the seed than the worst, so that intervals have a width."""
    measured = {"worst": (worst, 0.001), "mean": (mean, 0.002), "control": (0.9, 0.0)}
    lists = {f"{name}_{split}": [at + by * s for s in range(seeds)] for split in ("train", "test") for name, (at, by) in measured.items()}
    cost = dict.fromkeys(("steps", "steps_path", "evaluations"), 60)
    return {**lists, "seeds": list(range(200, 200 + seeds)), "cost": cost, "forwards_per_token": 1, "category": "x"}


def record(dips, seeds=10):
    """`dips` is per relationship how far the worst of logit mixing lies below its mean; that of `conditioned` is .1."""
    cells = {
        name: {"experts logit": row(0.9 - dip, 0.9, seeds), "conditioned": row(0.8, 0.9, seeds), "bridge": row(-597.0, 0.5, seeds)}
        for name, dip in dips.items()
    }
    study = {"relationships": {name: {} for name in dips}, "parts": {"exact": {}, "sampled": {}}}
    return {"figures": {"study_cells_missing": 4}, "cells_declared": 40, "study": study, "cells": {"exact": cells}}


@pytest.fixture
def page(tmp_path, monkeypatch):
    def of(found):
        file = tmp_path / "study.json"
        file.write_text(json.dumps(found))
        monkeypatch.setitem(PAGE["load"].__globals__, "RESULTS", file)
        return PAGE

    return of


@pytest.mark.parametrize(
    ("dips", "seeds", "verdict"),
    [
        ({"a": 0.4, "b": 0.3}, 10, "holds"),
        ({"a": 0.4, "b": 0.02}, 10, "holds when: a"),
        ({"a": 0.02, "b": 0.01}, 10, "does not hold: a, b"),
        ({"a": 0.4, "b": 0.3}, 9, "undecided"),
        ({"a": 0.1, "b": 0.1}, 10, "undecided"),
    ],
)
def test_a_verdict_is_that_of_the_intervals(page, dips, seeds, verdict):
    said = page(record(dips, seeds))["claims"]()
    assert f"### {DEEP}: {verdict}\n" in said
    assert ("9 seeds" in said) == (seeds == 9)


def test_missing_cells_are_counted_and_a_tiny_denominator_is_no_number(page):
    made = page(record({"a": 0.4}))
    assert "36 of 40 cells are measured" in made["state"]()
    assert "**4 are missing**" in made["state"]()
    assert "| `bridge` | < −10 |" in made["table"]()
    ElementTree.fromstring(made["picture"]())


def test_without_results_nothing_is_claimed(page, monkeypatch, tmp_path):
    monkeypatch.setitem(PAGE["load"].__globals__, "RESULTS", tmp_path / "none.json")
    assert PAGE["claims"]().count("undecided") == 6
    assert "Nothing is measured yet" in PAGE["table"]()
