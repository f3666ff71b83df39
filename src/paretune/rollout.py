"""Sampling responses with a key-value cache and named uniform streams, and scoring given responses.

Each row of a batch draws its own uniforms and inverts the cumulative distribution in float64, so a response depends on the seed, the
step, the prompt and the number of the response, but not on what else is in the batch. A response ends with the first of the policy's
EOS ids or at the length limit; what ends it is known by position, so PAD may equal EOS and no token is illegal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paretune.errors import ConfigError
from paretune.seeds import uniforms
from paretune.types import Prompt

if TYPE_CHECKING:
    from paretune.policy import Policy

__all__ = ["Generation", "encode", "row_uniforms", "sample", "texts", "token_ids", "token_logp"]


@dataclass(frozen=True)
class Generation:
    """Responses, padded on the right, on the policy's device; T is the length of the longest."""

    tokens_NT: Tensor  # int64; the policy's pad id after the end
    mask_NT: Tensor  # bool; True for the tokens of the response, its EOS included
    logp_NT: Tensor  # float64, nats, under the sampling policy at its temperature; 0 on padding
    stopped_N: Tensor  # bool; True where an EOS was drawn, False where the length limit cut


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of one prompt: its chat template with the turn opened for the answer, or its plain text with the tokenizer's usual start."""
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
        bare = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(prompt.text)["input_ids"]
        if len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id:  # a tokenizer that closes every text: an answer must follow
            ids = ids[:-1]
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


@torch.no_grad()
def sample(
    policy: Policy,
    prompt_ids_NT: Tensor,
    prompt_mask_NT: Tensor,
    *,
    gates_NK: Tensor | None,
    max_new_tokens: int,
    uniforms_NT: np.ndarray,
    temperature: float = 1.0,
    suppress_eos: bool = False,
) -> Generation:
    """Responses of up to `max_new_tokens` tokens to left-padded prompts; `temperature` 0 takes the most likely token.

    `uniforms_NT` has a column for every token that may be drawn. `suppress_eos` gives EOS probability 0 (for timing only).
    Raises ConfigError where prompt and response do not fit the model's positions, or a temperature is negative.
    """
    n, device = prompt_ids_NT.shape[0], policy.device
    assert uniforms_NT.shape[0] == n, "one stream per row"
    assert uniforms_NT.shape[1] >= max_new_tokens, "one uniform per token"
    _check_length(policy, prompt_ids_NT.shape[1] + max_new_tokens, temperature)
    gates_NK = _gates(policy, gates_NK)
    where = torch.device("cpu") if device.type == "mps" else device  # float64 does not exist there
    draws_NT = torch.from_numpy(np.ascontiguousarray(uniforms_NT)).to(where)
    eos = torch.tensor(policy.eos_ids, device=where)
    mask_NT = _needed(prompt_mask_NT)
    cache = policy.new_cache(n)
    ids_NT = prompt_ids_NT
    running_N = torch.ones(n, dtype=torch.bool, device=where)
    tokens, masks, logps = [], [], []
    for t in range(max_new_tokens):
        logits = policy.forward(ids_NT, gates_NK=gates_NK, attention_mask=mask_NT, cache=cache, last_only=True)
        logits_NV = logits[:, -1].to(where, torch.float64)
        if suppress_eos:
            logits_NV[:, eos] = -torch.inf
        token_N, logp_N = _draw(logits_NV, draws_NT[:, t], temperature)
        tokens.append(torch.where(running_N, token_N, policy.pad_id))
        logps.append(torch.where(running_N, logp_N, 0.0))
        masks.append(running_N)
        running_N = running_N & ~torch.isin(token_N, eos)
        if not bool(running_N.any()):
            break
        ids_NT = token_N[:, None].to(device)
        mask_NT = None if mask_NT is None else functional.pad(mask_NT, (0, 1), value=1)
    stacked = [torch.stack(columns, 1).to(device) for columns in (tokens, masks)]
    logp_NT = torch.stack(logps, 1)
    return Generation(*stacked, logp_NT if where != device else logp_NT.to(device), ~running_N.to(device))


def _draw(logits_NV: Tensor, uniform_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens (N,) by inversion of the cumulative distribution, and their log-probabilities (N,); float64 throughout."""
    if temperature == 0:
        return logits_NV.argmax(1), torch.zeros_like(uniform_N)
    logp_NV = (logits_NV if temperature == 1 else logits_NV / temperature).log_softmax(1)
    cumulative_NV = logp_NV.exp().cumsum(1)
    total_N1 = cumulative_NV[:, -1:]
    aim_N1 = torch.minimum(uniform_N[:, None] * total_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    token_N1 = torch.searchsorted(cumulative_NV, aim_N1, right=True)  # the first whose cumulative mass exceeds the aim: never one of mass 0
    token_N1 = token_N1.clamp(max=logp_NV.shape[1] - 1)  # logits that are no numbers: their log-probability will say so
    return token_N1[:, 0], logp_NV.gather(1, token_N1)[:, 0]


def token_logp(
    policy: Policy,
    prompt_ids_NT: Tensor,
    prompt_mask_NT: Tensor,
    tokens_NT: Tensor,
    *,
    gates_NK: Tensor | None,
    temperature: float = 1.0,
) -> Tensor:
    """(N, T) float32 log-probabilities of given responses, with gradient where enabled; what stands after a response's end is arbitrary.

    Logits are made for the T positions of the responses only. Padding on the right needs no mask: nothing looks ahead.
    """
    length = tokens_NT.shape[1]
    mask_NT = _needed(prompt_mask_NT)
    if mask_NT is not None:
        mask_NT = functional.pad(mask_NT, (0, length - 1), value=1)
    ids_NT = torch.cat([prompt_ids_NT, tokens_NT[:, :-1]], 1)
    logits_NTV = policy.forward(ids_NT, gates_NK=_gates(policy, gates_NK), attention_mask=mask_NT, last_only=length)[:, -length:]
    logits_NTV = logits_NTV.float() if temperature == 1 else logits_NTV.float() / temperature
    nll = functional.cross_entropy(logits_NTV.flatten(0, 1), tokens_NT.flatten(), reduction="none")
    return -nll.view_as(tokens_NT)


def texts(tokenizer: Any, generation: Generation) -> list[str]:
    """(N,) the responses as text without special tokens."""
    tokens_NT, mask_NT = generation.tokens_NT.cpu().numpy(), generation.mask_NT.cpu().numpy()
    rows = [row[mask].tolist() for row, mask in zip(tokens_NT, mask_NT, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def _gates(policy: Policy, gates_NK: Any) -> Tensor | None:
    """On the policy's device once, because decoding recognises the gates that it has already expanded."""
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
