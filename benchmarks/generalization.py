"""What holds on prompts that were not trained on: exact-v2, rho -.8, seeds 200 to 209, beside what can be known from the training prompts.

    python benchmarks/generalization.py --development | --best NAME [--root DIR] [--workers 1] [--seeds 10] [--parts NAME ...] [--out FILE]

Responses have two letters, as in the issue's table of 8, 32 and 128 prompts. Every candidate spends the same: the exact learner's steps, or
200,000 samples. `--development` takes seeds 10 to 19 and chooses the best candidate there; the judged seeds are for one run at the end, in
which `--best` names it. Figures of parts that are not run stay as FILE has them. Stopped, it goes on where it was.

    bridge   v2_bridge_worst       bridge, exact learner, training prompts: worst of seeds and preferences
    sampled  v2_sampled_worst      conditioned, sampled learner, 200,000 samples in all: the same; takes most of the time
    32       v2_test_worst_32      the chosen candidate on test prompts: mean over seeds of the worst preference, 32 training prompts
             v2_gap_closed_32      the share of the gap between the lines blind and posterior that it closes, of the same means
             v2_default_test_worst_32   the default, `conditioned`, as a comparison
    128      v2_test_worst_128     the chosen candidate with 128 training prompts; the committed parts 32 ("unlabelled") and 128 chose apart
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from cells import attainment_W, cells_of, row_of
from common import emit, write

TASK = {"name": "exact-v2", "rho": -0.8, "length": 2}
CANDIDATES: dict[str, dict[str, Any]] = {
    name: {"methods": ["conditioned"], "learner": {"name": "exact", **settings}}
    for name, settings in {
        "conditioned": {},
        "60 steps": {"steps": 60},
        "20 steps": {"steps": 20},
        "rate / 5": {"lr": 4e-3},
        "rate / 10": {"lr": 2e-3},
        "rate / 20": {"lr": 1e-3},
        "rate / 5, rank 4": {"lr": 4e-3, "rank": 4},
        "rank 4": {"rank": 4},
        "rank 2": {"rank": 2},
        "rank 1": {"rank": 1},
        "rank 2, 60 steps": {"rank": 2, "steps": 60},
        "unlabelled": {"unlabelled": 256},
        "unlabelled, own scores": {"unlabelled": 256, "own_scores": True},
        "unlabelled, own scores, rate / 5": {"unlabelled": 256, "own_scores": True, "lr": 4e-3},
        "all unlabelled, own scores, rate / 5": {"unlabelled": 512, "own_scores": True, "lr": 4e-3, "features": 2048, "ridge": 1e-3},
    }.items()
}
BRIDGE = {"methods": ["bridge"], "learner": {"name": "exact"}}
PARTS = ("bridge", "32", "128", "sampled")
SAMPLED = {"methods": ["conditioned"], "learner": {"name": "pg", "samples": 200_000}}


def worst(cells: list[dict[str, Any]], split: str) -> np.ndarray:
    """(seeds,) attainment at the worst judged preference."""
    return np.array([np.nanmin(attainment_W(cell, split)) for cell in cells])


def line(cells: list[dict[str, Any]], name: str) -> float:
    """Mean over seeds of a line's worst preference on test prompts."""
    return float(np.mean([min(cell["known"]["test"][name]) for cell in cells]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/generalization"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=10)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--development", action="store_true")
    which.add_argument("--best", choices=list(CANDIDATES), help="as --development chose it: judged results do not choose")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["bridge", "32", "128"])
    parser.add_argument("--dials", nargs="*", default=[], metavar="NAME=NUMBER", help="of the task, for a quicker look")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    first = 10 if given.development else 200
    seeds = list(range(first, first + given.seeds))
    dials = {name: float(value) if "." in value else int(value) for name, value in (dial.split("=") for dial in given.dials)}
    rows: list[dict[str, Any]] = []

    def cells(part: str, named: str, what: dict[str, Any], prompts: int) -> list[dict[str, Any]]:
        suite = {"name": "generalization", "tasks": [{**TASK, "prompt_count": prompts, **dials}], "seeds": seeds, **what}
        found = cells_of(suite, given.root, given.workers)
        for cell in found:
            lines = {f"{name}_test": round(min(values), 4) for name, values in cell["known"]["test"].items()}
            rows.append({"part": part, "candidate": named, "prompts": prompts, **row_of(cell, lambda _, lines=lines: lines)})
            print(rows[-1], flush=True)
        return found

    parts = ["32", "128"] if given.development else given.parts
    named = CANDIDATES if given.development else {given.best: CANDIDATES[given.best], "conditioned": CANDIDATES["conditioned"]}
    figures, kept = _known(given.out, parts) if given.out is not None and given.out.is_file() else ({}, [])
    best = given.best

    def told(**found: Any) -> None:
        """Written part by part, because all of it takes hours."""
        figures.update({f"v2_{name}": float(value) for name, value in found.items()})
        if given.out is not None:
            write(figures, given.out, best=best, seeds=seeds, dials=dials, rows=[*kept, *rows])

    if "bridge" in parts:
        told(bridge_worst=worst(cells("bridge", "bridge", BRIDGE, 32), "train").min())
    if "32" in parts:
        at_32: dict[str, list[dict[str, Any]]] = {}
        for name, what in named.items():
            at_32[name] = cells("32", name, what, 32)
            best = given.best or max(at_32, key=lambda name: worst(at_32[name], "test").mean())
            reached, blind = worst(at_32[best], "test").mean(), line(at_32[best], "blind")
            told(test_worst_32=reached, gap_closed_32=(reached - blind) / (line(at_32[best], "posterior") - blind))
        told(default_test_worst_32=worst(at_32["conditioned"], "test").mean())
    if "128" in parts:
        told(test_worst_128=worst(cells("128", best, CANDIDATES[best], 128), "test").mean())
    if "sampled" in parts:
        told(sampled_worst=worst(cells("sampled", "sampled", SAMPLED, 32), "train").min())
    emit(figures, out=given.out, best=best, seeds=seeds, dials=dials, rows=[*kept, *rows])


def _known(out: Path, parts: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of an earlier run, and its rows of the parts that are not run now."""
    earlier = json.loads(out.read_text(encoding="utf-8"))
    return earlier["figures"], [row for row in earlier["rows"] if row["part"] not in parts]


if __name__ == "__main__":
    main()
