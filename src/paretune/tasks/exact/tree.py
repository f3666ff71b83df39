"""The prefix tree of all responses: every prefix computed once, every response's probability exactly.

Nodes are numbered breadth first: level d holds the A**d prefixes of d symbols, in base-A order. A *response* is a node of the
full tree of depth L: a node above depth L ends with EOS, a node at depth L is cut by the length limit. So responses and nodes
share one numbering, R = (A**(L+1) - 1) / (A - 1), and the I = (A**L - 1) / (A - 1) nodes above depth L are those that a policy
must continue. Axis I below is that of the internal nodes; V = A + 1, the last symbol being EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

__all__ = ["PrefixTree", "TreeInputs"]


@dataclass(frozen=True)
class TreeInputs:
    """One sequence per prompt: the prompt, then every internal node but the root; what a causal LM's forward takes."""

    input_ids_PT: torch.Tensor
    position_ids_PT: torch.Tensor
    mask_11TT: torch.Tensor  # additive float32: 0 where a token may look, the most negative float elsewhere
    prompt_length: int


@dataclass(frozen=True)
class PrefixTree:
    """All responses of up to `length` symbols over an alphabet of `alphabet` symbols; EOS is symbol number `alphabet`."""

    alphabet: int
    length: int

    @property
    def eos(self) -> int:
        return self.alphabet

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """starts[d] is the first node of level d; d runs to length + 1."""
        sizes = [self.alphabet**d for d in range(self.length + 1)]
        return tuple(np.cumsum([0, *sizes]).tolist())

    @property
    def internal(self) -> int:
        return self.starts[self.length]

    @property
    def responses(self) -> int:
        return self.starts[self.length + 1]

    @cached_property
    def symbols_RL(self) -> np.ndarray:
        """(R, L) int64: the symbols of every response, -1 after its end (EOS is not written)."""
        symbols = np.full((self.responses, self.length), -1, dtype=np.int64)
        for depth in range(1, self.length + 1):
            number = np.arange(self.alphabet**depth)
            for place in range(depth):
                symbols[self.starts[depth] : self.starts[depth + 1], place] = number // self.alphabet ** (depth - 1 - place) % self.alphabet
        return symbols

    @cached_property
    def depth_R(self) -> np.ndarray:
        """(R,) number of symbols of every response."""
        return (self.symbols_RL >= 0).sum(1)

    def index(self, symbols: Sequence[int]) -> int:
        """The number of the response made of `symbols` (at most `length` of them)."""
        number = 0
        for symbol in symbols:
            number = number * self.alphabet + symbol
        return self.starts[len(symbols)] + number

    def pack(self, prompts_PT: np.ndarray) -> TreeInputs:
        """Each prompt with its whole tree as one sequence: a node sees the prompt, its ancestors and itself."""
        prompts, length = prompts_PT.shape
        nodes = np.arange(1, self.internal)
        depth = self.depth_R[1 : self.internal]
        last = self.symbols_RL[nodes, depth - 1]
        sees = np.zeros((length + len(nodes), length + len(nodes)), dtype=bool)
        sees[:length, :length] = np.tril(np.ones((length, length), dtype=bool))
        sees[length:, :length] = True
        ancestor = nodes.copy()
        while (ancestor > 0).any():
            row = np.flatnonzero(ancestor > 0)
            sees[length + row, length + ancestor[row] - 1] = True
            ancestor = np.where(ancestor > 0, (ancestor - 1) // self.alphabet, 0)
        mask = torch.where(torch.from_numpy(sees), 0.0, torch.finfo(torch.float32).min)
        ids = np.concatenate([prompts_PT, np.tile(last, (prompts, 1))], axis=1)
        positions = np.concatenate([np.arange(length), length + depth - 1])
        return TreeInputs(
            input_ids_PT=torch.from_numpy(ids),
            position_ids_PT=torch.from_numpy(np.tile(positions, (prompts, 1))),
            mask_11TT=mask[None, None],
            prompt_length=length,
        )

    def response_logp(self, next_logp_PIV: torch.Tensor) -> torch.Tensor:
        """(P, R) log-probability of every response from the (P, I, V) next-symbol log-probabilities of the internal nodes."""
        path = next_logp_PIV.new_zeros(next_logp_PIV.shape[0], 1)
        levels = []
        for depth in range(self.length):
            here = next_logp_PIV[:, self.starts[depth] : self.starts[depth + 1]]
            levels.append(path + here[:, :, self.eos])
            path = (path[:, :, None] + here[:, :, : self.alphabet]).flatten(1)
        return torch.cat([*levels, path], dim=1)

    def next_logp(self, logp_PR: torch.Tensor) -> torch.Tensor:
        """(P, I, V) next-symbol log-probabilities of the policy whose responses have the (P, R) log-probabilities: the inverse."""
        mass = logp_PR[:, self.starts[self.length] :]
        levels = []
        for depth in reversed(range(self.length)):
            children = mass.unflatten(1, (-1, self.alphabet))
            stop = logp_PR[:, self.starts[depth] : self.starts[depth + 1], None]
            options = torch.cat([children, stop], dim=2)
            mass = options.logsumexp(2)
            levels.append(options - mass[:, :, None])
        return torch.cat(levels[::-1], dim=1)
