"""Decoder layers of a causal LM: a shared trunk for several experts, the head alone, activation checkpointing, and routed gates.

`branched` runs the layers below the first adapted one once for all experts. Embeddings, these layers and their keys and values are common
to experts whose adapters begin at layer `first`. The model takes N rows, and each becomes `copies` rows where layer `first` begins, block
by block as `LoraBank.blocks` wants them. A cache then holds N rows below, and `copies` * N rows from there on. Layers whose arguments
are known here are branched (Llama, Mistral, Qwen, Phi-3, Gemma 2 and others of their form), under attention that takes its mask as a
tensor. Others run stacked from the embeddings on: the same numbers, more slowly.

`routed` sets gates from hidden states: a router is called as `router(h_NTH, w_NM)` at the input of its decoder layer. It returns gates of
shape (N, T, K), and these hold up to the next router's layer.

    with routed(bank, {0: router}, w_NM):                one router, at the input of the first decoder layer
    with routed(bank, dict(enumerate(routers)), w_NM):   a router for every layer

A token's gates depend on its own hidden state, so that a key-value cache stays valid for rows of the same preference. Gradients reach the
routers, the adapters and w.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from paretune.errors import ConfigError
from paretune.hub import text_config

if TYPE_CHECKING:
    from paretune.policy.lora.bank import LoraBank
from collections.abc import Callable, Mapping
from functools import partial

from paretune.policy.lora.bank import LoraBank
from paretune.policy.lora.layers import Routed
from paretune.policy.lora.linear import numbers

__all__ = ["Router", "branch_point", "branched", "layer_input", "recomputed", "routed", "run_head", "stacked_share"]

# Arguments of a decoder layer that have a row per sequence, and those that have not.
PER_ROW = frozenset({"attention_mask", "position_ids", "position_embeddings"})


OTHERS = frozenset({"self", "hidden_states", "past_key_values", "layer_past", "use_cache", "kwargs"})


def branch_point(bank: LoraBank) -> int:
    """The decoder layer where the experts of `bank` begin to differ; 0 where nothing can be shared."""
    first = min((-1 if layer.depth is None else layer.depth for layer in bank.layers), default=0)
    if not 0 < first < len(bank.stack) or text_config(bank.base.config)._attn_implementation not in ("eager", "sdpa"):
        return 0
    return first if all(_known(type(layer).forward) for layer in bank.stack[first:]) else 0


@functools.cache
def _known(forward: Any) -> bool:
    return set(inspect.signature(forward).parameters) <= PER_ROW | OTHERS


def stacked_share(bank: LoraBank) -> float:
    """The share of a forward's weights that every expert runs for itself: the layers from the branch point on, and the head."""
    first = branch_point(bank)
    if first == 0:
        return 1.0
    sizes = [sum(numbers(p) for name, p in layer.named_parameters() if "lora_" not in name) for layer in bank.stack]
    head = numbers(bank.base.get_output_embeddings().weight)
    return (sum(sizes[first:]) + head) / (sum(sizes) + head)


@contextlib.contextmanager
def branched(layers: Sequence[Any], first: int, copies: int) -> Iterator[None]:
    """For one forward of N rows: at layer `first` they become `copies` blocks of N rows."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the original stays alive, so that its id stays its own
    rows = 0

    def repeated(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(repeated(part) for part in value)
        if not isinstance(value, Tensor) or value.shape[0] != rows:  # None, or one row for all
            return value
        if id(value) not in made:
            made[id(value)] = value, value.repeat(copies, *[1] * (value.dim() - 1))
        return made[id(value)][1]

    def enter(at: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal rows
        h_NTH = layer_input(args, kwargs)
        assert len(args) <= 1, "decoder layers are called with keywords"
        if at == first:
            rows = len(h_NTH)
            h_NTH = h_NTH.repeat(copies, 1, 1)
        kept = {key: repeated(value) if key in PER_ROW else value for key, value in kwargs.items() if key != "hidden_states"}
        return (h_NTH,), kept

    hooks = [layers[at].register_forward_pre_hook(functools.partial(enter, at), with_kwargs=True) for at in range(first, len(layers))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_head(model: Any, h_NTH: Tensor) -> Tensor:
    """(N, T, V) logits of the states that a causal LM's decoder ends with.

    It is the model's own forward, its decoder replaced for one call by the states: whatever its head does (scale, soft cap), it does here.
    """
    decoder = decoder_of(model)
    own = decoder.__dict__.get("forward")  # libraries that place a model on devices put theirs here
    decoder.__dict__["forward"] = lambda *_, **__: _States(h_NTH)
    try:
        return model(input_ids=h_NTH.new_zeros(h_NTH.shape[:2], dtype=torch.long), use_cache=False).logits
    finally:
        del decoder.__dict__["forward"]
        if own is not None:
            decoder.__dict__["forward"] = own


def decoder_of(model: Any) -> Any:
    """The module that a causal LM calls for its states: `get_decoder()` where that is one below it and no head, else `base_model`."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model.base_model if found is None or found is model or found is model.get_output_embeddings() else found


