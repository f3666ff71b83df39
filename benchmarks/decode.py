"""Decoding speed of mixtures against the plain model: tokens per second on a CPU, median of alternated pairs in one run.

    python benchmarks/decode.py [--out FILE] [--rounds 11] [--threads 2] [--new-tokens 48]

One random Llama of 24.6 M parameters (SHAPE, tied head) with random adapters as EMORL published its experts: LoRA of rank 8 and alpha 32
on every linear layer but the head. Prompts of 24 tokens, 48 new ones, EOS suppressed. Every path draws with `policy.rollout.decode`,
from the same prompts, preferences and uniforms:

    plain         the model itself, with a cache, no adapter layers in it
    gated         ParameterMix of three experts and a bridge: unmerged, its own preference in every row
    router        the same four adapters; a small network reads every token's embedding and its row's preference, and sets the token's gates
    layer_router  such a network at the input of every decoder layer
    logit         LogitMix of the three experts, stacked into one forward with one cache
    shared_trunk  LogitMix of three experts that adapt the top TOP_LAYERS layers only; the layers below run once
    published     three full merged copies, no cache: each step runs all of them over the whole sequence (logits for its end only)

The first two comparisons are made with one thread, too. A quarter of 6 layers is no whole number: the experts with a shared trunk adapt
2, a third.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from common import emit, paired_medians
from paretune.policy.lora.bank import LoraBank, soup_state
from paretune.policy.lora.decoder import routed
from paretune.policy.mixing.parameter import ParameterMix, ReferencePolicy
from paretune.policy.mixing.predictions import LogitMix
from paretune.policy.rollout import decode as rollout_decode
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
EXPERTS, RANK, ALPHA, PROMPT_TOKENS, TOP_LAYERS = 3, 8, 32, 24, 2


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


class Router(torch.nn.Module):
    """Gates of every token from its hidden state and its row's preference: one inner layer of 64, a softmax."""

    def __init__(self, adapters: int):
        super().__init__()
        self.inner = torch.nn.Linear(SHAPE["hidden_size"] + EXPERTS, 64)
        self.outer = torch.nn.Linear(64, adapters)

    def forward(self, h_NTH: torch.Tensor, w_NM: torch.Tensor) -> torch.Tensor:
        w_NTM = w_NM[:, None].expand(-1, h_NTH.shape[1], -1)
        return self.outer(torch.tanh(self.inner(torch.cat([h_NTH, w_NTM], -1)))).softmax(-1)


class RouterMix(ParameterMix):
    """The parameter level under gates of routers; what it is given as gates are preferences."""

    def __init__(self, bank: LoraBank, starts: range):
        super().__init__(bank, Tokenizer())
        with forked_torch(2):
            self.routers = {start: Router(bank.count) for start in starts}

    def forward(self, input_ids_NT, *, gates_NK, attention_mask=None, position_ids=None, cache=None, last_only=False):
        with routed(self.bank, self.routers, gates_NK):
            return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), last_only)


