"""The embedded learners: draw a batch, climb, log, save. One process, and no library beyond torch, transformers and PEFT.

A learner on it says what a batch is (`collect`) and what its loss is (`loss`). A new loss is a subclass in one file, registered in
LEARNERS, inside the tree or outside; `paretune.testing.losses.check_loss` proves that it keeps what a loss must keep.
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.policy.base import Policy
from paretune.policy.lora.decoder import recomputed
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.scoring import token_logp
from paretune.tasks.base import Task
from paretune.training.batch import Responses
from paretune.training.cost import Cost
from paretune.training.learner import Run, SampledLearner, log_record, memory_explained, not_finite, run_loop, watch_unscored
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import State

__all__ = ["Batch", "EmbeddedLearner"]

SMALLER = 'set micro_tokens or micro_batch, checkpointing: true, dtype: "bfloat16", or a smaller batch; the last checkpoint is kept'


@dataclass(frozen=True)
class Batch:
    """One step's responses, N = P * G rows group by group, and what was made of them."""

    responses: Responses
    reference_logp_NT: Tensor
    kl_N: np.ndarray  # sampled: log pi - log pi_ref of the whole response, nats
    weights_NM: np.ndarray
    advantage_N: np.ndarray
    state: State  # of the weighting, after this batch


@dataclass(frozen=True, kw_only=True)
class EmbeddedLearner(SampledLearner):
    """Base of the learners on the embedded loop. A step draws `batch` responses, `group` to each of `batch // group` prompts."""

    micro_tokens: int | None = None  # instead of micro_batch: at most so many tokens, of prompts, responses and padding, or one row

    def rules(self) -> dict[str, bool]:
        return {
            **super().rules(),
            "micro_tokens is at least 1": (self.micro_tokens or 1) >= 1,
            "either micro_batch or micro_tokens": self.micro_batch is None or self.micro_tokens is None,
        }

    @abstractmethod
    def collect(self, policy: Policy, task: Task, spec: TrainSpec, step: int, state: State | None = None) -> Batch:
        """Draw and score one batch; a pure function of the policy's weights, (spec.seed, step) and the weighting's state."""

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch, rows: slice, *, beta: float) -> Tensor:
        """The part of `rows` in the loss of the batch, a scalar with gradient; the parts of all `passes` add up to the loss."""

    def passes(self, made: Responses) -> list[slice]:
        """The rows of each forward and backward."""
        return made.passes(rows=self.micro_batch, tokens=self.micro_tokens, group=self.group)

    def train(self, spec, task, work, *, parents=None, progress=None) -> Cost:
        return run_loop(self, spec, task, work, parents, progress)

    def finished(self, run: Run) -> bool:
        return run.step >= self.steps

    def after_step(self, policy: Policy, task: Task, spec: TrainSpec, run: Run) -> None:
        """What a stopping rule needs after each step."""

    def advance(self, policy: ParameterMix, optimizer: torch.optim.Optimizer, task: Task, spec: TrainSpec, run: Run) -> dict[str, Any]:
        batch = self.collect(policy, task, spec, run.step, run.weighting)
        run.weighting = batch.state
        self._count(run, policy, batch, task)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * self.pace(run.step)
        for _ in range(self.epochs):
            loss, norm = self.update(policy, optimizer, batch, beta=task.beta, step=run.step)
        run.step += 1
        self.after_step(policy, task, spec, run)
        return {"rewards_NM": batch.responses.rewards_NM, "kl": float(batch.kl_N.mean()), "loss": loss, "gradient_norm": norm}

    def record(self, task: Task, run: Run, window: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lr = self.lr * self.pace(run.step - 1)
        record = log_record(task.objectives, window, step=run.step, samples=run.samples, tokens=run.tokens, lr=lr)
        return record | ({"validation": run.validations[-1]} if run.validations else {})

    @memory_explained(SMALLER)
    def update(self, policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, *, beta: float, step: int) -> tuple[float, float]:
        """One step of the optimizer; returns the loss and the norm of the gradient before clipping."""
        optimizer.zero_grad(set_to_none=True)
        loss = self.gradient(policy, batch, beta=beta)
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = float(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise not_finite(f"loss {loss:g}, gradient norm {norm:g}", step, self.lr)
        optimizer.step()
        return loss, norm

    def gradient(self, policy: Policy, batch: Batch, *, beta: float) -> float:
        """Add the gradient of the loss to `.grad` of the trained parameters, pass by pass; returns the loss."""
        total = 0.0
        for rows in self.passes(batch.responses):
            loss = self.loss(policy, batch, rows, beta=beta)
            loss.backward()
            total += float(loss.detach())
        return total

    def logp(self, policy: Policy, made: Responses, rows: slice, *, gates_NK: Tensor | None) -> Tensor:
        """(rows, T) log-probabilities, gates None for the reference; whole groups share the reading of their prompt."""
        ids, mask, group = made.prompt_ids_PT, made.prompt_mask_PT, self.group
        again = self.checkpointing and torch.is_grad_enabled()  # a cache, which shares prompts, cannot be filled twice
        if again or rows.start % group or (rows.stop - rows.start) % group:
            ids, mask, group = ids.repeat_interleave(group, 0)[rows], mask.repeat_interleave(group, 0)[rows], 1
        else:
            prompts = slice(rows.start // group, rows.stop // group)
            ids, mask = ids[prompts], mask[prompts]
        with recomputed(policy.bank) if again else contextlib.nullcontext():
            return token_logp(
                policy,
                ids,
                mask,
                made.tokens_NT[rows],
                gates_NK=gates_NK,
                group=group,
                temperature=self.temperature,
                mask_NT=made.mask_NT[rows],
            )

    def _count(self, run: Run, policy: Policy, batch: Batch, task: Task) -> None:
        """Charge a batch to the run; stop where too many completions could not be scored."""
        if not np.isfinite(batch.kl_N).all():
            raise not_finite("log-probabilities that are no numbers", run.step, self.lr)
        made = batch.responses
        n, generated = made.tokens_NT.shape
        positions = made.prompt_ids_PT.numel() + n * generated
        run.samples += n
        run.tokens += int(made.mask_NT.sum())
        run.updates += self.epochs
        run.flops += (4 + 4 * self.epochs) * policy.model.num_parameters() * positions
        last, names = run.step + 1 == self.steps, task.objectives.names
        run.unscored = watch_unscored(run.unscored, made.rewards_NM, names, limit=self.max_unscored, last=last)
