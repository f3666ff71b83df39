"""Sampling responses with a key-value cache and named uniform streams. `paretune.policy.scoring` scores given responses.

`generate` samples responses to prompts: for trainings, measurements, explanations and `Family.sample`. `decode` is one batch of it from
token ids; `Decoding` is the loop below, a step at a time, in which rows join and leave.

Each row of a batch draws its own uniforms and inverts the cumulative distribution in float64, so a response depends on the seed, the
step, the prompt and the number of the response, but not on what else is in the batch. A response ends with the first of the policy's
EOS ids or at the length limit; what ends it is known by position, so PAD may equal EOS and no token is illegal.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paretune.errors import ConfigError, shown
from paretune.hub import positions_of
from paretune.policy.base import Policy
from paretune.policy.cache import by_row, joint_cache, with_room
from paretune.policy.lora.shard import anyone
from paretune.policy.sampling import Said, Sampling, draw, shaped
from paretune.progress import counted
from paretune.seeds import uniforms
from paretune.tasks.prompts import chat_text
from paretune.types import Prompt

__all__ = [
    "Decoding",
    "Generation",
    "Reading",
    "Rollout",
    "check_length",
    "decode",
    "encode",
    "gates_on",
    "generate",
    "needed",
    "occurrences",
    "read",
    "row_uniforms",
    "texts",
    "token_ids",
]

KEPT_BELOW = 0.75  # of the rows that are decoded: when so few still run, the others leave; each time the cache is copied once
TRIMMED = 8  # columns that are empty in every row: so many are left out together
BELOW_ONE = 1.0 - 2.0**-52  # times a uniform, times a total: less than the total, whatever the rounding


@dataclass(frozen=True)
class Generation:
    """Responses, padded on the right, on the policy's device; T is the length of the longest."""

    tokens_NT: Tensor  # int64; the policy's pad id after the end
    mask_NT: Tensor  # bool; True for the tokens of the response, its EOS included
    logp_NT: Tensor  # float64 (float32 on MPS), nats, under the sampling policy at its temperature; 0 on padding
    stopped_N: Tensor  # bool; True where an EOS was drawn, False where the length limit cut


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of one prompt: its chat template, the answer's turn opened, or its text with the tokenizer's usual start."""
    if prompt.messages is not None:
        ids = tokenizer(chat_text(tokenizer, prompt.messages), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt.text)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:
            own = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
            if ids[-1 - len(own) : -1] == own:  # a tokenizer that closes every text, not a text that ends so itself: an answer must follow
                ids = ids[:-1]
    if ids:
        return list(ids)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ConfigError(
            "a prompt has a token at least",
            found=f"none in {shown(prompt.raw)}, and {type(tokenizer).__name__} has neither BOS nor EOS to stand for it",
            remedy="give the prompt some text, or set tokenizer.bos_token",
        )
    return [int(start)]  # an empty prompt: a model needs something to look at


def encode(tokenizer: Any, prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(N, T) ids and mask, padded on the left whatever the tokenizer's own side is."""
    rows = [token_ids(tokenizer, prompt) for prompt in prompts]
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    ids_NT = torch.tensor([[pad] * (width - len(row)) + row for row in rows], dtype=torch.long, device=device)
    mask_NT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long, device=device)
    return ids_NT, mask_NT


def row_uniforms(seed: int, step: int, digests: Sequence[str], occurrences: Sequence[int], length: int) -> np.ndarray:
    """(N, T) float64 uniforms; row i is the stream ("rollout", step, digest_i, occurrence_i). A digest names a prompt."""
    return np.stack([uniforms(length, seed, "rollout", step, d, int(o)) for d, o in zip(digests, occurrences, strict=True)])


