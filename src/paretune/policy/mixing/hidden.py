"""Mixings of hidden states: the experts run apart up to a layer, their states are summed with the gates, and the rest runs once.

`hidden` mixes after the final norm, under the model's own head. `hidden-layer` mixes below a layer of one's choice, with the soup of the
adapters above it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from paretune.errors import ConfigError
from paretune.hub import text_config
from paretune.policy.base import MIXINGS, Weights
from paretune.policy.lora.decoder import run_head
from paretune.policy.mixing.parameter import claim_cache
from paretune.policy.mixing.predictions import Stacked, weighted

__all__ = ["HiddenLayerMix", "HiddenMix"]


@MIXINGS.register("hidden")
class HiddenMix(Stacked):
    """The last hidden states of the experts, mixed, under the model's own head (bias, scale and soft cap included).

    Source: EMORL (2505.02579).
    Differs: a cache, and any decoding; the source decodes greedily without a cache.
    Hides: with a shared, frozen, bias-free linear head this IS logit mixing. A head with adapters runs under their soup.
    """

    has_composition_limit = True
    attribution = "product"
    why_many = "it mixes the experts' hidden states, which no single set of weights computes"

    def __init__(self, bank: Any, tokenizer: Any):
        super().__init__(bank, tokenizer)
        self.decoder = self.model.base_model
        if self.decoder is self.model:
            raise ConfigError(
                "hidden-state mixing needs a model made of a decoder and a head",
                found=type(self.model).__name__,
                remedy='load it as a causal LM, or use mixing "logit"',
            )

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        """(K, N, T, H) hidden states after the final norm."""
        with self._stacked(self.bank.blocks(), input_ids_NT, attention_mask, position_ids, cache) as inputs:
            hidden = self.decoder(**inputs).last_hidden_state
        return hidden[:, -int(last_only) :].unflatten(0, (self.K, -1))

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        """The causal LM's own head on the mixed states."""
        with self.bank.gates(gates_NK):
            return run_head(self.model, weighted(parts, gates_NK).to(parts.dtype))


@MIXINGS.register("hidden-layer")
class HiddenLayerMix(HiddenMix):
    """Up to `layer` each expert runs alone; their hidden states are mixed with the gates; the layers above run once, under the soup.

    Layer 0 is mixing "parameter" (nothing has been computed apart). The number of layers L is mixing "hidden": mixed after the final
    norm. In between, the states that enter decoder layer `layer` are summed. Forwards per token: (layer K + L - layer) / L.
    Source: EMORL (2505.02579) mixes the last states; layers below are our extension.
    Differs: a layer of one's choice, with a cache: K * N rows for the layers below, N rows above.
    Hides: gates that do not sum to 1 scale the residual stream, except at layer 0. Above the layer the keys and values belong to the
        gates, so that, as with a soup, nothing is shared over preferences.
    """

    parts_need_gates = True
    has_composition_limit = False
    attribution = "shapley"

    def __init__(self, bank: Any, tokenizer: Any, *, layer: int):
        super().__init__(bank, tokenizer)
        count = text_config(self.model.config).num_hidden_layers
        stacks = [m for m in self.decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if not stacks:
            raise ConfigError(
                "hidden-state mixing below the last layer needs a decoder with one list of layers",
                found=f"no list of {count} modules in {type(self.decoder).__name__}",
                remedy='use mixing "hidden" or "logit"',
            )
        if isinstance(layer, bool) or not 0 <= layer <= count:
            raise ConfigError(
                f"hidden states are mixed at a layer from 0 (the soup) to {count} (after the final norm)",
                found=f"layer = {layer}",
                remedy=f"this model has {count} layers",
            )
        self.layers, self.layer = stacks[0], int(layer)

    @property
    def settings(self) -> dict[str, Any]:
        return {"layer": self.layer}

    def single_weights(self, gates_K: Tensor) -> Weights | str:
        return super().single_weights(gates_K) if self.layer else Weights("delta", gates_K)

    @property
    def copies(self) -> int:
        """Rows of the input per row; the layers above the mixing see one row per row."""
        return self.K if self.layer else 1

    @property
    def forwards_per_token(self) -> float:
        return (self.layer * self.K + len(self.layers) - self.layer) / len(self.layers)

    def parts(self, input_ids_NT, attention_mask=None, position_ids=None, cache=None, gates_NK=None, last_only=False):
        """(N, T, V) logits."""
        if cache is not None:
            claim_cache(cache, gates_NK)
        if self.layer == len(self.layers):
            states = super().parts(input_ids_NT, attention_mask, position_ids, cache, gates_NK, last_only)
            kept = gates_NK[:, -int(last_only) :] if last_only and gates_NK.dim() == 3 else gates_NK
            return super().combine(states, kept)
        with self.bank.gates(gates_NK), self._mixing(gates_NK, len(input_ids_NT)):
            return self._logits(self._inputs(self.copies, input_ids_NT, attention_mask, position_ids, cache), last_only)

    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        return parts

    @contextlib.contextmanager
    def _mixing(self, gates_NK: Tensor, n: int):
        """While this is open, the layers below `layer` run in blocks, one per adapter, and the first one above mixes what it is given."""
        if self.layer == 0:
            yield
            return
        apart, rows = contextlib.ExitStack(), self.K * n

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            apart.enter_context(self.bank.blocks())

        def mix(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            apart.close()
            states = args[0] if args else kwargs["hidden_states"]
            mixed = weighted(states.unflatten(0, (self.K, -1)), gates_NK).to(states.dtype)
            args, kwargs = narrow(module, args, kwargs)
            return ((mixed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mixed})

        def narrow(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return _first_rows(args, rows, n), {key: _first_rows(value, rows, n) for key, value in kwargs.items()}

        with contextlib.ExitStack() as hooks:
            hooks.callback(apart.close)
            for number, module in enumerate(self.layers):
                if number == 0:
                    hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                if number >= self.layer:
                    hook = mix if number == self.layer else narrow
                    hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def _first_rows(value: Any, rows: int, n: int) -> Any:
    """Masks and positions of the first block: all blocks have the same. Vectors are per token, not per row."""
    if isinstance(value, torch.Tensor):
        return value[:n] if value.dim() > 1 and value.shape[0] == rows else value
    return tuple(_first_rows(part, rows, n) for part in value) if isinstance(value, tuple) else value
