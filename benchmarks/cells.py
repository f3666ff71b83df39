"""What benchmark scripts read from a run directory: attainment per preference of the cells that a suite asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paretune.runs.store import Store
from paretune.runs.suite import run_suite

__all__ = ["attainment_W", "cells_of", "row_of"]


def cells_of(suite: Mapping[str, Any], root: Path, workers: int) -> list[dict[str, Any]]:
    """Run what is missing of the suite and read its cells, in its order; what the run leaves out fails here."""
    summary = run_suite(dict(suite), root=root, workers=workers)
    if summary.failed:
        raise SystemExit("\n".join(f"failed: {row.label}: {row.message}" for row in summary.failed))
    store = Store(root)
    found = [store.cell(row.key) for row in summary.cells]
    return [json.loads((path / "cell.json").read_text(encoding="utf-8")) for path in found if path is not None]


def attainment_W(cell: Mapping[str, Any], split: str = "train") -> np.ndarray:
    """(W,) attainment at the judged preferences; NaN where nothing could be gained."""
    values = cell["metrics"]["splits"][split]["attainment"]["per_preference"]
    return np.array([np.nan if value is None else value for value in values])


def row_of(cell: Mapping[str, Any], keep: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda cell: {}) -> dict[str, Any]:
    """One line of a committed result."""
    task, cost = cell["task"], cell["cost"]["total"]
    row = {"method": cell["method"]["name"], "rho": task["rho"], "objectives": task["objective_count"], "seed": cell["seed"]}
    for split in cell["metrics"]["splits"]:
        values = attainment_W(cell, split)
        row |= {f"worst_{split}": round(float(np.nanmin(values)), 4), f"mean_{split}": round(float(np.nanmean(values)), 4)}
    row |= {name: cost[name] for name in ("samples", "steps", "evaluations")} | {"forwards_per_token": cell["forwards_per_token"]}
    return {**row, **keep(cell)}