class Decoding:
    """Autoregressive decoding with a key-value cache, one token per row and step. Rows join and leave between steps.

        with Decoding(policy) as decoding:
            decoding.join(prompt_ids_PT, prompt_mask_PT, gates_NK=gates_NK, uniforms_NT=uniforms_NT)
            token_N1, logp_N1 = decoding.step()

    Each row has its own gates, uniforms and temperature. What a row draws depends on nothing else in the batch, up to the rounding of
    kernels that differ between batch sizes. Rows stand in the order in which they joined; those behind a row that leaves move up.
    """

    def __init__(self, policy: Policy, *, suppress_eos: bool = False):
        self.policy, self.suppress_eos = policy, suppress_eos
        self._contexts = contextlib.ExitStack()
        self.place = torch.device("cpu") if policy.device.type == "mps" else policy.device  # of the draws: MPS has no float64
        self._cache: Any = None
        self._gates_NK: Tensor | None = None
        self._mask_NT: Tensor | None = None  # of prompts and tokens; None where nothing is padded: attention is faster without one
        self._logits_NV = self._draws_NT = self._heat_N1 = torch.zeros(0, 0)
        self._common: float | Tensor = 1.0  # the temperature, one number where all rows have the same
        self._pending_N1: Tensor | None = None  # tokens that were drawn, and that the model has not seen yet
        self._count_N = torch.zeros(0, dtype=torch.long, device=self.place)  # tokens drawn by each row
        self._samplings: list[Sampling] = []
        self._said: list[Said | None] = []  # of rows with penalties
        self._shapes = False  # whether some row has more than a temperature

    def __enter__(self) -> Decoding:
        self._contexts.enter_context(torch.inference_mode())
        self._contexts.enter_context(self.policy.bank.unchanged())
        return self

    def __exit__(self, *_: Any) -> None:
        self._contexts.close()

    @property
    def rows(self) -> int:
        """N, the rows that are decoded now."""
        return len(self._count_N)

    def join(
        self,
        prompt_ids_PT: Tensor,
        prompt_mask_PT: Tensor,
        *,
        gates_NK: Tensor | None,
        uniforms_NT: np.ndarray,
        group: int = 1,
        temperature: float = 1.0,
        samplings: Sequence[Sampling] | None = None,
    ) -> None:
        """Read left-padded prompts, each once, and add `group` rows per prompt, prompt by prompt, behind the rows that are there.

        `uniforms_NT` has a column for every token that may be drawn. `gates_NK` has a row per response, the same for all of a prompt; None
        is the reference. `samplings` has one for each row, in place of `temperature`. Raises ConfigError where prompt and response do not
        fit the model's positions, a temperature is negative, or the rows that are there cannot have these beside them.
        """
        n = prompt_ids_PT.shape[0] * group
        check_length(self.policy, self.policy.extra_positions + prompt_ids_PT.shape[1] + uniforms_NT.shape[1], temperature)
        samplings = [Sampling(temperature)] * n if samplings is None else samplings
        gates_NK = gates_on(self.policy, gates_NK)
        logits_NV, mask_NT, cache = read(self.policy, prompt_ids_PT, prompt_mask_PT, gates_NK, group)
        own = 0 if gates_NK is None else self.policy.extra_positions
        mask_NT = None if mask_NT is None else functional.pad(mask_NT, (own, 0), value=1)
        prompts: list[Sequence[int]] = [()] * n
        if any(sampling.penalizes for sampling in samplings):
            prompts = [prompt_ids_PT[i // group][prompt_mask_PT[i // group].bool()].tolist() for i in range(n)]
        self._seat(logits_NV, mask_NT, cache, gates_NK, uniforms_NT, samplings, prompts)

    def take(self, reading: Reading, rows_N: Sequence[int], *, uniforms_NT: np.ndarray, samplings: Sequence[Sampling]) -> None:
        """Add rows behind those that are there: `rows_N` says of which prompt of a finished `reading` each is a response."""
        assert reading.logits_PV is not None, "a reading that is done"
        at_N = torch.tensor(rows_N, device=self.policy.device)
        logits_NV, mask_NT, cache = reading.logits_PV, reading.mask_PT, reading.cache
        if list(rows_N) != list(range(len(reading.prompts))):
            logits_NV, mask_NT = logits_NV[at_N], None if mask_NT is None else mask_NT[at_N]
            for layer in cache.layers:
                layer.keys, layer.values = (by_row(x, len(reading.prompts))[:, at_N].flatten(0, 1) for x in (layer.keys, layer.values))
        gates_NK = reading.gates_PK[at_N].contiguous()
        _claim(cache, gates_NK)
        self._seat(logits_NV, mask_NT, cache, gates_NK, uniforms_NT, samplings, [reading.prompts[i] for i in rows_N])

    def replace(
        self, slots: Sequence[int], reading: Reading, rows_N: Sequence[int], *, uniforms_NT: np.ndarray, samplings: Sequence[Sampling]
    ) -> None:
        """As `take`, with the rows in the places of others, which are dropped. What others hold is not copied."""
        assert reading.logits_PV is not None, "a reading that is done"
        self.advance()
        _refuse_other_caches(self.policy, reading.cache)
        assert self._gates_NK is not None, "a reading has gates"
        device = self.policy.device
        at_N, here_N = torch.tensor(rows_N, device=device), torch.tensor(slots, device=device)
        mine, theirs = self._cache.get_seq_length(), reading.cache.get_seq_length()
        mask_NT = torch.ones(self.rows, mine, dtype=torch.long, device=device) if self._mask_NT is None else self._mask_NT
        if theirs > mine:
            mask_NT = functional.pad(mask_NT, (theirs - mine, 0))
        mask_NT[here_N] = 0
        mask_NT[here_N, -theirs:] = 1 if reading.mask_PT is None else reading.mask_PT[at_N]
        for layer, read in zip(self._cache.layers, reading.cache.layers, strict=True):
            for name in ("keys", "values"):
                if theirs > mine:
                    setattr(layer, name, functional.pad(getattr(layer, name), (0, 0, theirs - mine, 0)))
                by_row(getattr(layer, name), self.rows)[:, here_N, :, -theirs:] = by_row(getattr(read, name), len(reading.prompts))[:, at_N]
        self._mask_NT = mask_NT
        self._logits_NV = self._logits_NV.index_copy(0, here_N, reading.logits_PV[at_N])
        self._gates_NK = self._gates_NK.index_copy(0, here_N, reading.gates_PK[at_N])
        _claim(self._cache, self._gates_NK)
        missing = uniforms_NT.shape[1] - self._draws_NT.shape[1]
        self._draws_NT = functional.pad(self._draws_NT, (0, max(0, missing)))
        self._draws_NT[here_N.to(self.place), : uniforms_NT.shape[1]] = torch.from_numpy(uniforms_NT * BELOW_ONE).to(self.place)
        for slot, place, sampling in zip(slots, rows_N, samplings, strict=True):
            self._heat_N1[slot], self._count_N[slot], self._samplings[slot] = float(sampling.temperature), 0, sampling
            self._said[slot] = Said(reading.prompts[place]) if sampling.penalizes else None
        self._settle()

    def rest(self, slots: Sequence[int]) -> None:
        """Rows that nobody needs any more, until others take their places: they cost their share of a forward, and their columns may go."""
        if self._mask_NT is None:
            self._mask_NT = torch.ones(self.rows, self._cache.get_seq_length(), dtype=torch.long, device=self.policy.device)
        self._mask_NT[list(slots)] = 0
        self._mask_NT[list(slots), -1] = 1
        for slot in slots:
            self._samplings[slot], self._said[slot], self._count_N[slot] = Sampling(), None, 0
        empty = int(self._mask_NT.argmax(1).min())
        if empty >= TRIMMED:
            self._mask_NT = self._mask_NT[:, empty:]
            for layer in self._cache.layers:
                layer.drop(empty)

    def _seat(
        self,
        logits_NV: Tensor,
        mask_NT: Tensor | None,
        cache: Any,
        gates_NK: Tensor | None,
        uniforms_NT: np.ndarray,
        samplings: Sequence[Sampling],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        """Rows that were read; the mask has a column for every one of the cache."""
        n = len(logits_NV)
        assert len(uniforms_NT) == len(samplings) == n, "one stream per row"
        draws_NT = torch.from_numpy(uniforms_NT * BELOW_ONE).to(self.place)
        heat_N1 = torch.tensor([[float(each.temperature)] for each in samplings], dtype=torch.float64, device=self.place)
        count_N = torch.zeros(n, dtype=torch.long, device=self.place)
        if self.rows:
            self.advance()
            self._check_beside(cache, gates_NK)
            mask_NT = self._joint_mask(mask_NT, n, self._cache.get_seq_length(), cache.get_seq_length())
            cache = joint_cache(self._cache, cache, self.rows, n)
            gates_NK = None if gates_NK is None or self._gates_NK is None else torch.cat([self._gates_NK, gates_NK])
            width = max(self._draws_NT.shape[1], draws_NT.shape[1])
            draws_NT = torch.cat([functional.pad(draws, (0, width - draws.shape[1])) for draws in (self._draws_NT, draws_NT)])
            logits_NV, heat_N1 = torch.cat([self._logits_NV, logits_NV]), torch.cat([self._heat_N1, heat_N1])
            count_N = torch.cat([self._count_N, count_N])
        self._cache, self._mask_NT, self._logits_NV, self._count_N = cache, mask_NT, logits_NV, count_N
        self._gates_NK, self._draws_NT, self._heat_N1 = gates_NK, draws_NT, heat_N1
        if self.policy.has_plain_cache:
            with_room(cache)
        self._samplings += samplings
        self._said += [Said(prompt) if each.penalizes else None for each, prompt in zip(samplings, prompts, strict=True)]
        self._settle()
        _claim(cache, gates_NK)

    def _settle(self) -> None:
        """What holds for the rows that are there now: asked when rows come and go, not at every token."""
        self._common = _common(self._heat_N1)
        self._shapes = any(each.penalizes or each.cuts for each in self._samplings)

    def step(self) -> tuple[Tensor, Tensor]:
        """Draw the next token of every row: tokens (N, 1) and their log-probabilities (N, 1) in nats, float64, as the row draws them."""
        logits_NV = self.logits()
        if self._shapes:
            logits_NV = shaped(logits_NV.clone(), self._samplings, self._said)
        token_N1, logp_N1 = draw(logits_NV, self._draws_NT.gather(1, self._count_N[:, None]), self._common)
        for words, (token,) in zip(self._said, token_N1.tolist(), strict=True) if self._shapes else ():
            if words is not None:
                words.add(token)
        self._count_N = self._count_N + 1
        self._pending_N1 = token_N1
        return token_N1, logp_N1

    def logits(self) -> Tensor:
        """(N, V) float64 logits of the next tokens, before any row's sampling."""
        self.advance()
        logits_NV = self._logits_NV.to(self.place, torch.float64)
        if self.suppress_eos:
            logits_NV[:, self.policy.eos_ids] = -torch.inf
        return logits_NV

    def leave(self, gone_N: Tensor) -> None:
        """Drop the rows where `gone_N` is true, and the columns that only they had filled."""
        kept_N = (~gone_N.to(self.place)).nonzero()[:, 0]
        if len(kept_N) < self.rows and len(kept_N):
            _refuse_other_caches(self.policy, self._cache)
            here_N = kept_N.to(self.policy.device)
            empty = 0
            if self._mask_NT is not None:
                mask_NT = self._mask_NT[here_N]
                empty = int(mask_NT.argmax(1).min())
                self._mask_NT = mask_NT[:, empty:]
            for layer in self._cache.layers:
                layer.keys, layer.values = (by_row(x, self.rows)[:, here_N, :, empty:].flatten(0, 1) for x in (layer.keys, layer.values))
            self._gates_NK = None if self._gates_NK is None else self._gates_NK[here_N].contiguous()
            _claim(self._cache, self._gates_NK)
            self._logits_NV = self._logits_NV[here_N]
            self._pending_N1 = None if self._pending_N1 is None else self._pending_N1[kept_N]
        elif not len(kept_N):
            self._cache = self._pending_N1 = None
        self._draws_NT, self._heat_N1, self._count_N = self._draws_NT[kept_N], self._heat_N1[kept_N], self._count_N[kept_N]
        self._samplings, self._said = ([rows[n] for n in kept_N.tolist()] for rows in (self._samplings, self._said))
        self._settle()

    def advance(self) -> None:
        """Give the model the tokens that were drawn last, for the logits of the next ones. Where it fails, these rows are lost."""
        if self._pending_N1 is None:
            return
        ids_N1, self._pending_N1 = self._pending_N1.to(self.policy.device), None
        self._mask_NT = None if self._mask_NT is None else functional.pad(self._mask_NT, (0, 1), value=1)
        logits_N1V = self.policy.forward(ids_N1, gates_NK=self._gates_NK, attention_mask=self._mask_NT, cache=self._cache, last_only=True)
        self._logits_NV = logits_N1V[:, -1]

    def _joint_mask(self, mask_NT: Tensor | None, n: int, mine: int, theirs: int) -> Tensor | None:
        """The mask of these rows with `n` others below, whose caches have so many columns; None where nothing is padded."""
        if self._mask_NT is None and mask_NT is None and mine == theirs:
            return None
        device = self.policy.device
        masks = [
            torch.ones(count, length, dtype=torch.long, device=device) if mask is None else mask
            for mask, count, length in ((self._mask_NT, self.rows, mine), (mask_NT, n, theirs))
        ]
        return torch.cat([functional.pad(mask, (max(mine, theirs) - mask.shape[1], 0)) for mask in masks])

    def _check_beside(self, cache: Any, gates_NK: Tensor | None) -> None:
        _refuse_other_caches(self.policy, cache)
        if (gates_NK is None) != (self._gates_NK is None):
            raise ConfigError(
                "rows that are decoded together all have gates, or are all the reference",
                found="rows with gates and rows without",
                remedy="decode the reference's rows in a batch of their own",
            )


class Reading:
    """Prompts that are read into a cache, a piece at a time, and then join a `Decoding`.

    `known`, where given, has for every prompt what an earlier reading left of its first tokens (`Reading.kept`), and how many of them;
    at least the last token of a prompt is read anew. `gates_PK` has a row for each prompt.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], gates_PK: Tensor, known: Sequence[tuple[Any, int]] | None = None):
        self.policy, self.prompts, self.at = policy, [list(prompt) for prompt in prompts], 0
        self.gates_PK: Tensor = gates_PK.to(policy.device, torch.float32)
        self.cache = policy.new_cache(len(prompts))
        self.logits_PV: Tensor | None = None
        lengths = [0] * len(prompts) if known is None else [length for _, length in known]
        assert all(0 <= length < len(prompt) for length, prompt in zip(lengths, self.prompts, strict=True))
        rest = [prompt[length:] for prompt, length in zip(self.prompts, lengths, strict=True)]
        self.width = max(map(len, rest))
        device = policy.device
        self._ids_PT = torch.tensor([[policy.pad_id] * (self.width - len(row)) + row for row in rest], device=device)
        mask_PT = torch.tensor([[0] * (self.width - len(row)) + [1] * len(row) for row in rest], device=device)
        own = policy.extra_positions
        if known is None:
            mask_PT = functional.pad(mask_PT, (own, 0), value=1)
        else:
            longest = max(lengths)
            before = [[0] * (longest - length) + [1] * (own + length) for length in lengths]
            mask_PT = torch.cat([torch.tensor(before, device=device), mask_PT], 1)
            self._open([states for states, _ in known], [own + length for length in lengths])
        self.mask_PT = needed(mask_PT)

    def _open(self, states: Sequence[Any], lengths: Sequence[int]) -> None:
        """Begin with what is known, padded on the left to the longest."""
        longest = max(lengths)
        for at, layers in enumerate(zip(*states, strict=True)):
            both = []
            for part in (0, 1):
                rows = [functional.pad(layer[part][:, :, :, :n], (0, 0, longest - n, 0)) for layer, n in zip(layers, lengths, strict=True)]
                both.append(torch.cat(rows, 1).flatten(0, 1))
            self.cache.update(*both, at)
        if self.policy.parts_need_gates:
            self.cache.paretune_gates = self.gates_PK

    @property
    def left(self) -> int:
        """Columns that are not read yet."""
        return self.width - self.at

    @property
    def done(self) -> bool:
        """Whether all is read."""
        return self.at == self.width

    def advance(self, most: int | None = None) -> None:
        """Read up to `most` columns more, all of them where `most` is None or the cache is none of plain attention."""
        end = self.width if most is None or not self.policy.has_plain_cache else min(self.width, self.at + most)
        ids_PT, mask_PT = self._ids_PT[:, self.at : end], self.mask_PT
        if mask_PT is not None:
            opens = self.policy.extra_positions if self.cache.get_seq_length() == 0 else 0  # those have no tokens here
            mask_PT = mask_PT[:, opens : mask_PT.shape[1] - self.width + end]
        logits_PV = self.policy.forward(ids_PT, gates_NK=self.gates_PK, attention_mask=mask_PT, cache=self.cache, last_only=True)
        self.logits_PV, self.at = logits_PV[:, -1], end

    def kept(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of one prompt, layer by layer, (copies, 1, heads, T, width), without padding: for a later reading."""
        columns = slice(None) if self.mask_PT is None else self.mask_PT[row].nonzero()[:, 0]
        return [
            tuple(by_row(x, len(self.prompts))[:, row : row + 1][:, :, :, columns].clone() for x in (layer.keys, layer.values))  # type: ignore[misc]
            for layer in self.cache.layers
        ]


def decode(
    policy: Policy,
    prompt_ids_PT: Tensor,
    prompt_mask_PT: Tensor,
    *,
    gates_NK: Tensor | None,
    max_new_tokens: int,
    uniforms_NT: np.ndarray,
    group: int = 1,
    temperature: float = 1.0,
    suppress_eos: bool = False,
    sampling: Sampling | None = None,
) -> Generation:
    """Responses of up to `max_new_tokens` tokens, `group` to each left-padded prompt (N = P * group rows, prompt by prompt).

    Arguments as for `Decoding.join`. `temperature` 0 takes the most likely token; `suppress_eos` gives EOS probability 0 (for timing only).
    `sampling`, where given, is that of all rows, in place of `temperature`.
    """
    assert uniforms_NT.shape[1] >= max_new_tokens, "one uniform per token"
    uniforms_NT = uniforms_NT[:, :max_new_tokens]
    with Decoding(policy, suppress_eos=suppress_eos) as decoding:
        samplings = None if sampling is None else [sampling] * len(uniforms_NT)
        settings: dict[str, Any] = {"group": group, "temperature": temperature, "samplings": samplings}
        decoding.join(prompt_ids_PT, prompt_mask_PT, gates_NK=gates_NK, uniforms_NT=uniforms_NT, **settings)
        count, where = decoding.rows, decoding.place
        tokens_NT = torch.full((count, max_new_tokens), policy.pad_id, device=where)
        logp_NT = torch.zeros(count, max_new_tokens, dtype=torch.float64, device=where)
        length_N, stopped_N = torch.zeros(count, dtype=torch.long, device=where), torch.zeros(count, dtype=torch.bool, device=where)
        rows_R, runs_R = torch.arange(count, device=where), torch.ones(count, dtype=torch.bool, device=where)  # of those still decoded
        eos = torch.tensor(policy.eos_ids, device=where)
        for t in range(max_new_tokens):
            token_R1, logp_R1 = decoding.step()
            here_R = rows_R[runs_R]
            tokens_NT[here_R, t], logp_NT[here_R, t] = token_R1[runs_R, 0], logp_R1[runs_R, 0]
            length_N[here_R] = t + 1
            ends_R = runs_R & torch.isin(token_R1[:, 0], eos)
            stopped_N[rows_R[ends_R]] = True
            runs_R = runs_R & ~ends_R
            left = int(runs_R.sum())
            if not anyone(policy.model, left > 0):
                break
            if left <= KEPT_BELOW * len(runs_R) and policy.has_plain_cache and t + 1 < max_new_tokens:
                kept_R = runs_R if left else torch.arange(len(runs_R), device=where) == 0  # other processes go on: one row goes with them
                decoding.leave(~kept_R)
                rows_R, runs_R = rows_R[kept_R], runs_R[kept_R]
    # Outside of inference mode: copies are ordinary tensors, which autograd may keep.
    longest, device = t + 1, policy.device  # of all processes that share the model's weights
    mask_NT = torch.arange(longest, device=where) < length_N[:, None]
    logp_NT = logp_NT[:, :longest].clone()
    return Generation(
        tokens_NT=tokens_NT[:, :longest].clone().to(device),
        mask_NT=mask_NT.to(device),
        logp_NT=(logp_NT.float() if device.type == "mps" else logp_NT).to(device),
        stopped_N=stopped_N.clone().to(device),
    )


@dataclass(frozen=True)
class Rollout:
    """Prompts as the model read them, and the responses to them: N = P * group rows, prompt by prompt."""

    prompts: Sequence[Prompt]  # of the N rows
    prompt_ids_PT: Tensor
    prompt_mask_PT: Tensor
    responses: Generation
    texts: list[str]
    group: int = 1


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    gates_NK: np.ndarray | Tensor | None,
    max_new_tokens: int,
    seed: int,
    step: int = 0,
    group: int = 1,
    numbers: Sequence[int] | None = None,
    temperature: float = 1.0,
    batch: int | None = None,
    sampling: Sampling | None = None,
) -> Iterator[Rollout]:
    """Sampled responses, `group` to each prompt, in batches of `batch` prompts (None: one batch).

    `gates_NK` is (K,) for all rows, or has a row per response; None is the reference. A row draws from the stream named by `seed`, `step`,
    its prompt and its number, by default how often the prompt came before: neither order nor batching changes what is drawn.
    """
    rows = [prompt for prompt in prompts for _ in range(group)]
    counts = occurrences(rows) if numbers is None else numbers
    gates = _for_rows(gates_NK, len(rows))
    size = batch or len(prompts)
    for start in counted("sampling batch", range(0, len(prompts), size)):
        chosen, here = prompts[start : start + size], slice(start * group, (start + size) * group)
        ids_PT, mask_PT = encode(policy.tokenizer, chosen, policy.device)
        check_length(policy, policy.extra_positions + ids_PT.shape[1] + max_new_tokens, temperature)  # before noise of that length is drawn
        uniforms_NT = row_uniforms(seed, step, [prompt.digest for prompt in rows[here]], counts[here], max_new_tokens)
        made = decode(
            policy,
            ids_PT,
            mask_PT,
            gates_NK=None if gates is None else gates[here].to(policy.device),
            max_new_tokens=max_new_tokens,
            uniforms_NT=uniforms_NT,
            group=group,
            temperature=temperature,
            sampling=sampling,
        )
        yield Rollout(rows[here], ids_PT, mask_PT, made, texts(policy.tokenizer, made), group)


def occurrences(prompts: Sequence[Prompt]) -> list[int]:
    """How often each row's prompt came before it."""
    seen: Counter[str] = Counter()
    counts = []
    for prompt in prompts:
        counts.append(seen[prompt.digest])
        seen[prompt.digest] += 1
    return counts


def _for_rows(gates: np.ndarray | Tensor | None, count: int) -> Tensor | None:
    """(count, K) float32 of gates (K,) for all rows, or of a row for each."""
    if gates is None:
        return None
    gates = torch.as_tensor(gates, dtype=torch.float32)
    return gates.repeat(count, 1) if gates.dim() == 1 else gates


def _claim(cache: Any, gates_NK: Tensor | None) -> None:
    """Where a mixing holds its cache to the gates that filled it: these are the gates of the rows that are in it now."""
    if getattr(cache, "paretune_gates", None) is not None:
        cache.paretune_gates = gates_NK


def _refuse_other_caches(policy: Policy, cache: Any) -> None:
    if not policy.has_plain_cache:
        raise ConfigError(
            "rows join and leave a batch whose cache is that of plain attention",
            found=", ".join(sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})) or type(cache).__name__,
            remedy="decode these rows in a batch of their own, to its end",
        )


