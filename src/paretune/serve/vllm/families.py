"""Families as vLLM serves them, read from their files without a model: the gates of a request, and all adapters as one LoRA.

    family = GatedFamily.read("runs/families/bridge-1a2b3c4d")
    family.gates("polite=.7,brief=.3", {})     (K,) the gates of a model's name, or of a request's extra arguments
    family.write(folder)                       the K adapters side by side: one LoRA, whose rank is the sum of theirs
    family.write(folder, gates_K)              the exact LoRA of one preference

Only what is the exact soup of LoRAs at every preference can be served so (mixing "parameter", and rules that do not look at the prompt).
What cannot is refused, and the embedded engine named. Nothing here imports vLLM.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.files import changed
from paretune.policy.base import MIXINGS, Weights
from paretune.policy.card import FAMILY_FILE, read_card
from paretune.policy.lora.files import read_factors, write_adapter
from paretune.policy.rules import GateRule
from paretune.registry import GATE_RULES, checked
from paretune.serve.model_card import VLLM_RANKS
from paretune.serve.protocol import Gate, about, as_preference, one_spelling
from paretune.types import Preference

__all__ = ["FAMILIES", "DEFAULT", "GatedFamily", "families_named", "fill_gates", "is_family", "pack_factors"]

FAMILIES, DEFAULT = "PARETUNE_VLLM_FAMILIES", "PARETUNE_VLLM_DEFAULT"  # environment variables
EMBEDDED = "`paretune serve FAMILY` (the embedded engine) serves it; vLLM serves what `paretune export` writes of one preference"


@dataclass(frozen=True)
class GatedFamily:
    """A family whose policy at every preference is the exact soup of its LoRAs. `ranks` are the adapters' (axis K)."""

    path: Path
    rule: GateRule
    default: Preference
    adapters: Mapping[str, Path]
    ranks: tuple[int, ...]
    base: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | Path, default: str | None = None) -> GatedFamily:
        """The family in the folder `path`; ConfigError for one that vLLM cannot mix, or that was changed since it was saved."""
        path = Path(path)
        card = read_card(path)
        if problems := changed(path, card.get("files", {})):
            remedy = "copy it again, or fit it again"
            raise ConfigError("a family is read as it was saved", found=f"{path / problems[0]}", remedy=remedy)
        rule = GATE_RULES.build(card["rule"])
        _check_soup(card, rule)
        names = tuple(card["objectives"]["names"])
        asked = as_preference(names, [1 / len(names)] * len(names) if default is None else default)
        adapters = {name: path / folder for name, folder in card["adapters"].items()}
        ranks = []
        for name, folder in adapters.items():
            factors = read_factors(folder)
            for layer in factors:
                _check_layer(name, layer)
            ranks.append(max(len(a_rI) for a_rI, _, _ in factors.values()))
        family = cls(path, rule, asked, adapters, tuple(ranks), card["base"])
        family.gates(None, {})  # a rule for other adapters fails here, not at the first request
        return family

    @property
    def rank(self) -> int:
        """Of the LoRA of all adapters side by side."""
        return sum(self.ranks)

    @property
    def max_rank(self) -> int:
        """The --max-lora-rank under which vLLM serves it."""
        found = next((known for known in VLLM_RANKS if known >= self.rank), None)
        if found is None:
            rule = f"vLLM serves adapters of at most rank {VLLM_RANKS[-1]}, all of a family together"
            raise ConfigError(rule, found=f"ranks {', '.join(map(str, self.ranks))} of {self.path}", remedy=EMBEDDED)
        return found

    def gates(self, in_name: str | None, extra: Mapping[str, Any]) -> np.ndarray:
        """(K,) gates of a request: by what its model's name says behind "@", or its extra arguments `preference` or `gates`."""
        kind, given = one_spelling(in_name, extra, ("preference", "gates")) or ("default", None)
        with about("vllm_xargs" if kind in ("preference", "gates") else kind):
            if kind == "gates":
                if not isinstance(given, list) or len(given) != len(self.ranks):
                    found, remedy = repr(given)[:200], f"one for each of {', '.join(self.adapters)}"
                    raise ConfigError(f"gates are a list of {len(self.ranks)} numbers", found=found, remedy=remedy)
                return np.array([checked("a gate", Gate, one) for one in given], dtype=np.float64)
            asked = self.default if kind == "default" else as_preference(self.default.names, given)
            gates_K = self.rule.gates(asked.w_M[None])[0]
            if gates_K.shape != (len(self.ranks),):
                found = f"rule {self.rule.registered_name!r} gives {gates_K.shape} for {len(self.ranks)} adapters"
                raise ConfigError("a rule gives one gate per adapter", found=found, remedy="use a rule that was made for these adapters")
            return gates_K

    def write(self, folder: str | Path, gates_K: np.ndarray | None = None) -> int:
        """Write one LoRA in PEFT format and return its rank: all adapters side by side, or with `gates_K` the soup at these gates."""
        from peft import LoraConfig

        factors = [read_factors(path) for path in self.adapters.values()]
        tensors, rank = pack_factors(factors, self.ranks, gates_K)
        leaves = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=leaves, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
        write_adapter(Path(folder), config, tensors)
        return rank


