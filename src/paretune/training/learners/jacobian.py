"""The objectives' gradients: one backward pass for all of them.

A LoRA layer adds B A x to its output y. What its factors' gradients need is x and dy, row by row; a row's dy scales with the weight of
the row in the loss. So one backward with weight 1 on every response's log-probability gives dy for all rows, and the gradient of
objective k follows from it by a weighted matrix product per layer, the weights being the advantages under objective k. The step at any
weights c_k of the objectives (see `weightings.gramian`) is a sum of these: no second backward is needed. The rows of a group share the
reading of their prompt, where one dy would mix them. There each prompt is read once per objective instead of once per response, and what
flows back into its keys and values is weighted on the way: M readings for G, and still one backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from paretune.policy.base import Policy
from paretune.policy.lora.layers import FusedLayer, Gated
from paretune.policy.lora.shard import anyone, is_sharded
from paretune.policy.rollout import needed
from paretune.policy.scoring import chosen
from paretune.training.batch import Responses
from paretune.training.learners.loss import loss_scale
from paretune.training.processes import ranks

__all__ = ["Jacobian", "autograd_jacobian", "response_jacobian"]


@dataclass(frozen=True)
class Jacobian:
    """Gradients of the M objectives' returns: for each trained parameter, in the order of the bank's, a tensor with axis M first."""

    rows: Sequence[Tensor]

    @property
    def gramian_MM(self) -> np.ndarray:
        """Inner products of the objectives' gradients over all parameters, float64."""
        total = sum(rows.flatten(1) @ rows.flatten(1).t() for rows in self.rows)
        assert isinstance(total, Tensor), "something is trained"
        return total.double().cpu().numpy()

    def descend(self, parameters: Sequence[Tensor], weights_M: np.ndarray) -> None:
        """Set `.grad` so that an optimizer, which descends, climbs sum_k weights_k J_k."""
        for parameter, rows in zip(parameters, self.rows, strict=True):
            weights = torch.from_numpy(-weights_M).to(rows)
            parameter.grad = (weights @ rows.flatten(1)).view_as(parameter)


def autograd_jacobian(returns_M: Tensor, parameters: Sequence[Tensor]) -> Jacobian:
    """The Jacobian of M values by M backward passes over one graph, which is kept."""
    grads = [torch.autograd.grad(value, parameters, retain_graph=True) for value in returns_M]
    return Jacobian([torch.stack(rows) for rows in zip(*grads, strict=True)])