def read(policy: Policy, ids_PT: Tensor, mask_PT: Tensor, gates_NK: Tensor | None, group: int) -> tuple[Tensor, Tensor | None, Any]:
    """Logits (N, V) after the prompts, the rows' mask, and a cache with a row per response; each prompt is read once if it can be."""
    cache = policy.new_cache(len(ids_PT))
    mask = needed(mask_PT)
    if group > 1 and not policy.has_plain_cache:
        ids_PT, mask, group = ids_PT.repeat_interleave(group, 0), None if mask is None else mask.repeat_interleave(group, 0), 1
    gates_PK = gates_NK if gates_NK is None or group == 1 else gates_NK[::group].contiguous()
    logits_PV = policy.forward(ids_PT, gates_NK=gates_PK, attention_mask=mask, cache=cache, last_only=True)[:, -1]
    if group == 1:
        return logits_PV, mask, cache
    assert gates_NK is None or bool((gates_NK.unflatten(0, (-1, group)) == gates_NK[::group, None]).all()), "one gate vector per prompt"
    cache.batch_repeat_interleave(group)
    _claim(cache, gates_NK)
    return logits_PV.repeat_interleave(group, 0), None if mask is None else mask.repeat_interleave(group, 0), cache


def _common(heat_N1: Tensor) -> float | Tensor:
    """Temperatures as one number where all rows have the same: asked when rows come and go, not at every token."""
    first = float(heat_N1[0]) if len(heat_N1) else 1.0
    return first if bool((heat_N1 == first).all()) else heat_N1


