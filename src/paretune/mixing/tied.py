"""The parameter level in training, with adapters that share both factors and differ in a small core: bilinear low-rank adaptation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.lora import LoraBank
from paretune.mixing.levels import ParameterMix
from paretune.policy import LEVELS
from paretune.seeds import generator

__all__ = ["TiedMix"]


@LEVELS.register("tied")
class TiedMix(ParameterMix):
    """The soup of adapters of which all but the first `own` share A and B: adapter k adds B C_k A, with a core C_k of its own.

    What is trained are A, B and the cores; `commit` writes each adapter as the plain LoRA with the factors B C_k and A. So a family is
    used at the parameter level, and nothing but a training needs this one. `seed` names the start of the cores.

    Source: PBLoRA (PARM, 2505.06274), in whose code B C(w) A with C(w) = sum_k w_k C_k stands beside a low-rank part that ignores w.
    Differs: nothing in the formula; cores start uniform within 1 / rank, as there.
    Hides: all preferences move within the one column space of B and the one row space of A.
    """

    def __init__(self, bank: LoraBank, tokenizer: Any, *, own: int = 1, seed: int = 0):
        super().__init__(bank, tokenizer)
        self._given = {"own": own, "seed": seed}
        tied = range(own, bank.count)
        if own < 0 or len(tied) < 2 or not set(bank.names[own:]) <= set(bank.trainable):
            raise ConfigError(
                "at least two adapters share factors, and all of these are trained",
                found=f"own = {own} of {bank.count} adapters, trained: {', '.join(bank.trainable) or 'none'}",
                remedy="train two fresh adapters or more together",
            )
        self._free = [tensor for k in range(own) for tensor in bank.parameters_of(k) if tensor.requires_grad]
        self._parts: list[tuple[Any, list[int], Tensor, Tensor, list[Tensor]]] = []  # layer, places in it, A, B, cores
        for depth, layer in enumerate(bank.layers):
            places = [layer.members.index(k) for k in tied]
            first = places[0]
            if len({layer.ranks[i] for i in places}) > 1:
                raise ConfigError(
                    "adapters that share factors have one rank",
                    found=f"ranks {[layer.ranks[i] for i in places]}",
                    remedy="ask for fresh adapters of one rank",
                )
            rank, a_rI = layer.ranks[first], layer.a[first]
            b_Or = torch.zeros_like(layer.b[first], requires_grad=True)
            drawn = generator(seed, "cores", depth).uniform(-1, 1, size=(len(places), rank, rank)) / rank
            cores = [torch.tensor(core, dtype=a_rI.dtype, device=a_rI.device, requires_grad=True) for core in np.asarray(drawn)]
            for i in places:
                layer.a[i] = a_rI
            self._parts.append((layer, places, a_rI, b_Or, cores))

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self._given)

    def parameters(self) -> list[Tensor]:
        return [*self._free, *(tensor for _, _, a_rI, b_Or, cores in self._parts for tensor in (a_rI, b_Or, *cores))]

    def parts(self, *args: Any, **kwargs: Any) -> Tensor:
        for layer, places, _, b_Or, cores in self._parts:
            for i, core in zip(places, cores, strict=True):
                layer.b[i] = b_Or @ core
        return super().parts(*args, **kwargs)

    def commit(self) -> None:
        with torch.no_grad():
            for layer, places, a_rI, b_Or, cores in self._parts:
                labels = [list(layer.module.lora_A)[i] for i in places]
                for label, core in zip(labels, cores, strict=True):
                    layer.module.lora_A[label].weight.copy_(a_rI)
                    layer.module.lora_B[label].weight.copy_(b_Or @ core)
