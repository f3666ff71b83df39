"""The parameter level with a learned router at every decoder layer: gates per token, from the hidden state and the preference."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paretune.errors import ConfigError
from paretune.lora import LoraBank
from paretune.mixing.levels import ParameterMix, _own
from paretune.policy import LEVELS
from paretune.routing import routed
from paretune.seeds import generator

__all__ = ["ROUTER_FILE", "RoutedMix"]

ROUTER_FILE = "router.safetensors"


@LEVELS.register("routed")
class RoutedMix(ParameterMix):
    """A mixture of the adapters whose gates are those of the rule plus what a small network per layer corrects, token by token.

    gates(h, g) = g + i(g) * up tanh(down [h / rms(h), g, 1]), with i(g) = M/(M-1) * (1 - sum of the first M gates squared): nothing at the
    vertices, whose experts stay alone, and nothing before training, when `up` is 0. The gates that a row comes with must be those of a
    preference: the first `experts` of them are its weights. `seed` names the start of `down`.

    Source: ours; a mixture of LoRA experts with gates from hidden states as in X-LoRA (2402.07148).
    Differs: conditioned on a preference, zero at the vertices, no softmax: gates may be negative or sum to more than 1.
    Hides: the router of the first layer sees a token's embedding only; adapters outside the decoder's layers are refused.
    """

    def __init__(self, bank: LoraBank, tokenizer: Any, *, experts: int, width: int = 32, seed: int = 0):
        super().__init__(bank, tokenizer)
        if not 2 <= experts <= bank.count or width < 1:
            raise ConfigError(
                "a router corrects the gates of at least two experts, with a width of at least 1",
                found=f"experts = {experts} of {bank.count} adapters, width = {width}",
                remedy="name the number of objectives as experts",
            )
        self._given = {"experts": experts, "width": width, "seed": seed}
        inputs = self.model.config.get_text_config().hidden_size + bank.count + 1
        self._layers: list[tuple[Tensor, Tensor]] = []
        for layer in range(len(bank.stack)):
            drawn = generator(seed, "router", layer).normal(size=(width, inputs)) / np.sqrt(inputs)
            down = torch.tensor(drawn, dtype=torch.float32, device=self.device, requires_grad=True)
            up = torch.zeros(bank.count, width, dtype=torch.float32, device=self.device, requires_grad=True)
            self._layers.append((down, up))

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self._given)

    def parameters(self) -> list[Tensor]:
        return [*self.bank.parameters(), *(tensor for pair in self._layers for tensor in pair)]

    def save_extra(self, folder: Path) -> None:
        from safetensors.torch import save_file

        names = {f"{layer}.{name}": t for layer, pair in enumerate(self._layers) for name, t in zip(("down", "up"), pair, strict=True)}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in names.items()}, folder / ROUTER_FILE)

    def load_extra(self, folder: Path) -> None:
        from safetensors.torch import load_file

        found = load_file(folder / ROUTER_FILE)
        with torch.no_grad():
            for layer, (down, up) in enumerate(self._layers):
                down.copy_(found[f"{layer}.down"])
                up.copy_(found[f"{layer}.up"])

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        if gates_NK is None or gates_NK.dim() != 2:
            raise ConfigError(
                "a router corrects one row of gates per row of the batch",
                found="no gates" if gates_NK is None else f"gates {tuple(gates_NK.shape)}",
                remedy="give the gates of each row's preference, (rows, adapters)",
            )
        if cache is not None:
            _own(cache, gates_NK)
        routers = {layer: partial(self._gates, layer) for layer in range(len(self._layers))}
        with routed(self.bank, routers, gates_NK):
            return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), last_only)

    def _gates(self, layer: int, h_NTH: Tensor, gates_NK: Tensor) -> Tensor:
        """(N, T, K)."""
        down, up = self._layers[layer]
        gates_NK = gates_NK.to(down.dtype)
        m = self._given["experts"]
        mixed_N11 = (m / (m - 1) * (1 - (gates_NK[:, :m] ** 2).sum(1)))[:, None, None]
        h_NTH = h_NTH.to(down.dtype)
        h_NTH = h_NTH * torch.rsqrt((h_NTH**2).mean(-1, keepdim=True) + 1e-6)
        gates_NTK = gates_NK[:, None].expand(-1, h_NTH.shape[1], -1)
        seen = torch.cat([h_NTH, gates_NTK, torch.ones_like(gates_NTK[..., :1])], dim=-1)
        return gates_NTK + mixed_N11 * functional.linear(torch.tanh(functional.linear(seen, down)), up)
