"""Sampling responses with a key-value cache and named uniform streams, and scoring given responses.

Each row of a batch draws its own uniforms and inverts the cumulative distribution in float64, so a response depends on the seed, the
step, the prompt and the number of the response, but not on what else is in the batch. A response ends with the first of the policy's
EOS ids or at the length limit; what ends it is known by position, so PAD may equal EOS and no token is illegal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from paretune.errors import ConfigError
from paretune.policy.lora.decoder import run_head
from paretune.seeds import uniforms
from paretune.types import Prompt

if TYPE_CHECKING:
    from paretune.policy.base import Policy

__all__ = ["Generation", "encode", "row_uniforms", "sample", "texts", "token_ids", "token_logp"]

LOGITS_AT_ONCE = 2**23  # numbers: 32 MiB in float32
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
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "prompts made of messages need a tokenizer with a chat template",
                found=f"{type(tokenizer).__name__} without one",
                remedy="give plain text prompts, or set tokenizer.chat_template",
            )
        messages = [dict(message) for message in prompt.messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
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


def sample(
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

    `uniforms_NT` has a column for every token that may be drawn. `gates_NK` has a row per response, the same for all of a prompt: prompts
    are read once each. `temperature` 0 takes the most likely token; `suppress_eos` gives EOS probability 0 (for timing only).
    Raises ConfigError where prompt and response do not fit the model's positions, or a temperature is negative.
    """
    n, device = prompt_ids_PT.shape[0] * group, policy.device
    assert uniforms_NT.shape[0] == n, "one stream per row"
    assert uniforms_NT.shape[1] >= max_new_tokens, "one uniform per token"
    _check_length(policy, policy.extra_positions + prompt_ids_PT.shape[1] + max_new_tokens, temperature)
    where = torch.device("cpu") if device.type == "mps" else device  # float64 does not exist there
    tokens, masks, logps = [], [], []
    with torch.inference_mode(), policy.bank.unchanged():
        gates_NK = _gates(policy, gates_NK)
        draws_NT = torch.from_numpy(uniforms_NT * BELOW_ONE).to(where)
        running_N = torch.ones(n, dtype=torch.bool, device=where)
        logits_NV, mask_NT, cache = _read(policy, prompt_ids_PT, prompt_mask_PT, gates_NK, group)
        for t in range(max_new_tokens):
            logits_NV = logits_NV.to(where, torch.float64)
            if suppress_eos:
                logits_NV[:, policy.eos_ids] = -torch.inf
            token_N1, logp_N1 = _draw(logits_NV, draws_NT[:, t : t + 1], temperature)
            tokens.append(token_N1)
            logps.append(logp_N1)
            masks.append(running_N)
            for eos in policy.eos_ids:
                running_N = running_N & (token_N1[:, 0] != eos)
            if t + 1 == max_new_tokens or not bool(running_N.any()):
                break
            mask_NT = None if mask_NT is None else functional.pad(mask_NT, (0, 1), value=1)
            ids_N1 = token_N1.to(device)
            logits_NV = policy.forward(ids_N1, gates_NK=gates_NK, attention_mask=mask_NT, cache=cache, last_only=True)[:, -1]
    kept_NT = torch.stack(masks, 1)  # outside of inference mode: ordinary tensors, which autograd may keep
    logp_NT = torch.cat(logps, 1).masked_fill(~kept_NT, 0.0)
    return Generation(
        tokens_NT=torch.cat(tokens, 1).masked_fill(~kept_NT, policy.pad_id).to(device),
        mask_NT=kept_NT.to(device),
        logp_NT=(logp_NT.float() if device.type == "mps" else logp_NT).to(device),
        stopped_N=(~running_N).to(device),
    )


def _read(policy: Policy, ids_PT: Tensor, mask_PT: Tensor, gates_NK: Tensor | None, group: int) -> tuple[Tensor, Tensor | None, Any]:
    """Logits (N, V) after the prompts, the rows' mask, and a cache with a row per response; each prompt is read once if it can be."""
    cache = policy.new_cache(len(ids_PT))
    mask = _needed(mask_PT)
    if group > 1 and not _repeatable(cache):
        ids_PT, mask, group = ids_PT.repeat_interleave(group, 0), None if mask is None else mask.repeat_interleave(group, 0), 1
    gates_PK = gates_NK if gates_NK is None or group == 1 else gates_NK[::group].contiguous()
    logits_PV = policy.forward(ids_PT, gates_NK=gates_PK, attention_mask=mask, cache=cache, last_only=True)[:, -1]
    if group == 1:
        return logits_PV, mask, cache
    assert gates_NK is None or bool((gates_NK.unflatten(0, (-1, group)) == gates_NK[::group, None]).all()), "one gate vector per prompt"
    cache.batch_repeat_interleave(group)
    if hasattr(cache, "paretune_gates"):  # the gates that filled it, now one row per response
        cache.paretune_gates = gates_NK
    return logits_PV.repeat_interleave(group, 0), None if mask is None else mask.repeat_interleave(group, 0), cache


