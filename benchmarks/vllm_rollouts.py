"""Trainings whose responses vLLM draws, against the embedded sampler: utility at the same samples, over seeds.

    PARETUNE_VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/vllm_rollouts.py --model FOLDER [--steps 40] [--seeds 3] [--out FILE]

Both train a conditioned policy (two adapters, a preference for each prompt) from the same start on the same prompts and preferences; who
draws differs, and so do the random numbers of the tokens. Utility, w . r less the price of KL, is measured by the embedded sampler, of
all policies with the same prompts, preferences and noise. The figure is the mean over seeds of utility with vLLM less utility without.
One server draws for all seeds. Rewards: the share of small letters, and brevity.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import numpy as np

from common import emit
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.registry import describe
from paretune.tasks.base import Task
from paretune.tasks.pretrained import load_pretrained
from paretune.training.batch import draw
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.rollouts import OwnServer
from paretune.training.spec import TrainSpec
from paretune.types import Objectives, Prompt

THINGS = ("a red wine stain", "a noisy fridge", "dry skin", "a slow laptop", "weeds", "a bad mood", "old bread", "a lost key")
ASKS = ("How do I deal with {}?", "What should I know about {}?", "Is {} a reason to worry?", "Who can help me with {}?")
QUESTIONS = [ask.format(thing) for thing in THINGS for ask in ASKS]


@dataclass(frozen=True)
class Questions(Task):
    model: str
    max_new_tokens: int
    objectives = Objectives(("small", "brief"), (0.0, 0.0), (1.0, 1.0))
    beta = 0.05
    registered_name, version = "questions", 1

    def load(self) -> Any:
        return load_pretrained(self.model, dtype="float32")

    def prompts(self, split: str) -> list[Prompt]:
        kept = QUESTIONS[:24] if split == "train" else QUESTIONS[24:]
        return [Prompt(text=text) for text in kept]

    def score(self, prompts: Any, completions: Any) -> np.ndarray:
        small = [sum(c.islower() for c in text) / max(len(text), 1) for text in completions]
        return np.array([small, [2 ** (-len(text) / 24) for text in completions]]).T

    def base(self) -> dict[str, Any]:
        return {"model": self.model}


def utility(task: Questions, policy: ParameterMix, spec: TrainSpec, learner: PolicyGradient, samples: int) -> float:
    """On test prompts, at preferences of their own, always the same ones with the same noise."""
    known, group = task.prompts("test"), 4
    total = []
    for first in range(0, samples // group, len(known)):
        made = draw(policy, task, spec, step=first, first=first, prompts=len(known), group=group, known=known)
        kl_N = made.kl_N(learner.reference_logp(policy, made, group=group))
        total += ((made.w_NM * made.rewards_NM).sum(1) - task.beta * kl_N).tolist()
    return statistics.fmean(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder as transformers saves it")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--measured", type=int, default=256, help="responses of each measurement")
    parser.add_argument("--out")
    asked = parser.parse_args()
    task = Questions(str(Path(asked.model).resolve()), asked.tokens)
    server = OwnServer("benchmark", f"--enforce-eager --max-model-len 128 --block-size 32 --max-num-seqs {asked.rows}")

    class ByServer(PolicyGradient):
        def draws(self, spec: TrainSpec) -> Any:
            return server.generate

    shape: dict[str, Any] = {
        "rank": 8,
        "batch": asked.rows,
        "samples": asked.rows * asked.steps,
        "group": 4,
        "lr": asked.lr,
        "log_every": 1,
    }
    embedded = PolicyGradient(**shape, log_samples=0)
    learners = {"embedded": embedded, "vllm": ByServer(**shape, log_samples=0, rollouts="vllm")}
    measured = TrainSpec(task=describe(task), learner=describe(embedded), preference=None, seed=10_000)
    reached: dict[str, list[float]] = {name: [] for name in learners}
    logs: list[dict[str, Any]] = []
    seconds = dict.fromkeys(learners, 0.0)
    with tempfile.TemporaryDirectory() as place:
        model, tokenizer = task.load()
        start = ParameterMix(LoraBank.attach(model, names=["a", "b"], seed=0, rank=8), tokenizer)
        untrained = utility(task, start, measured, embedded, asked.measured)
        for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
            for name, learner in learners.items():
                folder, began = Path(place) / f"{name}-{seed}", time.monotonic()
                learner.train(dataclasses.replace(measured, learner=describe(learner), seed=seed), task, folder)
                seconds[name] += time.monotonic() - began
                model, tokenizer = task.load()
                bank = LoraBank.load(model, {f"a{k}": folder / f"adapter-{k}" for k in range(2)})
                reached[name].append(utility(task, ParameterMix(bank, tokenizer), measured, embedded, asked.measured))
                print(seed, name, reached[name][-1], "untrained", untrained, flush=True)
                if name == "vllm":
                    logs += [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        server.end()
    gaps = [b - a for a, b in zip(reached["embedded"], reached["vllm"], strict=True)]
    emit(
        {"vllm_rollouts_minus_embedded": statistics.fmean(gaps)},
        asked.out,
        model=Path(asked.model).resolve().name,
        seeds=asked.seeds,
        samples=asked.rows * asked.steps,
        tokens=asked.tokens,
        lr=asked.lr,
        untrained=untrained,
        reached=reached,
        standard_error=statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None,
        logp_gap=statistics.fmean(log["logp_gap"] for log in logs),
        weight_max=max(log["weight_max"] for log in logs),
        truncated=statistics.fmean(log["truncated"] for log in logs),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