class _States:
    """What a decoder returns, of the states alone: a head that asks for more (router logits, attentions) finds None."""

    def __init__(self, h_NTH: Tensor):
        self.last_hidden_state = h_NTH

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def get(self, name: str, default: Any = None) -> Any:
        """As of a mapping."""
        return getattr(self, name) if name == "last_hidden_state" else default


@contextlib.contextmanager
def recomputed(bank: LoraBank) -> Iterator[None]:
    """For forwards without a cache: decoder layers keep only their input, and run again in the backward, under the same gates.

    The backward may come after the context. ConfigError where it is not clear which modules are the decoder's layers.
    """
    if not bank.stack:
        raise ConfigError(
            "activation checkpointing needs to know the decoder's layers",
            found=f"no list of layers that is the decoder's in {type(bank.base).__name__}",
            remedy="set checkpointing=false, and lower micro_batch or micro_tokens instead",
        )

    def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
        mode = bank.present_mode
        again = functools.partial(contextlib.nullcontext) if mode is None else functools.partial(bank.mode, mode)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again()), **kwargs)

    owned = [layer.__dict__.get("forward") for layer in bank.stack]
    for layer in bank.stack:
        layer.__dict__["forward"] = functools.partial(run, layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(bank.stack, owned, strict=True):
            del layer.__dict__["forward"]
            if own is not None:
                layer.__dict__["forward"] = own


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a decoder layer."""
    return args[0] if args else kwargs["hidden_states"]


Router = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def routed(bank: LoraBank, routers: Mapping[int, Router], w_NM: Tensor) -> Iterator[None]:
    """Within, a forward runs under the gates of `routers`: that of decoder layer l holds from l on, up to the next one's layer.

    Below the first router no adapter acts; a router that returns constants sets fixed gates there.
    """
    lost = [layer.name for layer in bank.layers if layer.depth is None]
    if lost or not bank.stack:
        raise ConfigError(
            "routers need to know the decoder layer of every adapter",
            found=f"{lost[0]} is in none" if lost else f"no list of layers that is the decoder's in {type(bank.base).__name__}",
            remedy="target linear layers inside the decoder's layers, or set gates by `bank.gates`",
        )
    if not routers or not set(routers) <= set(range(len(bank.stack))):
        raise ConfigError(
            "each router stands at a decoder layer",
            found=f"routers at {sorted(routers)} for a model of {len(bank.stack)} layers",
            remedy="number them from 0, the input of the first layer",
        )
    mode = Routed(list(routers))
    hooks = [
        bank.stack[start].register_forward_pre_hook(partial(_route, bank.count, mode, start, router, w_NM), with_kwargs=True)
        for start, router in routers.items()
    ]
    try:
        with bank.mode(mode):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _route(
    count: int, mode: Routed, start: int, router: Router, w_NM: Tensor, _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    h_NTH = layer_input(args, kwargs)
    gates_NTK = router(h_NTH, w_NM)
    if gates_NTK.shape != (*h_NTH.shape[:2], count):
        raise ConfigError(
            "a router gives every token a gate per adapter",
            found=f"gates {tuple(gates_NTK.shape)} for hidden states {tuple(h_NTH.shape)} and {count} adapters",
            remedy="return a tensor of shape (rows, tokens, adapters)",
        )
    mode.set(start, gates_NTK)