def fresh(shape: Mapping[str, Any] = SHAPE, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A random Llama, drawn where it will be."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape)
    with forked_torch(0), torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def adapters(count: int, *, layers: range | None = None, model: Any = None) -> LoraBank:
    """A bank of random adapters, of all layers or of some, on `model` or on a fresh one."""
    targets = "all-linear" if layers is None else rf".*layers\.({'|'.join(map(str, layers))})\..*_proj"
    names = [f"adapter{k}" for k in range(count)]
    bank = LoraBank.attach(model or fresh(), names=names, rank=RANK, alpha=ALPHA, seed=0, trainable=(), targets=targets)
    with forked_torch(1), torch.no_grad():
        for k in range(count):
            for b_Or in bank.parameters_of(k)[1::2]:
                b_Or.normal_(0, 0.01)
    return bank


def merged(bank: LoraBank, k: int) -> Any:
    model = fresh()
    model.load_state_dict(soup_state(bank, np.eye(EXPERTS)[k]), strict=False)
    return model


def decode(policy: Any, rows: int, new_tokens: int, *, width: int = PROMPT_TOKENS) -> torch.Tensor:
    """(rows, new_tokens) tokens; prompts, preferences and uniforms are the same for every policy."""
    rng = generator(0, "decode")
    ids_NT = torch.from_numpy(rng.integers(1, policy.model.config.vocab_size, (rows, width))).to(policy.device)
    w_NM = rng.dirichlet(np.ones(EXPERTS), rows)
    bridge_N1 = EXPERTS / (EXPERTS - 1) * (1 - (w_NM**2).sum(1, keepdims=True))  # 0 at the vertices
    columns = EXPERTS if isinstance(policy, (Published, RouterMix)) else policy.K
    gates_NK = torch.from_numpy(np.concatenate([w_NM, bridge_N1], 1)[:, :columns]).float()
    made = rollout_decode(
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
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    experts, four = adapters(EXPERTS), adapters(EXPERTS + 1)
    depth = SHAPE["num_hidden_layers"]
    plain = ReferencePolicy(LoraBank.attach(fresh(), names=[], seed=0), Tokenizer())
    gated, logit = ParameterMix(four, Tokenizer()), LogitMix(experts, Tokenizer())
    router, layer_router = RouterMix(four, range(1)), RouterMix(four, range(depth))
    trunk = LogitMix(adapters(EXPERTS, layers=range(depth - TOP_LAYERS, depth)), Tokenizer())
    published = Published([merged(experts, k) for k in range(EXPERTS)])
    same = float((decode(logit, 16, 8) == decode(published, 16, 8)).float().mean())
    assert same > 0.9, f"logit mixing and the published loop should draw the same tokens, {same:.2f} are"

    parameters = sum(p.numel() for p in plain.model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {options.threads} threads, {PROMPT_TOKENS} + {options.new_tokens} tokens", file=sys.stderr)
    figures: dict[str, float] = {}
    speeds: dict[str, list[float]] = {}
    comparisons = [
        ("gated_vs_plain_b16", gated, plain, 16, options.rounds),
        ("gated_vs_plain_b1", gated, plain, 1, options.rounds),
        ("router_vs_plain_b16", router, plain, 16, options.rounds),
        ("router_vs_plain_b1", router, plain, 1, options.rounds),
        ("layer_router_vs_plain_b16", layer_router, plain, 16, options.rounds),
        ("logit_vs_plain_b16", logit, plain, 16, options.rounds),
        ("logit_vs_plain_b1", logit, plain, 1, options.rounds),
        ("shared_trunk_logit_vs_plain", trunk, plain, 16, options.rounds),
        ("shared_trunk_logit_vs_plain_b1", trunk, plain, 1, options.rounds),
        ("logit_vs_published_loop", logit, published, 16, max(3, options.rounds // 3)),
    ]
    comparisons += [(f"{name}_one_thread", *rest) for name, *rest in comparisons[:2]]
    for name, a, b, rows, rounds in comparisons:
        torch.set_num_threads(1 if name.endswith("_one_thread") else options.threads)
        run_a, run_b = (partial(decode, policy, rows, options.new_tokens) for policy in (a, b))
        seconds_a, seconds_b, figures[name] = paired_medians(run_a, run_b, rounds)
        speed_a, speed_b = (rows * options.new_tokens / seconds for seconds in (seconds_a, seconds_b))
        print(f"{name}: {figures[name]:.3f}  ({speed_a:.0f} against {speed_b:.0f} tokens/s, {rounds} pairs)", file=sys.stderr)
        speeds[name] = [round(speed_a, 1), round(speed_b, 1)]
    torch.set_num_threads(options.threads)
    emit(
        figures,
        options.out,
        model={"parameters": parameters, **SHAPE},
        adapters={"experts": EXPERTS, "bridges": 1, "rank": RANK, "alpha": ALPHA, "targets": "every linear layer but the head"},
        shared_trunk={"layers_with_adapters": TOP_LAYERS, "forwards_per_token": round(trunk.forwards_per_token, 3)},
        tokens={"prompt": PROMPT_TOKENS, "new": options.new_tokens},
        tokens_per_second=speeds,  # of the two sides of each comparison, at its own moment
        pairs={name: rounds for name, _, _, _, rounds in comparisons},
    )


if __name__ == "__main__":
    main()
