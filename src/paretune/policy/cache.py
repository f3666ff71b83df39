"""Keys and values of rows that are decoded: a layer with room, so that a token is written in its place instead of all being copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

__all__ = ["Roomy", "by_row", "joint_cache", "with_room"]

ROOM = 64  # columns: so many tokens are drawn before everything is copied once


class Roomy(DynamicLayer):
    """A layer of a cache whose keys and values lie in larger tensors. Who puts others in their place has them copied at the next token."""

    keys: Tensor
    values: Tensor
    _room: tuple[Tensor, Tensor] | None = None
    _mine: tuple[Tensor, Tensor] | None = None  # keys and values as they were made here, from the column `_start` to `_end`
    _start = _end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new columns behind the others."""
        count = key_states.shape[-2]
        if self._room is None or not self._is_mine() or self._end + count > self._room[0].shape[-2]:
            self._move(count)
        assert self._room is not None
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, self._end : self._end + count] = states
        self._show(self._start, self._end + count)
        return self.keys, self.values

    def drop(self, columns: int) -> None:
        """Leave out the first columns."""
        if self._room is not None and self._is_mine():
            self._show(self._start + columns, self._end)
        else:
            self.keys, self.values = self.keys[:, :, columns:], self.values[:, :, columns:]

    def _is_mine(self) -> bool:
        return self._mine is not None and self.keys is self._mine[0] and self.values is self._mine[1]

    def _move(self, count: int) -> None:
        length = self.keys.shape[-2]
        room = []
        for states in (self.keys, self.values):
            made = states.new_empty((*states.shape[:2], length + max(count, ROOM), states.shape[3]))
            made[:, :, :length] = states
            room.append(made)
        self._room = room[0], room[1]
        self._show(0, length)

    def _show(self, start: int, end: int) -> None:
        assert self._room is not None
        self._start, self._end = start, end
        self.keys, self.values = self._mine = self._room[0][:, :, start:end], self._room[1][:, :, start:end]


def with_room(cache: Any) -> Any:
    """The cache, its plain layers with room."""
    for at, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            roomy = Roomy()
            roomy.__dict__.update(layer.__dict__)
            cache.layers[at] = roomy
    return cache


def joint_cache(one: Any, two: Any, n_one: int, n_two: int) -> Any:
    """The second batch's rows behind the first's in one cache, keys and values padded on the left to the longer length."""
    width = max(one.get_seq_length(), two.get_seq_length())
    for mine, other in zip(one.layers, two.layers, strict=True):
        for name in ("keys", "values"):
            parts = [by_row(getattr(layer, name), n) for layer, n in ((mine, n_one), (other, n_two))]
            padded = [functional.pad(part, (0, 0, width - part.shape[3], 0)) for part in parts]
            setattr(mine, name, torch.cat(padded, 1).flatten(0, 1))
    return one


def by_row(states: Tensor, n: int) -> Tensor:
    """(copies, N, heads, T, width) of a cache's states: a policy that stacks its experts has several blocks of N rows."""
    return states.unflatten(0, (-1, n))
