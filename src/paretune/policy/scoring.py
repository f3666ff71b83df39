"""Log-probabilities of given responses, with gradient: padded rows or packed sequences, and the head a piece at a time.

Packing lays prompts and their responses end to end in a few sequences, so that the model runs over real tokens only. A prompt stands
once, before all responses to it, and each response looks at its prompt and at itself:

    sequence   p p p p a a a b b c c c c | q q q d e e ...         responses a, b, c to prompt p; d, e to prompt q

In padded rows a batch of responses costs as much as its longest one in every row. Attention runs over whole sequences, masked, so these are
kept short: `SEQUENCE` tokens, or the longest prompt with its responses.
Axes: B sequences, S their length, U tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paretune.hub import text_config
from paretune.policy.base import Policy
from paretune.policy.lora.decoder import run_head
from paretune.policy.lora.shard import anyone, everyone
from paretune.policy.rollout import check_length, gates_on, needed, read

__all__ = ["Packing", "chosen", "packs", "token_logp"]

LOGITS_AT_ONCE = 2**23  # numbers: 32 MiB in float32
PACKED_BELOW, SAVED = 0.9, 128  # of the padded tokens, and at least so many fewer: less is lost on attention between rows of one sequence
SEQUENCE = 256


def token_logp(
    policy: Policy,
    prompt_ids_PT: Tensor,
    prompt_mask_PT: Tensor,
    tokens_NT: Tensor,
    *,
    gates_NK: Tensor | None,
    group: int = 1,
    temperature: float = 1.0,
    mask_NT: Tensor | None = None,
    at_once: int | None = None,
    packed: bool | None = None,
) -> Tensor:
    """(N, T) float32 log-probabilities of given responses, `group` to each prompt, with gradient where enabled.

    What stands after a response's end is arbitrary. Logits are made for the T positions of the responses only; with a group each prompt is
    read, and differentiated, once. `mask_NT`, where given, says which tokens are asked for (the first ones of each row); the model then
    runs over these alone where it can be packed and that is less work. `packed` decides it instead, for tests.
    """
    length, gates_NK = tokens_NT.shape[1], gates_on(policy, gates_NK)
    check_length(policy, (0 if gates_NK is None else policy.extra_positions) + prompt_ids_PT.shape[1] + length, temperature)
    if packed or (packed is None and mask_NT is not None and anyone(policy.model, len(tokens_NT) > 1) and packs(policy, gates_NK)):
        asked_NT = torch.ones_like(tokens_NT, dtype=torch.bool) if mask_NT is None else mask_NT
        padded = prompt_ids_PT.numel() + tokens_NT.numel()
        most = padded if packed else min(PACKED_BELOW * padded, padded - SAVED)
        real = int(prompt_mask_PT.sum() + asked_NT.sum()) - len(asked_NT)  # what every packing holds, or more
        packing = Packing.of(prompt_mask_PT, asked_NT, group) if packed or real <= most else None
        worth = packing is not None and bool(packed or packing.size <= most)
        if everyone(policy.model, worth) and packing is not None:
            return _packed_logp(policy, packing, prompt_ids_PT, tokens_NT, gates_NK, temperature, at_once)
    if group > 1 and not policy.has_plain_cache:  # other caches take one token at a time: read all of it anew
        prompt_ids_PT, prompt_mask_PT, group = (*(x.repeat_interleave(group, 0) for x in (prompt_ids_PT, prompt_mask_PT)), 1)
    if group > 1:
        first_NV, mask_NT, cache = read(policy, prompt_ids_PT, prompt_mask_PT, gates_NK, group)
        known = [chosen(first_NV[:, None], tokens_NT[:, :1], temperature)]
        if length > 1:
            mask_NT = None if mask_NT is None else functional.pad(mask_NT, (0, length - 1), value=1)
            forward = partial(policy.forward, tokens_NT[:, :-1], gates_NK=gates_NK, attention_mask=mask_NT, cache=cache)
            known.append(_scored(policy, forward, tokens_NT[:, 1:], temperature, at_once))
        return torch.cat(known, 1)
    mask_NT = needed(prompt_mask_PT)
    mask_NT = None if mask_NT is None else functional.pad(mask_NT, (0, length - 1), value=1)
    ids_NT = torch.cat([prompt_ids_PT, tokens_NT[:, :-1]], 1)
    forward = partial(policy.forward, ids_NT, gates_NK=gates_NK, attention_mask=mask_NT, last_only=length)
    return _scored(policy, forward, tokens_NT, temperature, at_once)


def packs(policy: Policy, gates_NK: Tensor | None) -> bool:
    """Whether responses may be packed for this policy: its gates can differ between tokens, and its model reads 4-D masks as they are."""
    return (gates_NK is None or policy.token_gates) and policy.splits_head and policy.has_plain_cache and policy.reads_any_mask


def _packed_logp(
    policy: Policy,
    packing: Packing,
    prompt_ids_PT: Tensor,
    tokens_NT: Tensor,
    gates_NK: Tensor | None,
    temperature: float,
    at_once: int | None,
) -> Tensor:
    """(N, T) log-probabilities of the asked tokens; 0 elsewhere."""
    ids_BS = packing.ids(prompt_ids_PT, tokens_NT, policy.pad_id)
    if gates_NK is not None:
        alike = bool((gates_NK == gates_NK[:1]).all()) and not gates_NK.requires_grad
        gates_NK = gates_NK[:1].expand(len(ids_BS), -1) if alike else gates_NK[packing.row_BS]
    with policy.headless():
        h_BSH = policy.forward(
            ids_BS, gates_NK=gates_NK, attention_mask=packing.mask_B1SS, position_ids=packing.positions_BS, last_only=ids_BS.shape[1]
        )
    h_UH = h_BSH.flatten(0, 1)[packing.states_U]
    logp_U = _of_states(policy, h_UH, tokens_NT.flatten()[packing.asked_U], temperature, at_once)
    return logp_U.new_zeros(tokens_NT.numel()).index_copy(0, packing.asked_U, logp_U).view_as(tokens_NT)


def _scored(policy: Policy, forward: Callable[[], Tensor], tokens_NT: Tensor, temperature: float, at_once: int | None) -> Tensor:
    """(N, T) log-probabilities of the tokens; of many logits only `at_once` (LOGITS_AT_ONCE) exist at a time, in the backward too."""
    n, length = tokens_NT.shape
    vocabulary = text_config(policy.model.config).vocab_size
    if not policy.splits_head or everyone(policy.model, n * length * vocabulary <= (at_once or LOGITS_AT_ONCE)):
        return chosen(forward(), tokens_NT, temperature)
    with policy.headless():
        h_NTH = forward()
    return _of_states(policy, h_NTH.flatten(0, 1), tokens_NT.flatten(), temperature, at_once).view(n, length)


def _of_states(policy: Policy, h_UH: Tensor, tokens_U: Tensor, temperature: float, at_once: int | None) -> Tensor:
    """(U,) log-probabilities of the tokens that follow U states of the decoder, by the model's own head, a piece at a time."""

    def piece(h_UH: Tensor, tokens_U: Tensor) -> Tensor:
        with policy.bank.gates(None):
            return chosen(run_head(policy.model, h_UH[None]), tokens_U[None], temperature)[0]

    step = max(1, (at_once or LOGITS_AT_ONCE) // text_config(policy.model.config).vocab_size)
    if h_UH.requires_grad and torch.is_grad_enabled():
        return _Head.apply(h_UH, tokens_U, piece, step)
    return torch.cat([piece(h, tokens) for h, tokens in zip(h_UH.split(step), tokens_U.split(step), strict=True)])


class _Head(torch.autograd.Function):
    """Log-probabilities of tokens from states, with the gradient taken while the logits are there.

    A log-probability depends on its own state alone, so that one gradient of their sum is the gradient of each. The backward scales it:
    logits are made once, and no more of them exist than those of one piece.
    """

    @staticmethod
    def forward(ctx: Any, h_UH: Tensor, tokens_U: Tensor, piece: Callable[[Tensor, Tensor], Tensor], step: int) -> Tensor:
        logps, slopes = [], []
        for h, tokens in zip(h_UH.detach().split(step), tokens_U.split(step), strict=True):
            with torch.enable_grad():
                h = h.requires_grad_()
                logp_U = piece(h, tokens)
                slopes.append(torch.autograd.grad(logp_U.sum(), h)[0])
            logps.append(logp_U.detach())
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (slope_UH,) = ctx.saved_tensors
        return (upstream[0][:, None] * slope_UH).to(slope_UH.dtype), None, None, None


def chosen(logits_NTV: Tensor, tokens_NT: Tensor, temperature: float) -> Tensor:
    """(N, T) log-probabilities of the tokens."""
    logits_NTV = logits_NTV.float() if temperature == 1 else logits_NTV.float() / temperature
    return -functional.cross_entropy(logits_NTV.flatten(0, 1), tokens_NT.flatten(), reduction="none").view_as(tokens_NT)


@dataclass(frozen=True)
class Packing:
    """Where each token lies. Tensors are on the device of the masks that it was made from."""

    prompt_BS: Tensor  # flat index into the prompts' ids, -1 where no prompt's token lies
    token_BS: Tensor  # flat index into the responses' tokens, -1 where none lies
    row_BS: Tensor  # a row of responses whose gates hold here
    positions_BS: Tensor
    mask_B1SS: Tensor  # bool
    asked_U: Tensor  # flat index of the asked tokens, in the order of the rows
    states_U: Tensor  # flat index into (B, S) of the state that each is predicted from

    @property
    def size(self) -> int:
        """B * S, what the model runs over."""
        return self.prompt_BS.numel()

    @classmethod
    def of(cls, prompt_mask_PT: Tensor, mask_NT: Tensor, group: int) -> Packing:
        """Left-padded prompts, and the first tokens of each response: `group` rows to a prompt. A response without any needs no place."""
        given_PT, asked_NT = prompt_mask_PT.cpu().numpy().astype(bool), mask_NT.cpu().numpy().astype(bool)
        asked_N, (count, width), length = asked_NT.sum(1), given_PT.shape, asked_NT.shape[1]
        read_N = np.maximum(asked_N - 1, 0)  # nothing follows the last token
        sizes_P = given_PT.sum(1) + read_N.reshape(count, group).sum(1)
        bins = _bins(sizes_P, max(SEQUENCE, int(sizes_P.max())))
        longest = max(int(sizes_P[members].sum()) for members in bins)
        shape = (len(bins), longest)
        prompt_BS, token_BS, row_BS = np.full(shape, -1), np.full(shape, -1), np.zeros(shape, dtype=int)
        positions_BS, owner_BS, part_BS = np.zeros(shape, dtype=int), np.full(shape, -1), np.zeros(shape, dtype=int)
        states_NT = np.zeros(asked_NT.shape, dtype=int)
        for b, members in enumerate(bins):
            at = 0
            for p in members:
                ids = p * width + np.flatnonzero(given_PT[p])
                here = slice(at, at + len(ids))
                prompt_BS[b, here], positions_BS[b, here], owner_BS[b, here] = ids, np.arange(len(ids)), p
                row_BS[b, here] = p * group
                at, last = here.stop, b * longest + here.stop - 1
                for n in range(p * group, (p + 1) * group):
                    here, read = slice(at, at + read_N[n]), np.arange(read_N[n])
                    token_BS[b, here], positions_BS[b, here], owner_BS[b, here] = n * length + read, len(ids) + read, p
                    row_BS[b, here], part_BS[b, here] = n, n % group + 1
                    states_NT[n, 0], states_NT[n, 1 : len(read) + 1] = last, b * longest + at + read
                    at = here.stop
        owner_BS[owner_BS < 0] = -1 - np.arange(shape[0] * shape[1]).reshape(shape)[owner_BS < 0]  # padding sees itself alone
        same = owner_BS[:, :, None] == owner_BS[:, None, :]
        seen = (part_BS[:, None, :] == 0) | (part_BS[:, None, :] == part_BS[:, :, None])
        mask_BSS = same & seen & np.tri(longest, dtype=bool)
        device = mask_NT.device
        arrays = (prompt_BS, token_BS, row_BS, positions_BS, mask_BSS[:, None], np.flatnonzero(asked_NT), states_NT[asked_NT])
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def ids(self, prompt_ids_PT: Tensor, tokens_NT: Tensor, pad: int) -> Tensor:
        """(B, S) token ids."""
        ids_BS = torch.full_like(self.prompt_BS, pad)
        for where_BS, source in ((self.prompt_BS, prompt_ids_PT), (self.token_BS, tokens_NT)):
            ids_BS = torch.where(where_BS < 0, ids_BS, source.flatten()[where_BS.clamp(min=0)])
        return ids_BS


def _bins(sizes_P: np.ndarray, capacity: int) -> list[list[int]]:
    """First-fit decreasing: which prompts share a sequence."""
    bins: list[list[int]] = []
    room: list[int] = []
    for p in np.argsort(-sizes_P, kind="stable"):
        for b, free in enumerate(room):
            if sizes_P[p] <= free:
                bins[b].append(int(p))
                room[b] -= int(sizes_P[p])
                break
        else:
            bins.append([int(p)])
            room.append(capacity - int(sizes_P[p]))
    return bins
