"""Peak memory of each of two processes that train together, with the base sharded over them and with a whole base in each.

    python benchmarks/sharded.py [--out benchmarks/results/sharded.json] [--rounds 1] [--small]

A random Llama with SmolLM2-135M's layers, 27 of them, and a vocabulary of 8,192 (100 M parameters, float32), saved and read as a recipe
reads one. One step of `pg` as it is by default, 64 responses in groups of 8 and LoRA of rank 16 on every linear layer but the head; the
responses have 32 tokens and the prompts 24; activation checkpointing, passes of 8 rows. With `--small`: 16 responses of 8 tokens, rank 4.
Every case runs in two fresh processes over gloo, one thread each. Each trains a model of one layer first, so that all code is loaded, notes
the memory that it holds, loads and trains, and reports the highest resident memory beyond that note (Linux: VmHWM, with the pages of files
that are mapped): until the first step, and from there on.

`sharded_memory` is that of the sharded base as a share of that of the whole one, each the higher of both processes over loading and
training; it is the larger of two ratios, that of everything and that of training alone. All four numbers of bytes are in the file. Adapters
with gradients and moments weigh the same in both cases, so that rank and batch move the ratio: `--small` gives `sharded_memory_small`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import emit
from memory import ALLOCATOR, LETTERS, MIB, PROMPT, resident

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 27,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
}
PROCESSES, STEPS, GROUP, PASS = 2, 1, 8, 8
SIZES = {"default": (64, 32, 16), "small": (16, 8, 4)}  # responses, their tokens, rank


def make(folder: Path) -> int:
    """Save the model and its tokenizer; returns the number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import memory
    from paretune.seeds import forked_torch

    for place, layers in (("small", 1), ("large", SHAPE["num_hidden_layers"])):
        with forked_torch(0):
            model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}))
        model.save_pretrained(folder / place)
        memory.tokenizer().save_pretrained(folder / place)
    return model.num_parameters()


def train(folder: Path, sharded: bool, size: str, work: Path) -> dict[str, int]:
    """What one process needs until the first step, and from there on: bytes."""
    rows, new, rank = SIZES[size]
    from paretune.registry import describe
    from paretune.tasks.base import Task
    from paretune.tasks.pretrained import load_pretrained
    from paretune.training.learners.policy_gradient import PolicyGradient
    from paretune.training.processes import joined, launched
    from paretune.training.spec import TrainSpec
    from paretune.types import Objectives, Prompt

    @dataclass(frozen=True)
    class Words(Task):
        objectives = Objectives(("varied", "long"), (0.0, 0.0), (1.0, 1.0))
        beta, max_new_tokens, registered_name, version = 0.05, new, "words", 1

        size: str = "large"

        def load(self):
            return load_pretrained(str(folder / self.size))

        def prompts(self, split):
            return [Prompt(text=" ".join(LETTERS[(i + j) % 26] for j in range(PROMPT))) for i in range(rows // GROUP)]

        def score(self, prompts, completions):
            return np.array([[len(set(text)) / 26, len(text) / 200] for text in completions])

    found: dict[str, int] = {}

    class Watched(PolicyGradient):
        def advance(self, policy, optimizer, task, spec, run):
            if run.step == 0:
                found["loading"] = resident("VmHWM")
                Path("/proc/self/clear_refs").write_text("5")
            return super().advance(policy, optimizer, task, spec, run)

    settings: dict[str, Any] = {
        "step_kl": None,
        "checkpointing": True,
        "micro_batch": PASS,
        "processes": PROCESSES,
        "shard": sharded,
        "log_samples": 0,
    }
    learner = Watched(samples=rows * STEPS, batch=rows, group=GROUP, rank=rank, **settings)
    store, place, count = launched()
    with joined(place, count, store, timeout=600, device="cpu"):
        for task in (Words(size="small"), Words()):
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            spec = TrainSpec(task=describe(task), learner=describe(learner), preference=(1.0, 0.0), seed=0)
            (own := work / task.size).mkdir()
            learner.train(spec, task, own)
    found["training"] = resident("VmHWM")
    return {phase: most - before for phase, most in found.items()}


def run(folder: Path, sharded: bool, size: str) -> dict[str, int]:
    """The higher of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(PROCESSES)}
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, __file__, "--case", str(folder), str(int(sharded)), size, work]
        environment = {**os.environ, **ALLOCATOR, **place, "OMP_NUM_THREADS": "1", "PARETUNE_SELF_TEST": "off"}
        children = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environment, "RANK": str(rank)})
            for rank in range(PROCESSES)
        ]
        answers = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit("a process has failed")
    each = [json.loads(answer.splitlines()[-1]) for answer in answers]
    return {phase: max(one[phase] for one in each) for phase in each[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a smaller step, and another figure")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        folder, sharded, size, work = given.case
        own = Path(work) / os.environ["RANK"]
        own.mkdir()
        print(json.dumps(train(Path(folder), sharded == "1", size, own)))
        return
    asked = "small" if given.small else "default"
    peaks: dict[str, list[dict[str, int]]] = {"whole": [], "sharded": []}
    with tempfile.TemporaryDirectory() as home:
        parameters = make(Path(home))
        for _ in range(given.rounds):
            for kind, found in peaks.items():
                found.append(run(Path(home), kind == "sharded", asked))
                print(kind, {phase: f"{most / MIB:.0f} MiB" for phase, most in found[-1].items()}, file=sys.stderr, flush=True)
    sizes = {kind: {phase: statistics.median(one[phase] for one in found) for phase in found[0]} for kind, found in peaks.items()}
    ratios = {
        "everything": max(sizes["sharded"].values()) / max(sizes["whole"].values()),
        "training": sizes["sharded"]["training"] / sizes["whole"]["training"],
    }
    mebibytes = {kind: {phase: round(size / MIB, 1) for phase, size in found.items()} for kind, found in sizes.items()}
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.exists() else {}
    name = "sharded_memory_small" if given.small else "sharded_memory"
    cases = {**before.get("cases", {}), asked: {"step": SIZES[asked], "mebibytes": mebibytes, "ratios": ratios}}
    emit({**before.get("figures", {}), name: max(ratios.values())}, given.out, cases=cases, parameters=parameters, shape=SHAPE)


if __name__ == "__main__":
    main()