def _check_soup(card: Mapping[str, Any], rule: GateRule) -> None:
    """Refuse a family that is not the exact soup of its adapters at every preference, with gates known from the preference alone."""
    named = card["mixing"] if isinstance(card["mixing"], dict) else {"name": card["mixing"]}
    policy: Any = object.__new__(MIXINGS[named["name"]])  # without bank and model: what it is, it says of itself
    policy.__dict__ |= {key: value for key, value in named.items() if key != "name"}
    try:
        made = policy.single_weights(torch.full((len(card["adapters"]),), 0.5))
    except AttributeError:  # of the bank: it is more than a soup
        made = None
    soup = isinstance(made, Weights) and made.how == "delta" and not made.prefix and policy.mixes_per_row
    found = f"rule {rule.registered_name!r}, which looks at the prompt" if rule.per_prompt else "" if soup else f"mixing {named['name']!r}"
    if not card["adapters"]:
        found = "a family without adapters"
    if found:
        raise ConfigError("a server of LoRAs mixes them by one gate each per request", found=f"{found}, which needs more", remedy=EMBEDDED)


def _check_layer(adapter: str, layer: str) -> None:
    """Refuse layers whose product with a LoRA vLLM computes elsewhere than in linear layers."""
    parts = layer.split(".")
    if "experts" in parts or not any(part.isdigit() for part in parts):
        found, rule = f"adapter {adapter!r} on {layer}", "gates of such a server reach linear layers inside the decoder's layers"
        raise ConfigError(rule, found=found, remedy=EMBEDDED)


def pack_factors(
    factors_K: Sequence[Mapping[str, tuple[Tensor, Tensor, float]]], ranks_K: Sequence[int], gates_K: np.ndarray | None = None
) -> tuple[dict[str, Tensor], int]:
    """PEFT's tensors of one LoRA (alpha = r), and its rank: each adapter has its own columns, the same in every layer.

    Scales are multiplied into B, and `gates_K`, too, where they are given; adapters with gate 0 are then left out.
    """
    kept = [k for k in range(len(ranks_K)) if gates_K is None or gates_K[k] != 0] or [0]
    rank = sum(ranks_K[k] for k in kept)
    tensors: dict[str, Tensor] = {}
    for layer in dict.fromkeys(layer for k in kept for layer in factors_K[k]):
        shapes = next(factors_K[k][layer] for k in kept if layer in factors_K[k])
        a_RI, b_OR = torch.zeros(rank, shapes[0].shape[1]), torch.zeros(len(shapes[1]), rank)
        start = 0
        for k in kept:
            if layer in factors_K[k]:
                a_rI, b_Or, scale = factors_K[k][layer]
                a_RI[start : start + len(a_rI)] = a_rI
                b_OR[:, start : start + len(a_rI)] = b_Or * (scale if gates_K is None else scale * float(gates_K[k]))
            start += ranks_K[k]
        tensors[f"base_model.model.{layer}.lora_A.weight"], tensors[f"base_model.model.{layer}.lora_B.weight"] = a_RI, b_OR
    return tensors, rank


@functools.lru_cache(maxsize=4096)
def _gate_row(gates_K: tuple[float, ...], ranks_K: tuple[int, ...], width: int) -> Tensor:
    """(R,) each adapter's gate, as often as it has ranks; 1 beyond them."""
    row_R = torch.ones(width)
    row_R[: sum(ranks_K)] = torch.tensor(gates_K).repeat_interleave(torch.tensor(ranks_K))
    return row_R


def fill_gates(buffer_TR: Tensor, asked_N: Sequence[tuple[Sequence[float], Sequence[int]] | None], tokens_N: Sequence[int]) -> None:
    """Write the gates of a step's tokens into a buffer that stays: N requests, in the order of the batch, with `tokens_N` tokens each.

    `asked_N` are the gates and ranks of a request's adapters; None is a request of another LoRA, or of none, whose gates are 1.
    """
    width = buffer_TR.shape[1]
    rows_NR = torch.stack([torch.ones(width) if one is None else _gate_row(tuple(one[0]), tuple(one[1]), width) for one in asked_N])
    counts_N = torch.as_tensor(np.asarray(tokens_N), dtype=torch.long)
    buffer_TR[: int(counts_N.sum())].copy_(rows_NR.repeat_interleave(counts_N, 0))


@functools.cache
def is_family(path: str) -> bool:
    """Whether a LoRA's path is the folder of a family."""
    return (Path(path) / FAMILY_FILE).is_file()


def families_named(given: str) -> dict[str, Path]:
    """The folders that an environment variable lists, as PATH does, each under its own name."""
    paths = [Path(part).resolve() for part in given.split(os.pathsep) if part]
    return {path.name: path for path in paths}
