"""Time of one training step of the gradient-level methods against linear: exact-v1 with 4 objectives, the sampled learner's defaults.

    python benchmarks/gradient.py [--rounds 25] [--out benchmarks/results/gradient.json]

Each aggregator in alternated pairs with linear, in one process: sampling, scoring, gradients, weights and the optimizer's step. The figure
is the slowest aggregator's median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import emit, paired_medians
from paretune.registry import describe
from paretune.tasks.exact.task import ExactTask
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec
from paretune.training.weightings.gramian import AGGREGATORS


def stepper(task: ExactTask, learner: PolicyGradient, weighting: dict[str, Any]) -> Callable[[], None]:
    """A function that takes the next step of a training of its own."""
    w = (1 / task.objectives.count,) * task.objectives.count
    spec = TrainSpec(task=describe(task), learner=describe(learner), preference=w, seed=0, weighting=weighting)
    policy = learner.start(spec, task, {})
    optimizer = learner.new_optimizer(policy.bank.parameters())
    step, state = 0, None

    def run() -> None:
        nonlocal step, state
        batch = learner.collect(policy, task, spec, step, state)
        learner.update(policy, optimizer, batch, beta=task.beta, step=step)
        step, state = step + 1, batch.state

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    task, learner = ExactTask(objective_count=4, rho=-0.2), PolicyGradient()
    rows = []
    for name in AGGREGATORS:
        linear = stepper(task, learner, {"name": "fixed"})
        other = stepper(task, learner, {"name": "gradient", "aggregator": name})
        plain, slow, ratio = paired_medians(linear, other, given.rounds)
        rows.append({"aggregator": name, "linear_seconds": round(plain, 5), "seconds": round(slow, 5), "ratio": round(ratio, 4)})
        print(rows[-1], flush=True)
    emit(
        {"gradient_vs_linear_m4": max(row["ratio"] for row in rows)},
        out=given.out,
        rows=rows,
        task=describe(task),
        learner=describe(learner),
    )


if __name__ == "__main__":
    main()