def _repeatable(cache: Any) -> bool:
    """Plain attention keeps keys and values that can be repeated, and differentiated through; other caches are filled row by row."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))


def _draw(logits_NV: Tensor, uniform_N1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens (N, 1) by inversion of the cumulative distribution, and their log-probabilities (N, 1); float64 throughout."""
    if temperature == 0:
        return logits_NV.argmax(1, keepdim=True), torch.zeros_like(uniform_N1)
    logp_NV = (logits_NV if temperature == 1 else logits_NV / temperature).log_softmax(1)
    cumulative_NV = logp_NV.exp().cumsum_(1)
    # The first token whose cumulative mass exceeds the aim: never one of mass 0, because the aim stays below the total.
    token_N1 = torch.searchsorted(cumulative_NV, uniform_N1 * cumulative_NV[:, -1:], right=True)
    token_N1.clamp_(max=logp_NV.shape[1] - 1)  # logits that are no numbers: their log-probability will say so
    return token_N1, logp_NV.gather(1, token_N1)


def token_logp(
    policy: Policy,
    prompt_ids_PT: Tensor,
    prompt_mask_PT: Tensor,
    tokens_NT: Tensor,
    *,
    gates_NK: Tensor | None,
    group: int = 1,
    temperature: float = 1.0,
) -> Tensor:
    """(N, T) float32 log-probabilities of given responses, `group` to each prompt, with gradient where enabled.

    What stands after a response's end is arbitrary. Logits are made for the T positions of the responses only; with a group each prompt is
    read, and differentiated, once. Padding on the right needs no mask: nothing looks ahead.
    """
    length, gates_NK = tokens_NT.shape[1], _gates(policy, gates_NK)
    if group > 1:
        first_NV, mask_NT, cache = _read(policy, prompt_ids_PT, prompt_mask_PT, gates_NK, group)
        known = [_chosen(first_NV[:, None], tokens_NT[:, :1], temperature)]
        if length > 1:
            mask_NT = None if mask_NT is None else functional.pad(mask_NT, (0, length - 1), value=1)
            forward = partial(policy.forward, tokens_NT[:, :-1], gates_NK=gates_NK, attention_mask=mask_NT, cache=cache)
            known.append(_scored(policy, forward, tokens_NT[:, 1:], temperature))
        return torch.cat(known, 1)
    mask_NT = _needed(prompt_mask_PT)
    mask_NT = None if mask_NT is None else functional.pad(mask_NT, (0, length - 1), value=1)
    ids_NT = torch.cat([prompt_ids_PT, tokens_NT[:, :-1]], 1)
    forward = partial(policy.forward, ids_NT, gates_NK=gates_NK, attention_mask=mask_NT, last_only=length)
    return _scored(policy, forward, tokens_NT, temperature)


def _scored(policy: Policy, forward: Callable[[], Tensor], tokens_NT: Tensor, temperature: float) -> Tensor:
    """(N, T) log-probabilities of the tokens; of many logits only `LOGITS_AT_ONCE` exist at a time, in the backward too."""
    n, length = tokens_NT.shape
    vocabulary = policy.model.config.get_text_config().vocab_size
    if n * length * vocabulary <= LOGITS_AT_ONCE or not policy.splits_head:
        return _chosen(forward(), tokens_NT, temperature)
    with policy.headless():
        h_NTH = forward()

    def piece(h: Tensor, tokens: Tensor) -> Tensor:
        with policy.bank.gates(None):
            return _chosen(run_head(policy.model, h), tokens, temperature)

    step = max(1, LOGITS_AT_ONCE // (n * vocabulary))
    pieces = zip(h_NTH.split(step, 1), tokens_NT.split(step, 1), strict=True)
    return torch.cat([checkpoint(piece, h, tokens, use_reentrant=False) for h, tokens in pieces], 1)


def _chosen(logits_NTV: Tensor, tokens_NT: Tensor, temperature: float) -> Tensor:
    """(N, T) log-probabilities of the tokens."""
    logits_NTV = logits_NTV.float() if temperature == 1 else logits_NTV.float() / temperature
    return -functional.cross_entropy(logits_NTV.flatten(0, 1), tokens_NT.flatten(), reduction="none").view_as(tokens_NT)


def texts(tokenizer: Any, generation: Generation) -> list[str]:
    """(N,) the responses as text without special tokens, and without the EOS that ended them even where the tokenizer has no such name."""
    tokens_NT = generation.tokens_NT.cpu().numpy()
    lengths_N = (generation.mask_NT.sum(1) - generation.stopped_N.long()).cpu().numpy()
    return tokenizer.batch_decode([row[:n].tolist() for row, n in zip(tokens_NT, lengths_N, strict=True)], skip_special_tokens=True)


def _gates(policy: Policy, gates_NK: Any) -> Tensor | None:
    """On the policy's device once, because decoding recognizes the gates that it has already expanded."""
    return None if gates_NK is None else torch.as_tensor(gates_NK, dtype=torch.float32, device=policy.device)


def _needed(mask_NT: Tensor) -> Tensor | None:
    """The prompts' mask, or None where nothing is padded: attention is faster without one."""
    return None if bool(mask_NT.all()) else mask_NT


def _check_length(policy: Policy, needed: int, temperature: float) -> None:
    limit = getattr(policy.model.config, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise ConfigError(
            "prompt and response fit the positions that the model knows",
            found=f"{needed} tokens for a model of {limit}",
            remedy="shorten the prompts, or lower max_new_tokens",
        )
    if not temperature >= 0 or temperature == float("inf"):
        raise ConfigError("a temperature is a finite number of at least 0", found=f"{temperature:g}", remedy="1 samples the policy itself")
