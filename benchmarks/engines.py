"""The learner `trl` beside the embedded one at the same samples, and what the drop-in costs a plain GRPOTrainer.

    python benchmarks/engines.py [--root DIR] [--seeds 100 101] [--rounds 10] [--out benchmarks/results/engines.json]

Attainment on exact-v1 at rho = -.8 and 0, at both vertices and in the middle, judged task seeds, training prompts: with 40,000 samples
each, TRL's RLOOTrainer minus the embedded learner, both with their defaults. The figure is the mean of the differences; the rows have each.
Stopped, it goes on where it was.

Overhead: GRPOTrainer with one drop-in over four reward functions (normalized per objective, weights that adapt) against GRPOTrainer with
these four and `reward_weights`: seconds of CPU per step of 64 responses, median of alternated pairs, minus 1. CPU time, because both
use one thread and other work on the machine must not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import emit
from learner_vs_trl import GROUP, TOKENS, WARM, quieten, trl_trainer
from paretune.policy.base import build_mixing
from paretune.policy.lora.bank import LoraBank
from paretune.registry import LEARNERS, describe
from paretune.runs.jobs import Tasks, run_job, train_job
from paretune.runs.store import Store
from paretune.tasks.exact.task import ExactTask
from paretune.training.cost import read_cost
from paretune.training.learners.exact import enumerated
from paretune.training.spec import TrainSpec
from paretune.training.trl.reward import MultiObjectiveReward

SAMPLES, RHOS, PREFERENCES = 40_000, (-0.8, 0.0), ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0))


def attainment(task: ExactTask, adapter: Path, w_M: np.ndarray) -> float:
    model, tokenizer = task.load()
    policy = build_mixing("parameter", LoraBank.load(model, {"policy": adapter}), tokenizer)
    with torch.no_grad():
        logp_PR = enumerated(policy, task, torch.ones(task.prompt_count, 1)).logp_PR.numpy()
    start, best = (w_M @ task.J_M(p, "train") for p in (task.reference_logp_PR("train"), task.optimum_logp_PR(w_M, "train")))
    return float((w_M @ task.J_M(logp_PR, "train") - start) / (best - start))


def compare(root: Path, seeds: list[int], *, train: bool = True) -> list[dict[str, Any]]:
    """One row per task, preference and seed: both attainments. Without `train`, of the pairs that are published."""
    store, tasks, rows = Store(root), Tasks(), []
    learners = {name: LEARNERS.build({"name": name, "samples": SAMPLES}) for name in ("pg", "trl")}
    for seed in seeds:
        for rho in RHOS:
            task = ExactTask(rho=rho, seed=seed)
            tasks.put(task)
            for w in PREFERENCES:
                row: dict[str, Any] = {"rho": rho, "seed": seed, "preference": w}
                specs = {name: TrainSpec(describe(task), describe(learner), w, seed) for name, learner in learners.items()}
                for spec in specs.values() if train else ():
                    with store.lock():
                        run_job(train_job(store, spec).path, tasks=tasks)
                found = {name: made for name, spec in specs.items() if (made := store.artifact(spec.key)) is not None}
                if len(found) < len(specs):
                    continue
                for name, made in found.items():
                    row[name] = round(attainment(task, made.path, np.array(w)), 4)
                    row[f"{name}_seconds"] = round(read_cost(made.path).seconds, 1)
                rows.append({**row, "difference": round(row["trl"] - row["pg"], 4)})
                print(rows[-1], flush=True)
    return rows


def small(completions, **_):
    return [sum(c.islower() for c in text) / TOKENS for text in completions]


def large(completions, **_):
    return [sum(c.isupper() for c in text) / TOKENS for text in completions]


def digits(completions, **_):
    return [sum(c.isdigit() for c in text) / TOKENS for text in completions]


def varied(completions, **_):
    return [len(set(text)) / TOKENS for text in completions]


FUNCTIONS, WEIGHTS = [small, large, digits, varied], [0.4, 0.3, 0.2, 0.1]


def per_step(rewards: list[Any], settings: dict[str, Any]) -> float:
    """Median CPU seconds of a step of TRL's GRPOTrainer."""
    from transformers import PrinterCallback

    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(folder, rewards, stamps, time.process_time, **settings)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return float(statistics.median(np.diff(stamps[WARM - 1 :])))


def plain() -> float:
    return per_step(list(FUNCTIONS), {"num_generations": GROUP, "reward_weights": WEIGHTS})


def dropped_in() -> float:
    reward = MultiObjectiveReward(
        FUNCTIONS, WEIGHTS, group=GROUP, scalarize_at="advantage", normalize="group", weighting="ctwa", max_unscored=1.0
    )
    return per_step([reward], reward.settings())


def overhead(rounds: int) -> tuple[float, dict[str, float]]:
    """The figure, and both medians in milliseconds of CPU time."""
    seconds: dict[str, list[float]] = {"drop_in": [], "plain": []}
    for pair in range(rounds):
        for name, run in (("drop_in", dropped_in), ("plain", plain))[:: 1 if pair % 2 == 0 else -1]:
            seconds[name].append(run())
        print(f"pair {pair + 1}: {seconds['drop_in'][-1] / seconds['plain'][-1] - 1:+.3f}", flush=True)
    ratio = statistics.median(a / b for a, b in zip(seconds["drop_in"], seconds["plain"], strict=True))
    return ratio - 1, {f"{name}_ms_per_step": round(1e3 * statistics.median(values), 1) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("paretune-runs/engines"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--published", action="store_true", help="train nothing: only the pairs that are there")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    share, times = overhead(given.rounds)
    rows = compare(given.root, given.seeds, train=not given.published)
    differences = [row["difference"] for row in rows]
    context = {"rows": rows, "lowest_difference": min(differences), **times, "rounds": given.rounds, "trl": metadata.version("trl")}
    emit({"trl_minus_embedded": float(np.mean(differences)), "dropin_overhead": share}, out=given.out, **context)


if __name__ == "__main__":
    quieten()
    main()