def response_jacobian(
    policy: Policy, made: Responses, credit_NM: np.ndarray, share_NT: Tensor, *, group: int, temperature: float, micro_batch: int | None
) -> Jacobian:
    """Gradients of sum over rows of credit_nk times sum over tokens of share_nt log pi, for every objective k.

    `credit_NM` are advantages, one column per objective. `share_NT` is 0 where a response has ended.
    """
    n, step, here, dtype = len(credit_NM), micro_batch or len(credit_NM), ranks(), policy.bank.base.dtype
    credit_times, share_times = loss_scale(dtype, float(np.abs(credit_NM).max()) or 1.0), loss_scale(dtype, 1 / n)
    totals: dict[int, Tensor] = {}
    starts = range(0, n, step)
    for turn in range(here.rank, -(-len(starts) // here.size) * here.size, here.size):
        if turn >= len(starts) and not is_sharded(policy.model):  # what is sharded computes in all processes
            break
        start = starts[min(turn, len(starts) - 1)]
        rows = slice(start, min(n, start + step))
        credit = torch.from_numpy(credit_NM[rows] * credit_times).to(policy.device)
        with _recorded(policy) as calls:
            logp_NT = _read(policy, made, rows, credit, group=group, temperature=temperature, calls=calls)
        seeds = torch.autograd.grad((logp_NT * (share_NT[rows] * share_times)).sum(), [call.y for call in calls], allow_unused=True)
        for call, dy in zip(calls, seeds, strict=True):
            if dy is not None and turn < len(starts):
                _accumulate(totals, call, dy, credit)
    parameters = policy.bank.parameters()
    rows_of = here.summed([totals.get(id(p), p.new_zeros(credit_NM.shape[1], *p.shape)) for p in parameters])
    return Jacobian([gradient / (credit_times * share_times) for gradient in rows_of])


@dataclass
class _Call:
    """One forward of one LoRA layer. `objectives` > 0: its rows are not responses but that many blocks, one per objective."""

    layer: FusedLayer
    x: Tensor
    y: Tensor
    gates: Tensor
    objectives: int = 0


@contextlib.contextmanager
def _recorded(policy: Policy) -> Iterator[list[_Call]]:
    """What every LoRA layer takes in and gives out while the context is open."""
    calls: list[_Call] = []

    def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor, *, layer: FusedLayer) -> None:
        mode = layer.switch.mode
        assert isinstance(mode, Gated), "objectives' gradients are taken at the parameter level"
        calls.append(_Call(layer, inputs[0].detach(), output, mode.gates))

    trained = [layer for layer in policy.bank.layers if any(p.requires_grad for p in (*layer.a, *layer.b))]
    hooks = [layer.module.register_forward_hook(partial(note, layer=layer)) for layer in trained]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _read(policy: Policy, made: Responses, rows: slice, credit: Tensor, *, group: int, temperature: float, calls: list[_Call]) -> Tensor:
    """(rows, T) log-probabilities of the responses; marks the calls that read prompts once per objective."""
    tokens_NT, gates_NK, m = made.tokens_NT[rows], made.gates_NK[rows], credit.shape[1]
    ids, mask, length = made.prompt_ids_PT, made.prompt_mask_PT, made.tokens_NT.shape[1]
    if m >= group or anyone(policy.model, bool(rows.start % group or len(credit) % group)) or not policy.has_plain_cache:
        ids, mask = (x.repeat_interleave(group, 0)[rows] for x in (ids, mask))
        known = needed(mask)
        known = None if known is None else functional.pad(known, (0, length - 1), value=1)
        whole = torch.cat([ids, tokens_NT[:, :-1]], 1)
        return chosen(policy.forward(whole, gates_NK=gates_NK, attention_mask=known, last_only=length), tokens_NT, temperature)
    prompts = slice(rows.start // group, rows.start // group + len(credit) // group)
    ids, known = ids[prompts].repeat(m, 1), needed(mask[prompts])
    cache = policy.new_cache(len(ids))
    many = None if known is None else known.repeat(m, 1)
    first = policy.forward(ids, gates_NK=gates_NK[::group].repeat(m, 1), attention_mask=many, cache=cache, last_only=True)[:, -1]
    for call in calls:
        call.objectives = m
    first = _Spread.apply(first, credit, group)
    for layer in cache.layers:
        layer.keys, layer.values = (_Spread.apply(x, credit, group) for x in (layer.keys, layer.values))
    cache.paretune_gates = gates_NK
    logp = [chosen(first[:, None], tokens_NT[:, :1], temperature)]
    if length > 1:
        known = None if known is None else functional.pad(known.repeat_interleave(group, 0), (0, length - 1), value=1)
        logits = policy.forward(tokens_NT[:, :-1], gates_NK=gates_NK, attention_mask=known, cache=cache)
        logp.append(chosen(logits, tokens_NT[:, 1:], temperature))
    return torch.cat(logp, 1)


class _Spread(torch.autograd.Function):
    """M equal blocks of P rows -> one row per response, P * group; back: block k gets the sum over a group, weighted by credit k."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, credit: Tensor, group: int) -> Tensor:
        ctx.save_for_backward(credit)
        ctx.group = group
        return x[: len(credit) // group].repeat_interleave(group, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (credit,) = ctx.saved_tensors
        (grad,) = grads
        credit_PMG = credit.unflatten(0, (-1, ctx.group)).transpose(1, 2)
        back_PMX = torch.bmm(credit_PMG.to(grad.dtype), grad.flatten(1).unflatten(0, (-1, ctx.group)))
        return back_PMX.transpose(0, 1).reshape(-1, *grad.shape[1:]), None, None


def _accumulate(totals: dict[int, Tensor], call: _Call, dy: Tensor, credit: Tensor) -> None:
    """Add what one call contributes to the objectives' gradients of its layer's trained factors, keyed by the parameter's id."""
    layer, m = call.layer, credit.shape[1]
    for k, a_rI, b_Or, scale in zip(layer.members, layer.a, layer.b, layer.scalings, strict=True):
        if not a_rI.requires_grad:
            continue
        gate = call.gates[..., k].to(a_rI.dtype) * scale
        gate = gate[:, None, None] if gate.dim() == 1 else gate[..., None]  # a number, (N, 1, 1) or (N, T, 1)
        x, out = call.x.to(a_rI.dtype), dy.to(b_Or.dtype)
        with torch.no_grad():
            inner = functional.linear(x, a_rI) * gate  # what B multiplies
            back = (out @ b_Or) * gate  # the gradient at A x
            if call.objectives:  # blocks: those of objective k are its alone
                x, out, inner, back = (v.reshape(m, -1, v.shape[-1]) for v in (x, out, inner, back))
                da, db = torch.bmm(back.transpose(1, 2), x), torch.bmm(out.transpose(1, 2), inner)
            else:
                inner, back = ((v[:, :, None] * credit[:, None, :, None].to(v.dtype)).flatten(0, 1).flatten(1) for v in (inner, back))
                da = (back.t() @ x.flatten(0, 1)).view(m, *a_rI.shape)
                db = (inner.t() @ out.flatten(0, 1)).view(m, -1, len(b_Or)).transpose(1, 2)
        for parameter, value in ((a_rI, da), (b_Or, db)):
            totals[id(parameter)] = totals[id(parameter)] + value if id(parameter) in totals else value
