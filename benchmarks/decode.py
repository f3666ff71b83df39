"""Decoding speed of mixtures against the plain model: tokens per second on a CPU, median of alternated pairs in one run.

    python benchmarks/decode.py [--out FILE] [--rounds 9] [--threads 2] [--new-tokens 48]

One random Llama of 24.6 M parameters (SHAPE, tied head) with three random experts as EMORL published them: LoRA of rank 8 and alpha 32 on
every linear layer but the head. Prompts of 24 tokens, 48 new ones, EOS suppressed. Every path draws with `paretune.rollout.sample`, from
the same prompts, preferences and uniforms:

    plain       the model itself, with a cache, no adapter layers in it
    gated       ParameterMix: unmerged, its own preference in every row
    logit       LogitMix: the three experts in one stacked forward with one cache
    published   three full merged copies, no cache: each step runs all of them over the whole sequence (logits for its end only)

Threads that wait do not spin: on a shared machine spinning makes every path wait for whatever else runs, and ratios drift.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from common import emit, paired_medians
from paretune.lora import LoraBank, soup_state
from paretune.mixing import LogitMix, ParameterMix, ReferencePolicy
from paretune.rollout import sample
from paretune.seeds import forked_torch, generator

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
EXPERTS, RANK, ALPHA, PROMPT_TOKENS = 3, 8, 32, 24


class Tokenizer:
    """All that a policy asks of one."""

    eos_token_id = pad_token_id = 0


class Published(ReferencePolicy):
    """Full copies of the model, one per expert, run over the whole sequence at every step."""

    def __init__(self, models: list[Any]):
        super().__init__(LoraBank.attach(models[0], names=[], seed=0), Tokenizer())
        self.models = models

    def new_cache(self, n_rows: int) -> list[torch.Tensor]:
        return []  # not of keys and values: only the tokens so far

    def forward(self, input_ids_NT, *, gates_NK, attention_mask=None, position_ids=None, cache=None, last_only=False):
        cache.append(input_ids_NT)
        ids_NT = torch.cat(cache, 1)
        mixed_NTV = 0.0
        with self.bank.gates(None):
            for k, model in enumerate(self.models):
                mixed_NTV = mixed_NTV + gates_NK[:, None, k : k + 1] * model(input_ids=ids_NT, use_cache=False, logits_to_keep=1).logits
        return mixed_NTV


def fresh() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with forked_torch(0):
        return LlamaForCausalLM(LlamaConfig(bos_token_id=None, eos_token_id=0, pad_token_id=0, **SHAPE)).eval()


def expert_bank() -> LoraBank:
    bank = LoraBank.attach(fresh(), names=[f"expert{k}" for k in range(EXPERTS)], rank=RANK, alpha=ALPHA, seed=0, trainable=())
    with forked_torch(1), torch.no_grad():
        for k in range(EXPERTS):
            for b_Or in bank.parameters_of(k)[1::2]:
                b_Or.normal_(0, 0.01)
    return bank


def merged(bank: LoraBank, k: int) -> Any:
    model = fresh()
    model.load_state_dict(soup_state(bank, np.eye(EXPERTS)[k]), strict=False)
    return model


def decode(policy: Any, rows: int, new_tokens: int) -> torch.Tensor:
    """(rows, new_tokens) tokens; prompts, preferences and uniforms are the same for every policy."""
    rng = generator(0, "decode")
    ids_NT = torch.from_numpy(rng.integers(1, SHAPE["vocab_size"], (rows, PROMPT_TOKENS)))
    gates_NK = torch.from_numpy(rng.dirichlet(np.ones(EXPERTS), rows)).float()
    if policy.K == 0 and not isinstance(policy, Published):
        gates_NK = gates_NK[:, :0]
    made = sample(
        policy,
        ids_NT,
        torch.ones_like(ids_NT),
        gates_NK=gates_NK,
        max_new_tokens=new_tokens,
        uniforms_NT=rng.random((rows, new_tokens)),
        suppress_eos=True,
    )
    assert made.tokens_NT.shape == (rows, new_tokens)
    return made.tokens_NT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    bank = expert_bank()
    plain = ReferencePolicy(LoraBank.attach(fresh(), names=[], seed=0), Tokenizer())
    gated, logit = ParameterMix(bank, Tokenizer()), LogitMix(bank, Tokenizer())
    published = Published([merged(bank, k) for k in range(EXPERTS)])
    same = float((decode(logit, 16, 8) == decode(published, 16, 8)).float().mean())
    assert same > 0.9, f"logit mixing and the published loop should draw the same tokens, {same:.2f} are"

    parameters = sum(p.numel() for p in plain.model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {options.threads} threads, {PROMPT_TOKENS} + {options.new_tokens} tokens", file=sys.stderr)
    figures: dict[str, float] = {}
    speeds: dict[str, list[float]] = {}
    comparisons = [
        ("gated_vs_plain_b16", gated, plain, 16, options.rounds),
        ("gated_vs_plain_b1", gated, plain, 1, options.rounds),
        ("logit_vs_plain_b16", logit, plain, 16, options.rounds),
        ("logit_vs_plain_b1", logit, plain, 1, options.rounds),
        ("logit_vs_published_loop", logit, published, 16, max(3, options.rounds // 3)),
    ]
    for name, a, b, rows, rounds in comparisons:
        run_a, run_b = (partial(decode, policy, rows, options.new_tokens) for policy in (a, b))
        seconds_a, seconds_b, figures[name] = paired_medians(run_a, run_b, rounds)
        speed_a, speed_b = (rows * options.new_tokens / seconds for seconds in (seconds_a, seconds_b))
        print(f"{name}: {figures[name]:.3f}  ({speed_a:.0f} against {speed_b:.0f} tokens/s, {rounds} pairs)", file=sys.stderr)
        speeds[name] = [round(speed_a, 1), round(speed_b, 1)]
    emit(
        figures,
        options.out,
        model={"parameters": parameters, **SHAPE},
        adapters={"experts": EXPERTS, "rank": RANK, "alpha": ALPHA, "targets": "every linear layer but the head"},
        tokens={"prompt": PROMPT_TOKENS, "new": options.new_tokens},
        tokens_per_second=speeds,  # of the two sides of each comparison, at its own moment
        pairs={name: rounds for name, _, _, _, rounds in comparisons},
    )


if __name__ == "__main__":
    main()
