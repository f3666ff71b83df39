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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paretune.errors import ConfigError, counted
from paretune.hub import positions_of
from paretune.policy.base import Policy
from paretune.seeds import uniforms
from paretune.tasks.prompts import chat_text
from paretune.types import Prompt

__all__ = [
    "Decoding",
    "Generation",
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
        if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > len(tokenizer(prompt.text, add_special_tokens=False)["input_ids"]):
            ids = ids[:-1]  # a tokenizer that closes every text: an answer must follow
    if ids:
        return list(ids)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
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
    ) -> None:
        """Read left-padded prompts, each once, and add `group` rows per prompt, prompt by prompt, behind the rows that are there.

        `uniforms_NT` has a column for every token that may be drawn. `gates_NK` has a row per response, the same for all of a prompt; None
        is the reference. Raises ConfigError where prompt and response do not fit the model's positions, a temperature is negative, or the
        rows that are there cannot have these beside them.
        """
        n = prompt_ids_PT.shape[0] * group
        assert uniforms_NT.shape[0] == n, "one stream per row"
        check_length(self.policy, self.policy.extra_positions + prompt_ids_PT.shape[1] + uniforms_NT.shape[1], temperature)
        gates_NK = gates_on(self.policy, gates_NK)
        draws_NT = torch.from_numpy(uniforms_NT * BELOW_ONE).to(self.place)
        heat_N1 = torch.full((n, 1), float(temperature), dtype=torch.float64, device=self.place)
        count_N = torch.zeros(n, dtype=torch.long, device=self.place)
        logits_NV, mask_NT, cache = read(self.policy, prompt_ids_PT, prompt_mask_PT, gates_NK, group)
        if self.rows:
            self._advance()
            self._check_beside(cache, gates_NK)
            mask_NT = self._joint_mask(mask_NT, n, self._cache.get_seq_length(), cache.get_seq_length())
            cache = _joint_cache(self._cache, cache, self.rows, n)
            gates_NK = None if gates_NK is None or self._gates_NK is None else torch.cat([self._gates_NK, gates_NK])
            width = max(self._draws_NT.shape[1], draws_NT.shape[1])
            draws_NT = torch.cat([functional.pad(draws, (0, width - draws.shape[1])) for draws in (self._draws_NT, draws_NT)])
            logits_NV, heat_N1 = torch.cat([self._logits_NV, logits_NV]), torch.cat([self._heat_N1, heat_N1])
            count_N = torch.cat([self._count_N, count_N])
        self._cache, self._mask_NT, self._logits_NV, self._count_N = cache, mask_NT, logits_NV, count_N
        self._gates_NK, self._draws_NT, self._heat_N1 = gates_NK, draws_NT, heat_N1
        self._common = _common(heat_N1)
        _claim(cache, gates_NK)

    def step(self) -> tuple[Tensor, Tensor]:
        """Draw the next token of every row: tokens (N, 1) and their log-probabilities (N, 1) in nats, float64, at the row's temperature."""
        self._advance()
        logits_NV = self._logits_NV.to(self.place, torch.float64)
        if self.suppress_eos:
            logits_NV[:, self.policy.eos_ids] = -torch.inf
        token_N1, logp_N1 = _draw(logits_NV, self._draws_NT.gather(1, self._count_N[:, None]), self._common)
        self._count_N = self._count_N + 1
        self._pending_N1 = token_N1
        return token_N1, logp_N1

    def leave(self, gone_N: Tensor) -> None:
        """Drop the rows where `gone_N` is true, and the columns that only they had filled."""
        kept_N = (~gone_N.to(self.place)).nonzero()[:, 0]
        if len(kept_N) < self.rows and len(kept_N):
            _refuse_other_caches(self.policy, self._cache)
            here_N = kept_N.to(self.policy.device)
            empty = 0
            if self._mask_NT is not None:
                mask_NT = self._mask_NT[here_N]
                # The tokens of a prompted preference stand in the cache before the columns of the mask: none may go.
                empty = 0 if self.policy.extra_positions else int(mask_NT.argmax(1).min())
                self._mask_NT = mask_NT[:, empty:]
            for layer in self._cache.layers:
                layer.keys, layer.values = (_by_row(x, self.rows)[:, here_N, :, empty:].flatten(0, 1) for x in (layer.keys, layer.values))
            self._gates_NK = None if self._gates_NK is None else self._gates_NK[here_N].contiguous()
            _claim(self._cache, self._gates_NK)
            self._logits_NV = self._logits_NV[here_N]
            self._pending_N1 = None if self._pending_N1 is None else self._pending_N1[kept_N]
        elif not len(kept_N):
            self._cache = self._pending_N1 = None
        self._draws_NT, self._heat_N1, self._count_N = self._draws_NT[kept_N], self._heat_N1[kept_N], self._count_N[kept_N]
        self._common = _common(self._heat_N1)

    def _advance(self) -> None:
        """Give the model the tokens that were drawn last, for the logits of the next ones."""
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
        # The tokens of a prompted preference stand in the cache, but in no mask.
        own = 0 if self._gates_NK is None else self.policy.extra_positions
        device = self.policy.device
        masks = [
            torch.ones(count, length - own, dtype=torch.long, device=device) if mask is None else mask
            for mask, count, length in ((self._mask_NT, self.rows, mine), (mask_NT, n, theirs))
        ]
        return torch.cat([functional.pad(mask, (max(mine, theirs) - own - mask.shape[1], 0)) for mask in masks])

    def _check_beside(self, cache: Any, gates_NK: Tensor | None) -> None:
        _refuse_other_caches(self.policy, cache)
        if (gates_NK is None) != (self._gates_NK is None):
            raise ConfigError(
                "rows that are decoded together all have gates, or are all the reference",
                found="rows with gates and rows without",
                remedy="decode the reference's rows in a batch of their own",
            )
        lengths = self._cache.get_seq_length(), cache.get_seq_length()
        if self.policy.extra_positions and gates_NK is not None and lengths[0] != lengths[1]:
            raise ConfigError(
                "rows whose preference stands before the prompt are decoded beside rows of their length",
                found=f"{lengths[1]} tokens beside {lengths[0]}, mixing {self.policy.mixing!r}",
                remedy="decode them in a batch of their own",
            )


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
) -> Generation:
    """Responses of up to `max_new_tokens` tokens, `group` to each left-padded prompt (N = P * group rows, prompt by prompt).

    Arguments as for `Decoding.join`. `temperature` 0 takes the most likely token; `suppress_eos` gives EOS probability 0 (for timing only).
    """
    assert uniforms_NT.shape[1] >= max_new_tokens, "one uniform per token"
    uniforms_NT = uniforms_NT[:, :max_new_tokens]
    with Decoding(policy, suppress_eos=suppress_eos) as decoding:
        decoding.join(prompt_ids_PT, prompt_mask_PT, gates_NK=gates_NK, uniforms_NT=uniforms_NT, group=group, temperature=temperature)
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
            if not left:
                break
            if left <= KEPT_BELOW * len(runs_R) and policy.has_plain_cache and t + 1 < max_new_tokens:
                decoding.leave(~runs_R)
                rows_R, runs_R = rows_R[runs_R], runs_R[runs_R]
    # Outside of inference mode: copies are ordinary tensors, which autograd may keep.
    longest, device = int(length_N.max()), policy.device
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


