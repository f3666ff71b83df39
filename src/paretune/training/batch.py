"""One batch of scored responses: which prompts, which preferences, which random streams."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paretune.policy.base import Policy
from paretune.policy.lora.bank import soup_state
from paretune.policy.lora.shard import is_sharded
from paretune.policy.rollout import Rollout, encode, generate, occurrences
from paretune.seeds import generator, seed_for
from paretune.tasks.base import Task
from paretune.tasks.preferences import onto_faces, spread_preferences
from paretune.training.processes import ranks
from paretune.training.spec import TrainSpec, gates_of
from paretune.types import Prompt

__all__ = ["Draws", "Responses", "cut_off", "draw", "in_shares", "preferences", "prompt_order"]

MERGE_LIMIT = 2**28  # bytes of weights

Draws = Callable[..., Iterator[Rollout]]
"""Who draws responses: `policy.rollout.generate`, or what takes the same arguments, such as `rollouts.VllmServer.generate`."""


@dataclass(frozen=True)
class Responses:
    """N = P * G rows, group by group. Tensors are on the policy's device; see `rollout.Generation` for those of the responses."""

    prompts: Sequence[Prompt]  # of the N rows
    prompt_ids_PT: Tensor
    prompt_mask_PT: Tensor
    tokens_NT: Tensor
    mask_NT: Tensor
    logp_NT: Tensor
    gates_NK: Tensor
    w_NM: np.ndarray
    rewards_NM: np.ndarray  # raw, NaN = unscored
    texts: Sequence[str] = ()  # without special tokens
    seconds: Mapping[str, float] = field(default_factory=dict)  # of "sampling" and of "rewards", their scores
    sampled_logp_NT: Tensor | None = None  # what another engine that drew them says, where `logp_NT` was scored anew
    weight_N: Tensor | None = None  # importance weights of such responses, float64; None: all are 1

    def kl_N(self, reference_NT: Tensor) -> np.ndarray:
        """(N,) log pi - log pi_ref of whole responses, nats, from the reference's (N, T) log-probabilities."""
        return ((self.logp_NT - reference_NT) * self.mask_NT).sum(1).double().cpu().numpy()

    def passes(self, *, rows: int | None, tokens: int | None, group: int, whole: bool = False) -> list[slice]:
        """The rows that go through the model together: `rows`, or as many as have `tokens` with prompts and padding (one at least), or all.

        With `tokens` these are whole groups where they fit, because a group reads its prompt once; with `whole` they always are.
        """
        count = len(self.tokens_NT)
        step = rows or count
        if tokens is not None:
            step = max(1, tokens // (self.prompt_ids_PT.shape[1] + self.tokens_NT.shape[1]))
            step = step if step < group else step - step % group
        if whole:
            step = max(group, step - step % group)
        return [slice(start, min(count, start + step)) for start in range(0, count, step)]


def draw(
    policy: Policy,
    task: Task,
    spec: TrainSpec,
    *,
    step: int,
    first: int,
    prompts: int,
    group: int,
    temperature: float = 1.0,
    reference: bool = False,
    known: Sequence[Prompt] | None = None,
    scored: bool = True,
    by: Draws | None = None,
) -> Responses:
    """`group` responses to each of `prompts` prompts from place `first` of their endless seeded order: training prompts, or those `known`.

    A pure function of the policy's weights, `spec.seed` and `step`. Where `spec.preference` is None each prompt gets a preference of
    its own; `spec.rule` says which gates its rows have.
    With `reference` the responses are the reference's, and `logp_NT` is its own. Rewards are NaN where none are wanted (`scored`).
    `by` draws those of the policy, where it is not this process.
    """
    known = task.prompts("train") if known is None else known
    chosen = [known[i] for i in prompt_order(spec.seed, first, prompts, len(known))]
    w_NM = preferences(spec, step, prompts, task.objectives.count).repeat(group, axis=0)
    gates_NK = torch.from_numpy(gates_of(spec, w_NM, policy.K)).float().to(policy.device)
    by = generate if reference or by is None else by
    alone = not reference and policy.K == 1 and spec.rule is None and spec.preference is not None
    of_rows = [prompt for prompt in chosen for _ in range(group)]
    numbers = occurrences(of_rows)
    noise = [seed_for(spec.seed, "reward noise", step, prompt.digest, n) for prompt, n in zip(of_rows, numbers, strict=True)]

    def part(mine: slice, *, scored: bool = scored) -> tuple[Any, ...]:
        """What one process draws and scores: ids and mask of these prompts, tokens, mask, logp, rewards, texts, seconds."""
        began, rows = time.perf_counter(), slice(mine.start * group, mine.stop * group)
        (made,) = by(
            policy,
            chosen[mine],
            gates_NK=None if merged or reference else gates_NK[rows],
            max_new_tokens=task.max_new_tokens,
            seed=spec.seed,
            step=step,
            group=group,
            numbers=numbers[rows],
            temperature=temperature,
        )
        sampled = time.perf_counter()
        rewards_NM = task.observe(made.prompts, made.texts, streams=noise[rows]) if scored else np.full(w_NM[rows].shape, np.nan)
        seconds = {"sampling": sampled - began, "rewards": time.perf_counter() - sampled}
        drawn, ids_PT, mask_PT = made.responses, made.prompt_ids_PT, made.prompt_mask_PT
        return ids_PT, mask_PT, drawn.tokens_NT, drawn.mask_NT, drawn.logp_NT, rewards_NM, made.texts, seconds

    with _merged(policy, one=alone and by is generate) as merged:
        along = functools.partial(part, scored=False) if is_sharded(policy.model) else None
        parts = ranks().mapped(ranks().shares(prompts), part, device=policy.device, along=along)
    ids, mask, tokens, made_mask, logp, rewards, texts, seconds = zip(*parts, strict=True)
    if len(parts) == 1:
        prompt_ids, prompt_mask = ids[0], mask[0]
    else:
        prompt_ids, prompt_mask = encode(policy.tokenizer, chosen, policy.device)
    drawn = (_longest(tokens, policy.pad_id), _longest(made_mask, False), _longest(logp, 0.0))
    said = [text for of in texts for text in of]
    spent = {name: max(of[name] for of in seconds) for name in seconds[0]}
    return Responses(of_rows, prompt_ids, prompt_mask, *drawn, gates_NK, w_NM, np.concatenate(rewards), said, spent)


def _longest(parts: Sequence[Tensor], pad: Any) -> Tensor:
    """(N, T) rows of several batches, padded on the right."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[1] for part in parts)
    return torch.cat([functional.pad(part, (0, width - part.shape[1]), value=pad) for part in parts])


def in_shares(made: Responses, score: Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]) -> np.ndarray:
    """The scores of all responses, each asked for in one process."""
    return np.concatenate(ranks().mapped(ranks().shares(len(made.texts)), lambda rows: score(made.prompts[rows], made.texts[rows])))


def cut_off(policy: Policy, made: Responses, limit: int) -> np.ndarray:
    """(N,) which responses the limit of tokens ended."""
    if made.tokens_NT.shape[1] < limit:
        return np.zeros(len(made.tokens_NT), dtype=bool)
    ended_N = torch.isin(made.tokens_NT[:, -1], torch.tensor(policy.eos_ids, dtype=torch.long, device=made.tokens_NT.device))
    return (made.mask_NT[:, -1].bool() & ~ended_N).cpu().numpy()


@contextlib.contextmanager
def _merged(policy: Policy, *, one: bool) -> Iterator[bool]:
    """Where `one` adapter serves all rows of a small model: sample from merged weights, without the cost of adapter layers.

    True while the model holds W + s B A; run it with no gates then. The original tensors are put back, not recomputed. Only for float32
    weights, as adapters are (rounding to less would sample from another policy), and up to `MERGE_LIMIT` bytes.
    """
    size = sum(weight.nbytes for weight in policy.model.parameters())
    split = is_sharded(policy.model) or bool(policy.bank.quantized)
    if not one or split or policy.mixing != "parameter" or policy.model.dtype != torch.float32 or size > MERGE_LIMIT:
        yield False
        return
    soup = soup_state(policy.bank, [1.0])
    layers = {name: policy.model.get_submodule(name.removesuffix(".weight")).base_layer for name in soup}
    kept = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight.data = soup[name]
        yield True
    finally:
        for name, layer in layers.items():
            layer.weight.data = kept[name]


def prompt_order(seed: int, first: int, n: int, count: int) -> list[int]:
    """Places first .. first + n of an endless sequence of prompts: all `count` of them in a seeded order, then in another, ..."""
    assert count > 0, "a task has training prompts"
    return [_shuffled(seed, place // count, count)[place % count] for place in range(first, first + n)]


@functools.lru_cache(maxsize=8)
def _shuffled(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    return tuple(generator(seed, "prompts", epoch).permutation(count).tolist())


def preferences(spec: TrainSpec, step: int, n: int, count: int) -> np.ndarray:
    """(n, M) the fixed preference, or one sampled for each prompt of the step."""
    if spec.preference is None:
        active_objectives = list(range(count) if spec.active_objectives is None else spec.active_objectives)
        w_NM = np.zeros((n, count))
        w_NM[:, active_objectives] = spread_preferences(generator(spec.seed, "preferences", step), n, len(active_objectives))
        if share := spec.learner.get("faces", 0.0):
            onto_faces(w_NM, active_objectives, share, generator(spec.seed, "faces", step))
        return w_NM
    return np.tile(np.asarray(spec.preference, dtype=np.float64), (n, 1))
