"""Peak memory on real shapes: experts as adapters of one base, and one training step beside TRL's.

    python benchmarks/memory.py [--out benchmarks/results/memory.json] [--rounds 3]

The Llama of `decode.py` (24.6 M parameters, vocabulary 8,192, float32), random weights. Every case runs in a process of its own: it imports
what it needs, notes the memory that it holds, works, and reports the highest resident memory beyond that note (Linux: VmHWM). In all of
them the allocator gives freed memory back at once (ALLOCATOR), so that what counts is what is needed, not what glibc keeps for later.

experts  a bank of 1 or 8 experts (LoRA of rank 8 on every linear layer but the head) is loaded from disk; then 16 prompts of 24 tokens
         are answered with 48, every row under weights of its own (parameter level).
step     two steps of 16 responses of up to 64 tokens (2 prompts of 24, groups of 8), LoRA of rank 16, AdamW, KL to the reference by
         disabling the adapter; EOS is suppressed in neither, so lengths are as random as the model. TRL: RLOOTrainer with its defaults
         otherwise. Once with activation checkpointing in both (TRL's default), once without in both.

`memory_step_vs_trl` is the larger of the two ratios; medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import emit

ROWS, GROUP, PROMPT, NEW, STEPS, RANK = 16, 8, 24, 64, 2, 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MIB = 2**20
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(work: Any) -> int:
    """Bytes that `work` needs at its highest beyond what the process holds before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def tokenizer() -> Any:
    """Words of one letter each, and words made of numbers up to the model's vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from decode import SHAPE

    names = ["<eos>", *LETTERS, *(f"w{i}" for i in range(SHAPE["vocab_size"] - 1 - len(LETTERS)))]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", padding_side="left")


def prompt_texts() -> list[str]:
    return [" ".join(LETTERS[(i + j) % 26] for j in range(PROMPT)) for i in range(ROWS // GROUP)]


def score(prompts, completions, **_):
    return [len(set(text)) / 20 for text in completions]


def save_experts(folder: Path) -> None:
    import torch

    from decode import adapters

    bank = adapters(8)
    with torch.no_grad():
        for name in bank.names:
            bank.save(name, folder / name)


def experts(count: int, folder: Path) -> int:
    import torch

    from decode import Tokenizer, fresh
    from paretune.policy.lora.bank import LoraBank
    from paretune.policy.mixing.parameter import ParameterMix
    from paretune.policy.rollout import decode as rollout_decode
    from paretune.seeds import generator

    def work() -> None:
        bank = LoraBank.load(fresh(), {f"adapter{k}": folder / f"adapter{k}" for k in range(count)})
        rng = generator(0, "memory")
        ids_NT = torch.from_numpy(rng.integers(1, 8192, (16, PROMPT)))
        gates_NK = torch.from_numpy(rng.dirichlet(np.ones(count), 16)).float()
        chosen = {"max_new_tokens": 48, "uniforms_NT": rng.random((16, 48)), "suppress_eos": True}
        rollout_decode(ParameterMix(bank, Tokenizer()), ids_NT, torch.ones_like(ids_NT), gates_NK=gates_NK, **chosen)

    import peft  # noqa: F401
    import transformers.models.llama  # noqa: F401

    return peak(work)


def ours(checkpointing: bool, folder: Path) -> int:
    from decode import fresh
    from paretune.registry import describe
    from paretune.tasks.base import Task
    from paretune.training.learners.policy_gradient import PolicyGradient
    from paretune.training.spec import TrainSpec
    from paretune.types import Objectives, Prompt

    @dataclass(frozen=True)
    class Words(Task):
        objectives = Objectives(("varied", "again"), (0.0, 0.0), (1.0, 1.0))
        beta, max_new_tokens, registered_name, version = 0.05, NEW, "words", 1

        def load(self):
            return fresh(), tokenizer()

        def prompts(self, split):
            return [Prompt(text=text) for text in prompt_texts()]

        def score(self, prompts, completions):
            return np.array([score(prompts, completions)] * 2).T

    settings = {"rank": RANK, "alpha": 2 * RANK, "optimizer": "adam", "lr": 1e-4, "checkpointing": checkpointing}
    learner = PolicyGradient(samples=ROWS * STEPS, batch=ROWS, group=GROUP, **settings)
    task = Words()
    spec = TrainSpec(task=describe(task), learner=describe(learner), preference=(1.0, 0.0), seed=0)
    import peft  # noqa: F401
    import transformers.models.llama  # noqa: F401

    return peak(partial(learner.train, spec, task, folder))


def trl(checkpointing: bool, folder: Path) -> int:
    import peft
    import transformers
    from datasets import Dataset
    from transformers.trainer_utils import set_seed
    from trl import RLOOConfig, RLOOTrainer

    from decode import fresh

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    set_seed(0)

    def work() -> None:
        settings = RLOOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=ROWS,
            num_generations=GROUP,
            max_completion_length=NEW,
            max_steps=STEPS,
            beta=0.05,
            learning_rate=1e-4,
            bf16=False,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        data = Dataset.from_dict({"prompt": prompt_texts() * ROWS})
        parts = {"args": settings, "train_dataset": data, "processing_class": tokenizer(), "peft_config": lora}
        RLOOTrainer(fresh(), reward_funcs=[score], **parts).train()

    return peak(work)


CASES = {"experts": experts, "ours": ours, "trl": trl}


def run(case: str, setting: int, folder: Path) -> int:
    command = [sys.executable, __file__, "--case", case, str(setting), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ALLOCATOR})
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case, setting, folder = given.case
        print(CASES[case](int(setting) if case == "experts" else bool(int(setting)), Path(folder)))
        return
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as home:
        save_experts(Path(home) / "experts")
        wanted = {f"experts_{n}": ("experts", n) for n in (1, 8)}
        wanted |= {f"{case}{'_checkpointing' * on}": (case, on) for case in ("ours", "trl") for on in (0, 1)}
        for name, (case, setting) in wanted.items():
            peaks = []
            for turn in range(given.rounds):
                folder = Path(home) / ("experts" if case == "experts" else f"{name}-{turn}")
                peaks.append(run(case, setting, folder))
            found[name] = statistics.median(peaks) / MIB
            print(f"{name}: {found[name]:.0f} MiB ({', '.join(f'{p / MIB:.0f}' for p in peaks)})", file=sys.stderr)
    steps = {f"step{kind}": found[f"ours{kind}"] / found[f"trl{kind}"] for kind in ("", "_checkpointing")}
    figures = {"memory_8_experts": found["experts_8"] / found["experts_1"], "memory_step_vs_trl": max(steps.values())}
    emit(figures, given.out, mebibytes={k: round(v, 1) for k, v in found.items()}, ratios={k: round(v, 3) for k, v in steps.items()})


if __name__ == "__main__":
    main()
