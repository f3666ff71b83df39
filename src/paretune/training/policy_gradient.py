"""The embedded learner: one policy-gradient loop on sampled responses.

    J_w(pi) = mean over prompts of E[w . r(x, y) - beta * (log pi(y|x) - log pi_ref(y|x))]

`PolicyGradient` with its defaults climbs exactly this: responses are drawn from the policy itself, the KL penalty is part of each
response's return, its baseline is the mean return of the *other* responses to the same prompt, and log-probabilities are summed over
the response. Its expected gradient is the gradient of J_w, before clipping and Adam; the tests hold it to that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError, TrainingError
from paretune.objectives.base import refuse_unscored
from paretune.objectives.utilities import check_scalarizer, scalarize
from paretune.policy.base import Policy
from paretune.policy.lora.decoder import recomputed
from paretune.policy.rollout import token_logp
from paretune.registry import LEARNERS
from paretune.seeds import seed_for
from paretune.tasks.base import Task
from paretune.tasks.exact.optimum import landmarks
from paretune.training.advantages import advantages, aggregate_advantages, group_covariance, group_mean, leave_one_out
from paretune.training.batch import Responses, draw
from paretune.training.checkpoint import TrainLog, is_finished, load_checkpoint, save_checkpoint
from paretune.training.cost import Cost, read_cost
from paretune.training.gradients import Jacobian, response_jacobian
from paretune.training.learner import Learner, converged, memory_explained
from paretune.training.loss import kl_terms, policy_loss
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import State, StepContext, check_combination, weighting_of

__all__ = ["Batch", "PolicyGradient"]

WATCHED = 256  # completions over which `max_unscored` is judged, at least
SMALLER = 'set micro_tokens or micro_batch, checkpointing: true, dtype: "bfloat16", or a smaller batch; the last checkpoint is kept'
CHECKPOINT_SECONDS = 300.0  # long steps: a checkpoint at least this often, whatever `checkpoint_every`


@dataclass(frozen=True)
class Batch:
    """One step's responses, N = P * G rows group by group, and what was made of them."""

    responses: Responses
    reference_logp_NT: Tensor
    kl_N: np.ndarray  # sampled: log pi - log pi_ref of the whole response, nats
    weights_NM: np.ndarray
    advantage_N: np.ndarray
    state: State  # of the weighting, after this batch
    jacobian: Jacobian | None = field(default=None, kw_only=True)  # the objectives' gradients, where the weighting asked for them


@dataclass
class _Run:
    """What a checkpoint must know beside tensors."""

    key: str
    step: int = 0
    samples: int = 0
    tokens: int = 0
    updates: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    evaluations: int = 0
    validation_samples: int = 0
    log_length: int = 0
    validations: list[float] = field(default_factory=list)
    weighting: State | None = None
    unscored: list[list[int]] = field(default_factory=list)  # per recent step: completions, then unscored ones per objective


