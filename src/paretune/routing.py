"""Gates that the model makes while it runs: routers read hidden states and the preference, and set the gates of the layers above.

    with routed(bank, {0: router}, w_NM):            one router, at the input of the first decoder layer
    with routed(bank, dict(enumerate(routers)), w_NM):                a router for every layer

A router is called as `router(h_NTH, w_NM)` and returns gates of shape (N, T, K). One forward does it all: gates are numbers between A and
B of each adapter. A token's gates depend on that token's own hidden state, so that a cache stays true; it belongs to its preferences, as
at the parameter level to its gates. Gradients reach the routers, the adapters and w.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from paretune.errors import ConfigError
from paretune.fused import Routed
from paretune.lora import LoraBank
from paretune.trunk import layer_input

__all__ = ["Router", "routed"]

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
