"""A policy: one model, one bank of adapters, and the mixing that combines them. The mixings stand in `paretune.policy.mixing`.

Every policy answers the same call, with a gate per row of the batch and adapter:

    logits_NTV = policy.forward(ids_NT, attention_mask=mask, gates_NK=gates)

which is `combine(parts(...), gates)`. Parts are expensive; at the logit and hidden mixings they do not depend on the gates, so that one
computation of them serves many preferences. A softmax over V of the result is the policy; rows of logits are defined up to a constant.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.hub import text_config
from paretune.policy.lora.bank import LoraBank, soup_weight
from paretune.policy.lora.layers import FusedLayer
from paretune.policy.lora.shard import states
from paretune.registry import Registry
from paretune.tasks.base import Task, first_device, reference

__all__ = ["ATTRIBUTIONS", "MIXINGS", "Policy", "Weights", "build_mixing", "build_policy"]

MIXINGS = Registry("mixing", "paretune.policy.mixing")
ATTRIBUTIONS = ("product", "path", "shapley")  # how a token may be credited to the adapters: see `evaluation.explain`


@dataclass(frozen=True)
class Weights:
    """One set of weights that computes a policy at some gates: the base model and `how` its adapters change it.

    `how` is "delta" (the exact soup), "factor" (the soup of the factors), "merge" (dense, see `Policy.merged_weight`) or "base" (no
    change). `prefix` are ids of tokens that stand before every prompt.
    """

    how: str
    gates_K: Tensor
    prefix: tuple[int, ...] = ()


class Policy(ABC):
    """What samples text and scores tokens: the base of all mixings. `registered_name` (also `mixing`) names the class in MIXINGS.

    `parts` and `combine` are all that a mixing must have. The attributes below and `single_weights` say what it is, to those who export,
    explain, evaluate or search; `paretune.testing.mixings.check_mixing` proves what they say.
    """

    registered_name: ClassVar[str]
    version: ClassVar[int]
    parts_need_gates: ClassVar[bool] = False
    one_forward: ClassVar[bool] = False  # True: parts are the logits of one forward of the model
    token_gates: ClassVar[bool] = False  # True: gates may differ between the tokens of a row, (N, T, K)

    vertices_are_experts: bool = True  # gates e_k are adapter k alone
    symmetric: bool = True  # it does not matter in which order the adapters come
    mixes_per_row: bool = True  # False: one gate vector for a whole batch
    stepwise: bool = False  # gates that are near each other are the same policy
    zero_is_reference: bool = False  # gates that are all 0 are the reference
    has_composition_limit: bool = False  # what mixing loses with optimal experts is known: see `evaluation.evaluate`
    attribution: str = "shapley"  # how a token is credited to the adapters: one of ATTRIBUTIONS
    trains_only: bool = False  # it is for trainings; what it leaves is used at mixing "parameter"
    why_many: str = "it combines its adapters in a way that no single set of weights computes"  # between the experts

    def __init__(self, bank: LoraBank, tokenizer: Any):
        self.bank, self.tokenizer, self.model = bank, tokenizer, bank.base
        for config in (self.model.config, text_config(self.model.config)):
            if getattr(config, "output_router_logits", False):  # of an auxiliary loss, which is not trained here and takes no cache
                config.output_router_logits = False
        self.eos_ids = _eos_ids(self.model, tokenizer)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = int(self.eos_ids[0] if pad is None else pad)
        self._headless = False

    @property
    def mixing(self) -> str:
        return self.registered_name

    @property
    def settings(self) -> dict[str, Any]:
        """What the mixing's constructor was given beside bank and tokenizer: JSON, written into the family's file."""
        return {}

    @property
    def K(self) -> int:
        return self.bank.count

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def copies(self) -> int:
        """Rows of the model's batch (and of the cache) per row of the policy's."""
        return 1

    @property
    def forwards_per_token(self) -> float:
        return float(self.copies)

    def parameters(self) -> list[Tensor]:
        """What a training of this policy trains: the bank's trainable tensors, and what a mixing has beside them."""
        return self.bank.parameters()

    def commit(self) -> None:  # noqa: B027
        """Write into the bank's adapters what was trained in their place; most mixings train the adapters themselves."""

    def save_extra(self, folder: Path) -> None:  # noqa: B027
        """Write into `folder` what the mixing has learned beside adapters; most have nothing."""

    def load_extra(self, folder: Path) -> None:  # noqa: B027
        """Read it back."""

    def single_weights(self, gates_K: Tensor) -> Weights | str:
        """The one set of weights that computes the policy at these gates for every prompt; or, in words, why there is none."""
        return Weights("delta", gates_K) if self.vertices_are_experts and one_alone(gates_K) else self.why_many

    def merged_weight(self, layer: FusedLayer, weights: Weights) -> Tensor:
        """The weight of one layer under `weights`, in float32 or wider."""
        return soup_weight(layer, weights.gates_K, how=weights.how)

    @property
    def extra_positions(self) -> int:
        """Tokens that the policy itself puts before each prompt."""
        return 0

    @abstractmethod
    def parts(
        self,
        input_ids_NT: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        gates_NK: Tensor | None = None,
        last_only: int = False,
    ) -> Tensor:
        """What the model must compute. Where `parts_need_gates`, the gates are given; elsewhere they are not looked at.

        `attention_mask` is (N, cached + T), 1 for real tokens, or a (N or 1, 1, T, cached + T) mask: bool (True may be looked at) or
        additive. `position_ids` default to counting the real tokens; a 4-D mask needs them given. `cache` comes from `new_cache`
        and grows. `last_only` keeps the last position alone (a number: that many of the last).
        """

    @abstractmethod
    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        """(N, T, V) logits of the mixture: cheap."""

    def forward(
        self,
        input_ids_NT: Tensor,
        *,
        gates_NK: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        last_only: int = False,
    ) -> Tensor:
        """(N, T, V) logits; `gates_NK=None` is the reference at every mixing (its cache then has N rows)."""
        if gates_NK is None:
            with self.bank.gates(None):
                return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), last_only)
        gates_NK = torch.as_tensor(gates_NK, device=self.device)
        if gates_NK.shape[:-1] not in {input_ids_NT.shape[:1], input_ids_NT.shape} or gates_NK.shape[-1] != self.K:
            raise ConfigError(
                "a policy takes one row of gates per row of the batch, one column per adapter",
                found=f"gates {tuple(gates_NK.shape)} for a batch {tuple(input_ids_NT.shape)} and {self.K} adapters",
                remedy="repeat each prompt's gates for each of its samples",
            )
        parts = self.parts(input_ids_NT, attention_mask, position_ids, cache=cache, gates_NK=gates_NK, last_only=last_only)
        if last_only and gates_NK.dim() == 3:
            gates_NK = gates_NK[:, -int(last_only) :]
        return self.combine(parts, gates_NK)

    @functools.cached_property
    def has_plain_cache(self) -> bool:
        """Whether the cache is that of plain attention: keys and values that can be repeated, joined, cut and differentiated through."""
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in getattr(self.new_cache(1), "layers", [None]))

    @functools.cached_property
    def reads_any_mask(self) -> bool:
        """Whether a 4-D mask and position ids are all that attention goes by: so that several texts may lie in one sequence.

        Not where attention has a window or biases by distance, and not where the model fails a try on two short texts.
        """
        text = text_config(self.model.config)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "alibi")]
        plain = kinds == {"full_attention"} and not any(windows) and text._attn_implementation in ("eager", "sdpa")
        return plain and self.has_plain_cache and self._reads_texts_apart()

    def _reads_texts_apart(self) -> bool:
        """Whether two texts in one sequence, masked from each other, get the logits that they get alone."""
        one, two = torch.arange(3, device=self.device)[None], torch.arange(1, 3, device=self.device)[None]
        positions = torch.cat([one, torch.arange(2, device=self.device)[None]], 1)
        mask = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(2, 2).tril()).bool().to(self.device)[None, None]
        with torch.inference_mode(), self.bank.gates(None):
            try:
                both = self._logits(self._inputs(1, torch.cat([one, two], 1), mask, positions, None), 0)[0].float()
                alone = torch.cat([self._logits(self._inputs(1, ids, None, None, None), 0)[0].float() for ids in (one, two)])
            except Exception:  # of the model's own code, which reads masks in another way
                return False
        spread = max(float(alone.std(-1).mean()), 1e-2)  # small random weights say all tokens alike
        return bool((both - alone).abs().max() < spread * (1e-4 if self.bank.rounding == torch.float32 else 5e-2))

    def new_cache(self, n_rows: int) -> Any:
        """An empty key-value cache for `n_rows` rows of the policy (it holds `copies * n_rows` rows of the model)."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @property
    def splits_head(self) -> bool:
        """Whether the policy's logits are the model's own head of states that `headless` gives: then they may be made piece by piece."""
        return self.one_forward and self.has_own_head

    @property
    def has_own_head(self) -> bool:
        """Whether the model is a decoder and a head without adapters, the same for all rows."""
        adapted = any(layer.module is self.model.get_output_embeddings() for layer in self.bank.layers)
        return self.model.base_model is not self.model and not adapted

    @contextlib.contextmanager
    def headless(self) -> Iterator[None]:
        """Within, a forward gives the states that the head is given, (N, T, H), instead of logits; `decoder.run_head` goes on."""
        assert self.splits_head
        self._headless = True
        try:
            yield
        finally:
            self._headless = False

    def _inputs(self, copies: int, ids_NT: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> dict[str, Any]:
        """The model's keyword arguments, every row repeated `copies` times, block by block."""
        past = 0 if cache is None else cache.get_seq_length()
        if mask is not None and mask.dim() == 4:
            assert positions is not None, "a 4-D mask does not say the positions"
            if not mask.is_floating_point():  # attention implementations read a bool mask differently; all read an additive one alike
                mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask.bool(), torch.finfo(self.model.dtype).min)
            mask = mask.to(self.model.dtype)
        elif positions is None:
            if mask is None:
                positions = torch.arange(past, past + ids_NT.shape[1], device=ids_NT.device).expand_as(ids_NT)
            else:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        self.bank.expect(ids_NT.shape[1])
        if copies > 1:
            ids_NT = ids_NT.repeat(copies, 1)
            positions = positions.repeat(copies, 1) if positions is not None and positions.shape[0] > 1 else positions
            if mask is not None and (mask.dim() == 2 or mask.shape[0] > 1):  # a 4-D mask of one row is for all rows
                mask = mask.repeat(copies, *[1] * (mask.dim() - 1))
        return {
            "input_ids": ids_NT,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    def _logits(self, inputs: dict[str, Any], last_only: int) -> Tensor:
        """The model's own logits; only those of the last `last_only` positions are computed; 0 is all."""
        if self._headless:
            return states(self.model, inputs)[:, -int(last_only) :]
        return self.model(**inputs, logits_to_keep=int(last_only)).logits


def one_alone(gates_K: Tensor) -> bool:
    """Whether one gate is 1 and all others are 0."""
    wanted = torch.zeros_like(gates_K.double())
    wanted[gates_K.argmax()] = 1.0
    return torch.allclose(gates_K.double(), wanted, rtol=0, atol=1e-9)


def build_mixing(mixing: str | Mapping[str, Any], bank: LoraBank, tokenizer: Any) -> Policy:
    """The policy of a mixing, given as its name or as {"name": ..., setting: value, ...}."""
    settings = {"name": mixing} if isinstance(mixing, str) else dict(mixing)
    return MIXINGS[settings.pop("name")](bank, tokenizer, **settings)


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response: those of the generation settings, then the tokenizer's."""
    found: list[int] = []
    for where in (model.generation_config, model.config, text_config(model.config), tokenizer):
        given = getattr(where, "eos_token_id", None)
        for number in given if isinstance(given, (list, tuple)) else [given]:
            if number is not None and int(number) not in found:
                found.append(int(number))
    if not found:
        raise ConfigError(
            "a policy needs to know how a response ends", found="no EOS id in the model or tokenizer", remedy="set tokenizer.eos_token"
        )
    return tuple(found)


def build_policy(task: Task, mixing: str | Mapping[str, Any], adapters: Mapping[str, Any]) -> Policy:
    """The policy over a fresh copy of a task's reference model with these adapters (axis K in their order); see `build_mixing`.

    It is on the first GPU where there is one, as trainings are: a model that trains there is searched and measured there.
    """
    device = first_device()
    model, tokenizer = reference(task, device=device, place=lambda model: model if model.device.type == device else model.to(device))
    return build_mixing(mixing, LoraBank.load(model, adapters), tokenizer)
