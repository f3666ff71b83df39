"""Training speed of the embedded learner beside TRL's GRPOTrainer: samples per second on a CPU, median of alternated pairs in one run.

    python benchmarks/learner_vs_trl.py [--out FILE] [--rounds 10] [--threads 1]

The same tiny random Llama, LoRA (rank 8, every linear layer but the head), prompts and reward in both. A step draws 64 responses of 16
tokens (8 prompts of 8 tokens, 8 responses each), scores them, makes the reference's log-probabilities for the KL (beta 0.04 in both), and
updates once. EOS is suppressed in both: its id lies outside of the model's vocabulary, so neither can draw it. Each timing is 12 steps
after 3 steps of warm-up; building the trainer is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import emit, grpo_trainer
from paretune.registry import describe
from paretune.seeds import forked_torch
from paretune.tasks.base import Task
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec
from paretune.types import Objectives, Prompt

ROWS, GROUP, TOKENS, RANK, ALPHA, BETA, LR = 64, 8, 16, 8, 16, 0.04, 1e-3
WARM, TIMED = 3, 12  # steps; TIMED is a multiple of WARM
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WIDTH, LAYERS, HEADS = 64, 2, 4


def quieten() -> None:
    """Progress bars and warnings of the libraries, out of the way of the figures."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def texts_of(split: str) -> list[str]:
    start = 0 if split == "train" else 8
    return [LETTERS[i : i + 8] for i in range(start, start + 8)]


def score(prompts, completions, **_):
    """Share of small letters: cheap, so that what is timed is the training."""
    return [sum(c.islower() for c in text) / TOKENS for text in completions]


@dataclass(frozen=True)
class Letters(Task):
    """A random Llama over letters whose EOS is outside of its vocabulary."""

    objectives = Objectives(("small", "again"), (0.0, 0.0), (1.0, 1.0))
    beta = BETA
    max_new_tokens = TOKENS
    registered_name, version = "letters", 1

    def load(self):
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        symbols = {s: i for i, s in enumerate(["<pad>", *LETTERS, "<eos>"])}
        tokens = Tokenizer(models.WordLevel(symbols, unk_token="<pad>"))
        tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokens.decoder = decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>", padding_side="left")
        config = LlamaConfig(
            vocab_size=len(symbols) - 1,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=len(symbols) - 1,
            pad_token_id=0,
        )
        with forked_torch(0):
            return LlamaForCausalLM(config).eval(), tokenizer

    def prompts(self, split):
        return [Prompt(text=text) for text in texts_of(split)]

    def score(self, prompts, completions):
        small = score(prompts, completions)
        return np.array([small, small]).T


def ours() -> float:
    """Samples per second of the embedded loop."""
    stamps: list[float] = []
    learner = PolicyGradient(
        rank=RANK,
        alpha=ALPHA,
        samples=ROWS * (WARM + TIMED),
        batch=ROWS,
        group=GROUP,
        optimizer="adam",
        lr=LR,
        log_every=WARM,
        checkpoint_every=10**6,
    )
    task = Letters()
    spec = TrainSpec(task=describe(task), learner=describe(learner), preference=(1.0, 0.0), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        cost = learner.train(spec, task, Path(folder), progress=lambda record: stamps.append(time.perf_counter()))
    assert cost.tokens == ROWS * TOKENS * (WARM + TIMED), "EOS is suppressed"
    return ROWS * TIMED / (stamps[-1] - stamps[0])


def trl_trainer(folder: str, rewards: Any, stamps: list[float], clock: Callable[[], float], **settings: Any) -> Any:
    """TRL's GRPOTrainer on `Letters`, at the shapes above; the time of each step's end goes to `stamps`."""
    return grpo_trainer(
        folder,
        *Letters().load(),
        prompts=[{"prompt": text} for text in texts_of("train") * (WARM + TIMED)],
        rewards=rewards,
        rows=ROWS,
        tokens=TOKENS,
        steps=WARM + TIMED,
        rank=RANK,
        alpha=ALPHA,
        beta=BETA,
        lr=LR,
        stamp=lambda: stamps.append(clock()),
        use_cpu=True,
        **settings,
    )


def theirs() -> float:
    """Samples per second of TRL's GRPOTrainer."""
    stamps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_generations": GROUP, "max_grad_norm": 1.0, "temperature": 1.0, "top_k": 0}
        trainer = trl_trainer(folder, score, stamps, time.perf_counter, **settings)
        trainer.train()
        drawn = trainer.state.num_input_tokens_seen
    assert drawn == (8 + TOKENS) * ROWS * (WARM + TIMED), "EOS is suppressed"
    return ROWS * TIMED / (stamps[-1] - stamps[WARM - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    speeds: dict[str, list[float]] = {"paretune": [], "trl": []}
    for pair in range(given.rounds):
        for name, run in (("paretune", ours), ("trl", theirs))[:: 1 if pair % 2 == 0 else -1]:
            speeds[name].append(run())
        print(f"pair {pair + 1}: paretune {speeds['paretune'][-1]:.0f}, TRL {speeds['trl'][-1]:.0f} samples/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(speeds["paretune"], speeds["trl"], strict=True))
    medians = {f"{name}_samples_per_second": round(statistics.median(values), 1) for name, values in speeds.items()}
    context = {"rounds": given.rounds, "trl": metadata.version("trl"), **medians}
    print(json.dumps(medians), flush=True)
    emit({"samples_per_second_ratio": ratio}, out=given.out, **context)


if __name__ == "__main__":
    quieten()
    main()
