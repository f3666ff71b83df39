"""What the frozen head allows: the representable ceiling of the exact tasks, at every judged preference, over the judged seeds.

    python benchmarks/ceiling.py [--seeds 10] [--out FILE]

A ceiling is the best attainment of any policy with the reference's own output head (`tasks/exact/ceiling.py`). No training is run.

    ceiling_worst      exact-v2, rho = -.8: worst over judged preferences, seeds 200 to 209, both splits, and SIZES
    ceiling_v1_worst   exact-v1, rho = -.8, seeds 100 to 109, for comparison
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from common import emit
from paretune.registry import TASKS

SEEDS = {"exact-v2": range(200, 210), "exact-v1": range(100, 110)}
SIZES: dict[str, dict[str, Any]] = {
    "judged size": {},
    "8 prompts": {"prompt_count": 8},
    "128 prompts": {"prompt_count": 128},
    "alphabet 6, length 3, width 64": {"alphabet": 6, "length": 3, "width": 64},
    "three objectives, rho -.4": {"objective_count": 3, "rho": -0.4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name, seeds in SEEDS.items():
        for size, dials in SIZES.items():
            worst = {}
            for seed in seeds[: given.seeds]:
                # A ceiling of 0 is never refused: what is measured here is what would be.
                task = TASKS.build({"name": name, "rho": -0.8, "seed": seed, **({"ceiling": 0.0} if name == "exact-v2" else {}), **dials})
                worst[str(seed)] = min(float(task.ceiling_W(task.judged(), split).min()) for split in ("train", "test"))
            found.setdefault(name, {})[size] = worst
            print(name, size, np.round(list(worst.values()), 4), flush=True)
    worst_of = {name: min(value for size in sizes.values() for value in size.values()) for name, sizes in found.items()}
    emit({"ceiling_worst": worst_of["exact-v2"], "ceiling_v1_worst": worst_of["exact-v1"]}, out=given.out, found=found)


if __name__ == "__main__":
    main()
