"""One policy conditioned on the preference, zero-shot at the judged preferences: exact-v1, rho -.8, seeds 100-102, both learners.

    python benchmarks/conditioned.py [--root DIR] [--workers 1] [--out benchmarks/results/conditioned.json]

One training from scratch: 120,000 samples, or 200 exact steps. The figures are those of one adapter per objective (`clp`); the other
structures that a preference may change stand beside them, by name. Attainment on training prompts, worst over preferences and seeds.
Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cells import attainment_W, cells_of, row_of
from common import emit

LEARNERS = {"sampled": {"name": "pg", "samples": 120_000}, "exact": {"name": "exact"}}
SUITE = {
    "tasks": [{"name": "exact-v1", "rho": -0.8}],
    "methods": [{"name": "conditioned", "structure": structure} for structure in ("clp", "panacea", "pblora")],
    "seeds": [100, 101, 102],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/conditioned"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    figures, rows = {}, []
    for kind, learner in LEARNERS.items():
        cells = cells_of({**SUITE, "name": f"conditioned-{kind}", "learner": learner}, given.root / kind, given.workers)
        rows += [{"learner": kind, **row_of(cell)} for cell in cells]
        for structure in ("clp", "panacea", "pblora"):
            worst = min(np.nanmin(attainment_W(cell)) for cell in cells if cell["method"]["structure"] == structure)
            figures[f"conditioned_{kind}_worst" + ("" if structure == "clp" else f"_{structure}")] = float(worst)
    emit(figures, out=given.out, rows=rows, suite=SUITE, learners=LEARNERS)


if __name__ == "__main__":
    main()
