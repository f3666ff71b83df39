"""Conformance suite for losses: what a learner on the embedded loop must keep, whatever its loss is.

from paretune.testing.losses import check_loss

def test_my_loss():
    check_loss("my-loss")
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune.errors import ConfigError
from paretune.registry import LEARNERS, describe
from paretune.seeds import forked_torch, generator
from paretune.tasks.exact.task import ExactTask
from paretune.testing.methods import quick_task
from paretune.testing.objectives import attempt, check_registered, require
from paretune.training.cost import TIMED
from paretune.training.learners.base import Learner
from paretune.training.learners.embedded import Batch, EmbeddedLearner
from paretune.training.spec import Artifact, TrainSpec

__all__ = ["check_loss"]

SHAPE = {"rank": 2, "alpha": 4, "batch": 32, "group": 4, "samples": 128, "log_every": 1, "checkpoint_every": 2, "device": "cpu"}
FIELDS = ("stop_cv", "micro_batch", "micro_tokens", "dtype")  # set back to their defaults
STEP = 1e-3  # of the differences, along directions of length 1: log-probabilities are float32, and a clipped ratio has a corner


def check_loss(
    learner: EmbeddedLearner | str | Mapping[str, Any],
    *,
    task: ExactTask | None = None,
    parents: Mapping[str, Artifact] | None = None,
    **training: Any,
) -> None:
    """Gradient, sign, accumulation, missing scores and resumption of a learner on the embedded loop.

    `learner` is an instance, a name or a description. The sign is that of losses with advantages; others say elsewhere what is better.
    It runs on small batches, with the learner's other fields as they are. `training` are fields of the TrainSpec, such as
    `frozen_adapters`, and `parents` the artifacts that these name. Raises ConformanceError at the first broken promise.
    """
    made = LEARNERS.build(learner) if isinstance(learner, (str, Mapping)) else learner
    check_registered(made, LEARNERS, Learner)
    require(isinstance(made, EmbeddedLearner), "a loss is part of an EmbeddedLearner", repr(type(made)), "class MyLoss(PolicyGradient)")
    defaults = {f.name: f.default for f in dataclasses.fields(made) if f.name in FIELDS}
    small = dataclasses.replace(made, **{**SHAPE, **defaults})
    task = task or quick_task()
    count = task.objectives.count
    given = {"preference": (1 / count,) * count, "seed": 0, **training}
    spec = TrainSpec(task=describe(task), learner=describe(small), **given)
    _check_gradient(small, task, spec, parents or {})
    _check_sign(small, task, spec, parents or {})
    _check_pieces(small, task, spec, parents or {})
    _check_unscored(small, task, spec, parents or {})
    _check_resumption(small, task, spec, parents or {})


@dataclasses.dataclass(frozen=True)
class _Holes(ExactTask):
    """The same task with rewards moved by `shift`, one response in `every` unscored by the first objective."""

    every: int = 0
    shift: float = 0.0

    def observe(self, prompts: Any, completions: Any, *, streams: Any) -> np.ndarray:
        rewards_NM = super().observe(prompts, completions, streams=streams) + self.shift
        if self.every:
            rewards_NM[:: self.every, 0] = np.nan
        return rewards_NM


def _collected(learner: EmbeddedLearner, task: Any, spec: TrainSpec, parents: Mapping[str, Artifact]) -> tuple[Any, Batch]:
    """A policy away from the reference, in float64, and a batch of it."""
    policy = learner.start(spec, task, parents)
    with torch.no_grad(), forked_torch(1):
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    policy.model.double()
    batch = attempt("collect() draws a batch", "return a Batch or a subclass of it", lambda: learner.collect(policy, task, spec, 0))
    return policy, batch


def _gradient(learner: EmbeddedLearner, policy: Any, batch: Batch, beta: float) -> tuple[float, np.ndarray]:
    """The loss and its gradient over all trained parameters."""
    for parameter in policy.parameters():
        parameter.grad = None
    loss = attempt("gradient() runs", "loss() returns a scalar with gradient", lambda: learner.gradient(policy, batch, beta=beta))
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    return loss, torch.cat([g.flatten() for g in found]).double().numpy()


def _check_gradient(learner: EmbeddedLearner, task: ExactTask, spec: TrainSpec, parents: Mapping[str, Artifact]) -> None:
    """Central differences of the loss, along its gradient and along two other directions.

    With two epochs a ratio is to what was drawn. With one it may be to the policy itself, where its value says nothing: there the
    gradient must be the same.
    """
    fixed = _with_epochs(learner)
    policy, batch = _collected(learner, task, spec, parents)
    _, gradient = _gradient(fixed, policy, batch, task.beta)
    rule, remedy = "the gradient of a loss is that of its value", "detach nothing that the policy should move; add each row once"
    size = float(np.linalg.norm(gradient))
    require(np.isfinite(size) and size > 1e-6, "a loss has a gradient", f"a gradient of length {size:g}", "use learner.logp(...)")
    others = generator(0, "losses").normal(size=(2, len(gradient)))
    for direction in (gradient / size, *(others / np.linalg.norm(others, axis=1, keepdims=True))):
        far, near = (_slope(fixed, policy, batch, task.beta, direction, step) for step in (STEP, STEP / 2))
        slope = (4 * near - far) / 3  # what is left is of order STEP ** 4
        wanted = float(gradient @ direction)
        close = abs(slope - wanted) <= 1e-2 * size
        require(close, rule, f"the loss rises by {slope:.6g} per step, the gradient says {wanted:.6g}", remedy)
    once = _gradient(learner, policy, batch, task.beta)[1]
    close = float(np.abs(once - gradient).max()) <= 1e-3 * size
    require(close, rule, "another gradient with one epoch than with two, before any update", "a ratio is 1 where nothing was updated")


def _check_sign(learner: EmbeddedLearner, task: ExactTask, spec: TrainSpec, parents: Mapping[str, Artifact]) -> None:
    """A step makes likelier what has the higher advantage: half the difference of the steps with the advantages and with minus these.

    The difference has only what depends on them: a loss may have other terms, and weights that are all positive.
    """
    policy, batch = _collected(learner, task, spec, parents)
    if not batch.advantage_N.any() or getattr(batch, "jacobian", None) is not None:
        return
    turned = dataclasses.replace(batch, advantage_N=-batch.advantage_N)
    gradients = [_gradient(learner, policy, each, task.beta)[1] for each in (batch, turned)]
    step = (gradients[1] - gradients[0]) / 2
    made = batch.responses
    logp_N = (learner.logp(policy, made, slice(0, len(batch.advantage_N)), gates_NK=made.gates_NK) * made.mask_NT).sum(1)
    wanted = torch.autograd.grad((torch.from_numpy(batch.advantage_N).to(logp_N) * logp_N).sum(), policy.parameters(), allow_unused=True)
    up = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(policy.parameters(), wanted, strict=True)])
    cosine = float(step @ up.double().numpy()) / max(float(np.linalg.norm(step)) * float(up.norm()), 1e-300)
    rule, remedy = "a step makes likelier what has the higher advantage", "losses are minimized: minus the gain"
    require(cosine > 0, rule, f"a step with cosine {cosine:.2g} to that of policy gradients", remedy)


def _with_epochs(learner: EmbeddedLearner) -> EmbeddedLearner:
    """With two epochs, or as it is where it refuses them."""
    try:
        return dataclasses.replace(learner, epochs=2)
    except ConfigError:
        return learner


def _slope(learner: EmbeddedLearner, policy: Any, batch: Batch, beta: float, direction: np.ndarray, step: float) -> float:
    """Central difference of the loss along a direction of all trained parameters, which stay as they were."""
    kept, values = [p.detach().clone() for p in policy.parameters()], []
    for sign in (1.0, -1.0):
        parts = np.split(sign * step * direction, np.cumsum([p.numel() for p in kept])[:-1])
        with torch.no_grad():
            for parameter, before, part in zip(policy.parameters(), kept, parts, strict=True):
                parameter.copy_(before + torch.from_numpy(part).view_as(before).to(before))
            values.append(sum(float(learner.loss(policy, batch, rows, beta=beta)) for rows in learner.passes(batch.responses)))
    with torch.no_grad():
        for parameter, before in zip(policy.parameters(), kept, strict=True):
            parameter.copy_(before)
    return (values[0] - values[1]) / (2 * step)


def _check_pieces(learner: EmbeddedLearner, task: ExactTask, spec: TrainSpec, parents: Mapping[str, Artifact]) -> None:
    policy, batch = _collected(learner, task, spec, parents)
    loss, gradient = _gradient(learner, policy, batch, task.beta)
    for rows in (4, 8):  # 8 passes of a group each, 4 of two
        parts = dataclasses.replace(learner, micro_batch=rows)
        other, pieces = _gradient(parts, policy, batch, task.beta)
        same = abs(other - loss) <= 1e-5 * (1 + abs(loss)) and np.abs(pieces - gradient).max() <= 1e-4 * np.abs(gradient).max()
        found = f"micro_batch={rows}: loss {other:.8g} for {loss:.8g}, gradient off by {np.abs(pieces - gradient).max():.3g}"
        require(bool(same), "a batch in pieces has the loss and gradient of the whole", found, "divide by the batch's size, not the rows'")


def _check_unscored(learner: EmbeddedLearner, task: ExactTask, spec: TrainSpec, parents: Mapping[str, Artifact]) -> None:
    dials = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    rule = "an unscored response is left out"

    def gradient(every: int, shift: float) -> np.ndarray:
        holed = _Holes(**dials, every=every, shift=shift)
        policy, batch = _collected(learner, holed, spec, parents)
        loss, found = _gradient(learner, policy, batch, task.beta)
        known = np.isfinite(loss) and np.isfinite(found).all()
        require(bool(known), rule, f"loss {loss:g} with NaN among the rewards", "mask what is NaN before it is summed")
        return found

    plain, moved = gradient(0, 0.0), gradient(0, 1.0)
    scale = np.abs(plain).max()
    if np.abs(plain - moved).max() <= 1e-3 * scale:  # it compares responses: then a missing score is no 0
        apart = np.abs(gradient(3, 0.0) - gradient(3, 1.0)).max()
        require(apart <= 1e-3 * scale, rule, "rewards that are all higher by 1 change the gradient", "NaN is not 0: leave the row out")
    gradient(1, 0.0)


def _check_resumption(learner: EmbeddedLearner, task: ExactTask, spec: TrainSpec, parents: Mapping[str, Artifact]) -> None:
    class Stop(Exception):
        pass

    def stop(record: Mapping[str, Any]) -> None:
        if record["step"] == 3:  # after the checkpoint at 2
            raise Stop

    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        for place in (whole, cut):
            place.mkdir()
        attempt("a training runs to its end", "see the error", lambda: learner.train(spec, task, whole, parents=parents))
        with contextlib.suppress(Stop):
            learner.train(spec, task, cut, parents=parents, progress=stop)
        learner.train(spec, task, cut, parents=parents)
        remedy = "draw from (spec.seed, step) only, and keep what one step leaves to the next in the batch's `state`"
        require(_left(whole) == _left(cut), "a training that was cut short goes on as if it had not been", "another result", remedy)


def _left(work: Path) -> dict[str, Any]:
    """Adapters and log of a training, times left out."""
    lines = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    log = [{name: value for name, value in line.items() if name not in TIMED} for line in lines]
    return {"log": log, **{str(p.relative_to(work)): p.read_bytes() for p in sorted(work.rglob("*.safetensors"))}}