@LEARNERS.register("pg")
@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Learner):
    """The embedded policy-gradient loop on LoRA. A step draws `batch` responses, `group` to each of `batch // group` prompts.

    Source: REINFORCE with a leave-one-out baseline (Kool et al. 2019; RLOO, 2402.14740), the KL penalty in the return.
    Differs: whole responses are the actions; sums over tokens; no division by a group's spread.
    Hides: `normalize="group"`, `kl_in="loss"`, `length="token_mean"`, `epochs` above 1 and `temperature` other than 1 are there for
        comparison and climb something other than J_w; `normalize="batch"` rescales each step by one positive number.
    """

    samples: int = 40_000
    batch: int = 64
    group: int = 8
    optimizer: Literal["muon", "adam"] = "muon"
    lr: float = 5e-3  # for "adam", 3e-3 does about as well as it can on exact-v1
    momentum: float = 0.9  # of "muon"
    betas: tuple[float, float] = (0.9, 0.95)  # of "adam"
    clip_norm: float | None = 1.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: int = 0  # steps of linear warm-up
    baseline: Literal["leave_one_out", "group_mean"] = "leave_one_out"
    normalize: Literal["none", "batch", "group"] = "none"
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    length: Literal["sum", "token_mean"] = "sum"
    epochs: int = 1  # updates on each batch; from the second on the ratio is clipped
    ratio: Literal["sequence", "token"] = "sequence"
    clip_eps: float = 0.2
    micro_batch: int | None = None  # rows per forward and backward; None is the whole batch at once
    micro_tokens: int | None = None  # instead: at most so many tokens, of prompts, responses and padding, or one row
    checkpointing: bool = False  # of activations: decoder layers keep their input only and run again in the backward
    temperature: float = 1.0  # the policy that is trained is the tempered one
    max_unscored: float = 0.10
    stop_cv: float | None = None  # stop when std / |mean| of the last `stop_window` validation means is below
    stop_window: int = 20
    validate_every: int = 10
    validation_samples: int = 64
    log_every: int = 10
    checkpoint_every: int = 100

    def __post_init__(self):
        rules = {
            "batch is a multiple of group": self.batch % self.group == 0 and self.batch > 0,
            "group is at least 2: a response is compared with the others to its prompt": self.group >= 2,
            "samples are at least one batch": self.samples >= self.batch,
            "epochs, stop_window, validate_every, log_every and checkpoint_every are at least 1": min(
                self.epochs, self.stop_window, self.validate_every, self.log_every, self.checkpoint_every
            )
            >= 1,
            "lr, alpha and temperature are positive": min(self.lr, self.alpha, self.temperature) > 0,
            "micro_batch and micro_tokens are at least 1": min(self.micro_batch or 1, self.micro_tokens or 1) >= 1,
            "either micro_batch or micro_tokens": self.micro_batch is None or self.micro_tokens is None,
            "max_unscored lies between 0 and 1": 0 <= self.max_unscored <= 1,
            "k1 belongs in the reward: inside a loss its gradient has expectation 0": (self.kl_in, self.kl_estimator) != ("loss", "k1"),
            "in the reward only k1 is unbiased; k2 and k3 belong in the loss": self.kl_in == "loss" or self.kl_estimator == "k1",
        }
        for rule, kept in rules.items():
            if not kept:
                names = [f.name for f in dataclasses.fields(self) if f.name in rule.replace(",", " ").replace(":", " ").split()]
                shown = names or ["kl_in", "kl_estimator"]
                found = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
                raise ConfigError(rule, found=found, remedy="change one of them; `paretune show pg` prints the defaults")

    @property
    def steps(self) -> int:
        """Batches drawn at most: whole ones only, so that `samples` is never exceeded."""
        return self.samples // self.batch

    def scaled(self, effort: float) -> PolicyGradient:
        return dataclasses.replace(self, samples=max(self.batch, round(self.samples * effort)))

    def train(self, spec, task, work, *, parents=None, progress=None) -> Cost:
        if is_finished(work):  # by a process that was killed before it could publish
            return read_cost(work)
        began = time.monotonic()
        check_scalarizer(spec.scalarizer)
        if spec.scalarize_at not in ("reward", "advantage"):
            raise ConfigError(
                "objectives are scalarized at the reward or at the advantage",
                found=f"scalarize_at={spec.scalarize_at!r}",
                remedy='use "reward" (sum, then normalize) or "advantage" (normalize, then sum)',
            )
        check_combination(spec)
        self._check_gradients(spec)
        policy = self.start(spec, task, parents or {})
        weights = policy.parameters()
        optimizer = self.new_optimizer(weights)
        run = _Run(**(load_checkpoint(work, spec.key, weights, optimizer) or {"key": spec.key}))
        saved = time.monotonic()
        with TrainLog(work / "train.jsonl", length=run.log_length, began=began - run.seconds, tokens=run.tokens, progress=progress) as log:
            window: list[dict[str, Any]] = []
            while run.step < self.steps and not converged(run.validations, self.stop_window, self.stop_cv):
                batch = self.collect(policy, task, spec, run.step, run.weighting)
                run.weighting = batch.state
                self._count(run, policy, batch, task)
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * self.pace(run.step)
                for _ in range(self.epochs):
                    loss, norm = self.update(policy, optimizer, batch, beta=task.beta, step=run.step)
                run.step += 1
                if self.stop_cv is not None and run.step % self.validate_every == 0:
                    run.validations.append(self.validate(policy, task, spec, run))
                window.append(
                    {"rewards_NM": batch.responses.rewards_NM, "kl": float(batch.kl_N.mean()), "loss": loss, "gradient_norm": norm}
                )
                last = run.step == self.steps or converged(run.validations, self.stop_window, self.stop_cv)
                if last or run.step % self.log_every == 0:
                    log.write(self._record(task, run, window), steps=self.steps)
                    window = []
                if last or run.step % self.checkpoint_every == 0 or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    run.seconds, run.log_length, saved = log.seconds, log.length, time.monotonic()
                    save_checkpoint(work, run.step, weights, optimizer, dataclasses.asdict(run))
        cost = Cost(
            samples=run.samples,
            tokens=run.tokens,
            steps=run.updates,
            flops=run.flops,
            seconds=run.seconds,
            evaluations=run.evaluations,
            validation_samples=run.validation_samples,
        )
        return self.finish(spec, policy, work, cost)

    def new_optimizer(self, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Muon (Jordan et al. 2024) orthogonalises each factor's update; both optimizers have no weight decay."""
        if self.optimizer == "muon":
            return torch.optim.Muon(weights, lr=self.lr, momentum=self.momentum, weight_decay=0.0)
        return torch.optim.Adam(weights, lr=self.lr, betas=self.betas, fused=weights[0].device.type == "cpu")

    @memory_explained(SMALLER)
    def collect(self, policy: Policy, task: Task, spec: TrainSpec, step: int, state: State | None = None) -> Batch:
        """Draw and score one batch; a pure function of the policy's weights, (spec.seed, step) and the weighting's state."""
        count = self.batch // self.group
        made = draw(policy, task, spec, step=step, first=step * count, prompts=count, group=self.group, temperature=self.temperature)
        with torch.inference_mode():
            parts = [self._logp(policy, made, rows, gates_NK=None) for rows in self.passes(made)]
        reference_NT = torch.cat(parts)  # an ordinary tensor, which autograd may keep
        kl_N = ((made.logp_NT - reference_NT) * made.mask_NT).sum(1).double().cpu().numpy()
        penalty_N = task.beta * kl_N if self.kl_in == "reward" else np.zeros_like(kl_N)
        jacobian = None
        if weighting_of(spec).needs_gramian:
            jacobian = self.jacobian(policy, made, made.rewards_NM - penalty_N[:, None])
            if not np.isfinite(jacobian.gramian_MM).all():
                raise _not_finite("gradients of the objectives that are no numbers", step, self.lr)
        weights_NM, state = self.weights(spec, task, made, kl_N, step, state, None if jacobian is None else jacobian.gramian_MM)
        advantage_N = self.advantages(spec, task, made.rewards_NM, weights_NM, penalty_N)
        return Batch(made, reference_NT, kl_N, weights_NM, advantage_N, state, jacobian=jacobian)

    def jacobian(self, policy: Policy, made: Responses, returns_NM: np.ndarray) -> Jacobian:
        """The estimated gradients of the objectives' returns, by one backward."""
        each_PGM = {"leave_one_out": leave_one_out, "group_mean": group_mean}[self.baseline](
            returns_NM.reshape(-1, self.group, returns_NM.shape[1])
        )
        credit_NM = np.nan_to_num(each_PGM, nan=0.0).reshape(returns_NM.shape)
        mask_NT = made.mask_NT.float()
        share_NT = mask_NT / len(mask_NT) / (1.0 if self.length == "sum" else mask_NT.sum(1, keepdim=True).clamp(min=1.0))
        return response_jacobian(
            policy, made, credit_NM, share_NT, group=self.group, temperature=self.temperature, micro_batch=self.passes(made)[0].stop
        )

    def weights(
        self,
        spec: TrainSpec,
        task: Task,
        made: Responses,
        kl_N: np.ndarray,
        step: int,
        state: State | None,
        gramian_MM: np.ndarray | None = None,
    ) -> tuple[np.ndarray, State]:
        """(N, M) the weights of this step, and the weighting's next state."""
        weighting = weighting_of(spec)
        seen = StepContext(
            step=step,
            steps=self.steps,
            w_NM=made.w_NM,
            returns_NM=made.rewards_NM - task.beta * kl_N[:, None],
            covariance_MM=group_covariance(made.rewards_NM, group=self.group),
            prompts=made.prompts,
            low_M=np.array(task.objectives.low),
            high_M=np.array(task.objectives.high),
            landmarks=landmarks(task) if task.is_exact else None,
            seed=spec.seed,
            gramian_MM=gramian_MM,
        )
        return weighting.weights(weighting.start(task.objectives.count) if state is None else state, seen)

    def advantages(self, spec: TrainSpec, task: Task, rewards_NM: np.ndarray, weights_NM: np.ndarray, penalty_N: np.ndarray) -> np.ndarray:
        """(N,) what each response is worth, compared with the others to its prompt; the only place where objectives are combined."""
        if spec.aggregation["name"] != "learner":
            return aggregate_advantages(spec.aggregation, rewards_NM - penalty_N[:, None], weights_NM, group=self.group)
        if spec.scalarizer["name"] == "linear":
            returns_NM = rewards_NM - penalty_N[:, None]
        else:
            low_M, high_M = np.array(task.objectives.low), np.array(task.objectives.high)
            single_N = scalarize(rewards_NM, weights_NM, spec.scalarizer, low_M=low_M, high_M=high_M) - penalty_N
            returns_NM, weights_NM = single_N[:, None], np.ones((len(weights_NM), 1))
        return advantages(returns_NM, weights_NM, group=self.group, baseline=self.baseline, normalize=self.normalize, at=spec.scalarize_at)

    @memory_explained(SMALLER)
    def update(self, policy: Policy, optimizer: torch.optim.Optimizer, batch: Batch, *, beta: float, step: int) -> tuple[float, float]:
        """One step of the optimizer; returns the loss and the norm of the gradient before clipping."""
        optimizer.zero_grad(set_to_none=True)
        loss = self.gradient(policy, batch, beta=beta)
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = float(torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(f"loss {loss:g}, gradient norm {norm:g}", step, self.lr)
        optimizer.step()
        return loss, norm

    def gradient(self, policy: Policy, batch: Batch, *, beta: float) -> float:
        """Add the gradient of the loss to `.grad` of the trained parameters, micro-batch by micro-batch; returns the loss."""
        n, made = len(batch.kl_N), batch.responses
        if batch.jacobian is not None:  # all that is needed has been computed
            batch.jacobian.descend(policy.bank.parameters(), batch.weights_NM[0])
            return -float(batch.advantage_N.mean())
        advantage_N = torch.from_numpy(batch.advantage_N).to(policy.device)
        old_NT = made.logp_NT.float() if self.epochs > 1 else None
        total = 0.0
        for rows in self.passes(made):
            logp_NT = self._logp(policy, made, rows, gates_NK=made.gates_NK[rows])
            mask_NT = made.mask_NT[rows]
            loss = policy_loss(
                logp_NT,
                mask_NT,
                advantage_N[rows],
                rows=n,
                old_logp_NT=None if old_NT is None else old_NT[rows],
                clip_eps=self.clip_eps,
                ratio=self.ratio,
                length=self.length,
            )
            if self.kl_in == "loss":
                terms_NT = kl_terms(logp_NT, batch.reference_logp_NT[rows], self.kl_estimator) * mask_NT
                share_N1 = 1.0 if self.length == "sum" else 1.0 / mask_NT.sum(1, keepdim=True)
                loss = loss + beta * (terms_NT * share_N1).sum() / n
            loss.backward()
            total += float(loss.detach())
        return total

    def passes(self, made: Responses) -> list[slice]:
        return made.passes(rows=self.micro_batch, tokens=self.micro_tokens, group=self.group)

    def _logp(self, policy: Policy, made: Responses, rows: slice, *, gates_NK: Tensor | None) -> Tensor:
        """(rows, T) log-probabilities; whole groups share the reading of their prompt."""
        ids, mask, group = made.prompt_ids_PT, made.prompt_mask_PT, self.group
        again = self.checkpointing and torch.is_grad_enabled()  # a cache, which shares prompts, cannot be filled twice
        if again or rows.start % group or (rows.stop - rows.start) % group:
            ids, mask, group = ids.repeat_interleave(group, 0)[rows], mask.repeat_interleave(group, 0)[rows], 1
        else:
            prompts = slice(rows.start // group, rows.stop // group)
            ids, mask = ids[prompts], mask[prompts]
        with recomputed(policy.bank) if again else contextlib.nullcontext():
            return token_logp(policy, ids, mask, made.tokens_NT[rows], gates_NK=gates_NK, group=group, temperature=self.temperature)

    def _check_gradients(self, spec: TrainSpec) -> None:
        if weighting_of(spec).needs_gramian and (self.epochs, self.kl_in, self.normalize) != (1, "reward", "none"):
            raise ConfigError(
                f"weighting {weighting_of(spec).registered_name} needs the gradients of the returns J_k themselves",
                found=f"epochs={self.epochs}, kl_in={self.kl_in!r}, normalize={self.normalize!r}",
                remedy='use epochs=1, kl_in="reward" and normalize="none", the defaults',
            )

    def pace(self, step: int) -> float:
        """The learning rate at `step`, as a share of `lr`."""
        left = 1.0 - step / self.steps
        shape = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[self.schedule]
        return shape * min(1.0, (step + 1) / max(self.warmup, 1))

    def validate(self, policy: Policy, task: Task, spec: TrainSpec, run: _Run) -> float:
        """Mean scalarized reward of fresh responses to training prompts, from streams of their own; test prompts are never looked at."""
        apart = dataclasses.replace(spec, seed=seed_for(spec.seed, "validation"))
        made = draw(policy, task, apart, step=run.step, first=0, prompts=self.validation_samples, group=1, temperature=self.temperature)
        run.validation_samples += len(made.w_NM)
        run.evaluations += 1
        low_M, high_M = np.array(task.objectives.low), np.array(task.objectives.high)
        return float(np.nanmean(scalarize(made.rewards_NM, made.w_NM, spec.scalarizer, low_M=low_M, high_M=high_M)))

    def _count(self, run: _Run, policy: Policy, batch: Batch, task: Task) -> None:
        """Charge a batch to the run; stop where too many completions could not be scored."""
        if not np.isfinite(batch.kl_N).all():
            raise _not_finite("log-probabilities that are no numbers", run.step, self.lr)
        made = batch.responses
        n, generated = made.tokens_NT.shape
        positions = made.prompt_ids_PT.numel() + n * generated
        run.samples += n
        run.tokens += int(made.mask_NT.sum())
        run.updates += self.epochs
        run.flops += (4 + 4 * self.epochs) * policy.model.num_parameters() * positions
        run.unscored.append([n, *np.isnan(made.rewards_NM).sum(0).tolist()])
        run.unscored = run.unscored[-math.ceil(WATCHED / self.batch) :]
        seen, *unscored_M = np.sum(run.unscored, axis=0).tolist()
        if seen >= WATCHED or run.step + 1 == self.steps:
            refuse_unscored(task.objectives.names, unscored_M, seen, limit=self.max_unscored)

    def _record(self, task: Task, run: _Run, window: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One line of the log: means over the steps since the last line."""
        rewards_NM = np.concatenate([row["rewards_NM"] for row in window])
        unscored_M = np.isnan(rewards_NM).sum(0)
        means_M = np.nansum(rewards_NM, axis=0) / np.maximum(len(rewards_NM) - unscored_M, 1)
        known = unscored_M < len(rewards_NM)
        names = task.objectives.names
        record: dict[str, Any] = {"step": run.step, "samples": run.samples, "tokens": run.tokens}
        record["rewards"] = {name: float(m) if k else None for name, m, k in zip(names, means_M, known, strict=True)}
        record["unscored"] = dict(zip(names, unscored_M.tolist(), strict=True))
        record |= {name: float(np.mean([row[name] for row in window])) for name in ("kl", "loss", "gradient_norm")}
        return record | {"lr": self.lr * self.pace(run.step - 1), **({"validation": run.validations[-1]} if run.validations else {})}


def _not_finite(found: str, step: int, lr: float) -> TrainingError:
    return TrainingError(
        "loss and gradient of a training are finite",
        found=f"{found}, at step {step}",
        remedy=f"lower lr (now {lr:g}), or train in float32; the last checkpoint is kept",
    )