def _joint_cache(one: Any, two: Any, n_one: int, n_two: int) -> Any:
    """The second batch's rows behind the first's in one cache, keys and values padded on the left to the longer length."""
    width = max(one.get_seq_length(), two.get_seq_length())
    for mine, other in zip(one.layers, two.layers, strict=True):
        for name in ("keys", "values"):
            parts = [_by_row(getattr(layer, name), n) for layer, n in ((mine, n_one), (other, n_two))]
            padded = [functional.pad(part, (0, 0, width - part.shape[3], 0)) for part in parts]
            setattr(mine, name, torch.cat(padded, 1).flatten(0, 1))
    return one


def _by_row(states: Tensor, n: int) -> Tensor:
    """(copies, N, heads, T, width) of a cache's states: a policy that stacks its experts has several blocks of N rows."""
    return states.unflatten(0, (-1, n))


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


def _draw(logits_NV: Tensor, uniform_N1: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (N, 1) by inversion of the cumulative distribution, and their log-probabilities (N, 1); float64 throughout.

    `temperature` is a number, or (N, 1); 0 takes the most likely token.
    """
    if isinstance(temperature, Tensor):
        greedy_N1 = temperature == 0
        token_N1, logp_N1 = _draw(logits_NV / temperature.masked_fill(greedy_N1, 1.0), uniform_N1, 1.0)
        return torch.where(greedy_N1, logits_NV.argmax(1, keepdim=True), token_N1), logp_N1.masked_fill(greedy_N1, 0.0)
    if temperature == 0:
        return logits_NV.argmax(1, keepdim=True), torch.zeros_like(uniform_N1)
    logits_NV = logits_NV if temperature == 1 else logits_NV / temperature
    highest_N1 = logits_NV.amax(1, keepdim=True)
    cumulative_NV = (logits_NV - highest_N1).exp_().cumsum_(1)
    total_N1 = cumulative_NV[:, -1:]
    # The first token whose cumulative mass exceeds the aim: never one of mass 0, because the aim stays below the total.
    token_N1 = torch.searchsorted(cumulative_NV, uniform_N1 * total_N1, right=True)
    token_N1.clamp_(max=logits_NV.shape[1] - 1)  # logits that are no numbers: their log-probability will say so
    return token_N1, logits_NV.gather(1, token_N1) - highest_N1 - total_N1.log()


def texts(tokenizer: Any, generation: Generation) -> list[str]:
    """(N,) the responses as text without special tokens, and without the EOS that ended them even where the tokenizer has no such name."""
    tokens_NT = generation.tokens_NT.cpu().numpy()
    lengths_N = (generation.mask_NT.sum(1) - generation.stopped_N.long()).cpu().numpy()
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