def texts(tokenizer: Any, generation: Generation, *, ends: Collection[int] = ()) -> list[str]:
    """(N,) the responses as text without special tokens, and without the EOS that ended them even where the tokenizer has no such name.

    A text ends before the first of the tokens `ends` that is in it, too.
    """
    tokens_NT = generation.tokens_NT.cpu().numpy()
    lengths_N = (generation.mask_NT.sum(1) - generation.stopped_N.long()).cpu().numpy()
    if ends:
        found_NT = np.isin(tokens_NT, list(ends))
        lengths_N = np.where(found_NT.any(1), np.minimum(lengths_N, found_NT.argmax(1)), lengths_N)
    return tokenizer.batch_decode([row[:n].tolist() for row, n in zip(tokens_NT, lengths_N, strict=True)], skip_special_tokens=True)


def gates_on(policy: Policy, gates_NK: Any) -> Tensor | None:
    """On the policy's device once, because decoding recognizes the gates that it has already expanded."""
    return None if gates_NK is None else torch.as_tensor(gates_NK, dtype=torch.float32, device=policy.device)


def needed(mask_NT: Tensor) -> Tensor | None:
    """The prompts' mask, or None where nothing is padded: attention is faster without one."""
    return None if bool(mask_NT.all()) else mask_NT


def check_length(policy: Policy, needed: int, temperature: float) -> None:
    """ConfigError where so many tokens do not fit the positions of the model, or a temperature is none."""
    limit, why = positions_of(policy.model.config)
    if limit is not None and needed > limit:
        raise ConfigError(
            "prompt and response fit the positions that the model knows",
            found=f"{needed} tokens for a model of {limit} ({why})",
            remedy="shorten the prompts, or lower max_new_tokens",
        )
    if not temperature >= 0 or temperature == float("inf"):
        raise ConfigError("a temperature is a finite number of at least 0", found=f"{temperature:g}", remedy="1 samples the policy itself")
