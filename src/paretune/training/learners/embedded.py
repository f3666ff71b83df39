"""The embedded learners: draw a batch, climb, log, save. No library beyond torch, transformers and PEFT, in one process or in several.

A learner on it says what a batch is (`collect`) and what its loss is (`loss`). A new loss is a subclass in one file, registered in
LEARNERS, inside the tree or outside; `paretune.testing.losses.check_loss` proves that it keeps what a loss must keep.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.files import note
from paretune.policy.base import Policy
from paretune.policy.lora.decoder import recomputed
from paretune.policy.lora.shard import anyone, is_sharded, shard
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.scoring import token_logp
from paretune.registry import GATE_RULES, GIVEN, UNKEYED
from paretune.seeds import seed_for
from paretune.tasks.base import Task
from paretune.tasks.pretrained import loaded_in_shares
from paretune.training.batch import Draws, Responses, cut_off, draw
from paretune.training.combine import Combine
from paretune.training.cost import Cost
from paretune.training.learners.base import SampledLearner, StoppingRule, check_cast, draw_step
from paretune.training.learners.loss import loss_scale
from paretune.training.learners.modelled import RewardModel, Scored, Unlabelled, sampled
from paretune.training.loop.record import log_record, watch_unscored
from paretune.training.loop.run import Run, memory_explained, not_finite, run_loop
from paretune.training.loop.validation import charge, look, respond
from paretune.training.loop.watch import ACT_EVERY, KL_ROSE, guard_slack, unsaid, warnings_of
from paretune.training.processes import GradientSum, ranks
from paretune.training.rollouts import VllmServer, check_mixing, server_at, weighed
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import State
from paretune.types import Count, Name, Natural, Positive

__all__ = ["Batch", "EmbeddedLearner"]

LOOK_ROWS, LOOK_EVERY = 16, 5  # responses whose change is measured, and how often where updates are far from the bound
SHARE = 0.1  # of the KL from the reference, that one update may move
ABOVE = 4  # times what rounding moves
ATTEMPTS = 6  # at shortening one update

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
    _seen: list[Tensor] = field(default_factory=list, kw_only=True, repr=False)

    def scored(self, rows: slice, logp_NT: Tensor) -> None:
        """Keep what scoring says of these rows, for the log: the gap to what sampling said, and which ratios are clipped."""
        if not self._seen:
            self._seen.append(torch.full_like(self.responses.logp_NT, torch.nan, dtype=torch.float32))
        self._seen[0][rows] = logp_NT.detach().float()

    def seen_NT(self) -> Tensor | None:
        """(N, T) log-probabilities as last scored, NaN where they were not; None where nothing was."""
        return self._seen[0] if self._seen else None


@dataclass(frozen=True, kw_only=True)
class EmbeddedLearner(Unlabelled, StoppingRule, SampledLearner):
    """Base of the learners on the embedded loop. A step draws `batch` responses, `group` to each of `batch // group` prompts.

    Where the task sets prompts for validation apart, the policy is looked at there every `validate_every` steps; see `validation.look`.
    """

    on_policy: ClassVar[bool] = True  # whether the responses of a batch are the policy's own; else they are the reference's
    in_processes: ClassVar[str] = "torch"
    weighs: ClassVar[bool] = False  # whether its loss multiplies by `Responses.weight_N`, where responses have weights

    scored: Natural = field(default=0, metadata=GIVEN)  # of `samples`: the reference's, to which the reward model of `unlabelled` is fitted
    step_kl: Positive | None = 0.02  # nats per response that one update may move the policy, see `bounded`; None: no bound
    validation_samples: Count = 64  # responses of each validation of the stopping rule
    look_samples: Count = 128  # of each look at validation prompts
    keep: Literal["best", "last"] = "best"  # which of the policies that were looked at is the result
    guard_drop: Positive | None = 0.05  # of a guard's range: a policy that may have lost more is not kept; None: it may be
    patience: Count | None = 10  # looks without a better one, after which the training ends; None: it never does
    micro_tokens: Count | None = None  # instead of micro_batch: at most so many tokens, of prompts, responses and padding, or one row
    rollouts: Literal["vllm"] | None = field(default=None, metadata=GIVEN)  # who draws responses; None: this process, with transformers
    rollouts_cap: Positive = field(default=2.0, metadata=GIVEN)  # of importance weights, see `rollouts.importance_weights`
    rollouts_url: Name | None = field(default=None, metadata=UNKEYED)  # of the vLLM server, before /v1; None: it is started here
    rollouts_args: str = field(default="", metadata=UNKEYED)  # more of vLLM's options, where it is started here
    processes: Count = field(default=1, metadata=UNKEYED)  # that share this training: its prompts, passes and rewards; one per GPU
    processes_timeout: Positive = field(default=1800.0, metadata=UNKEYED)  # seconds that they wait for each other at most
    shard: bool = field(default=False, metadata=UNKEYED)  # each of several processes holds its share of the base's weights only
    log_samples: Natural | None = field(default=None, metadata=UNKEYED)  # prompts whose responses are logged; None: 4 of sampled tasks
    log_samples_every: Count | None = field(default=None, metadata=UNKEYED)  # steps; None: a tenth of the training, 10 at least

    def rules(self) -> dict[str, bool]:
        return {
            **super().rules(),
            "step_kl is positive": self.step_kl is None or self.step_kl > 0,
            "micro_tokens is at least 1": (self.micro_tokens or 1) >= 1,
            "stop_window and validate_every are at least 1": min(self.stop_window, self.validate_every) >= 1,
            "either micro_batch or micro_tokens": self.micro_batch is None or self.micro_tokens is None,
            "shard needs processes, two at least": not self.shard or self.processes > 1,
            "processes have a prompt of each batch at least, which are batch // group": self.processes <= self.batch // max(self.group, 1),
            "unlabelled prompts come with scored samples, a batch at least, and these with unlabelled prompts": (
                self.scored >= self.batch if self.unlabelled else self.scored == 0
            ),
            "samples are scored ones and a batch": self.samples >= self.scored + self.batch,
            "own_scores are of trainings with unlabelled prompts": bool(self.unlabelled) or not self.own_scores,
            "unlabelled prompts are trained on in one process": not (self.unlabelled and self.processes > 1),
            "a sharded base draws its responses itself: leave out rollouts or shard": self.rollouts is None or not self.shard,
            "rollouts are for losses that weigh responses, such as those of pg and distill": self.rollouts is None or self.weighs,
        }

    def accept(self, spec: TrainSpec) -> None:
        if self.rollouts is not None:
            check_mixing("parameter" if spec.rule is None else GATE_RULES.build(spec.rule).mixing)
            if self.rollouts_url is None and max(self.processes, ranks().size) > 1:
                found, remedy = "no rollouts_url", "start it as docs/scale.md says, and give all processes its rollouts_url"
                raise ConfigError("the processes of one training share one vLLM server", found=found, remedy=remedy)

    def draws(self, spec: TrainSpec) -> Draws | None:
        """Who draws the responses of a training; None: this process."""
        return None if self.rollouts is None else self._server(spec).generate

    def _server(self, spec: TrainSpec) -> VllmServer:
        return server_at(self.rollouts_url, spec.key[:16], self.rollouts_args)

    def drawn(self, policy: Policy, task: Task, spec: TrainSpec, step: int) -> Responses:
        """The responses of one step; those that another engine drew are scored here, and weighed."""
        made = draw_step(self, policy, task, spec, step, by=self.draws(spec))
        if self.rollouts is None:
            return made
        return weighed(made, self.reference_logp(policy, made, gates_NK=made.gates_NK), cap=self.rollouts_cap)

    def reference(self, task: Task, device: str) -> tuple[Any, Any]:
        if not self.shard:
            return super().reference(task, device)
        if ranks().size == 1:
            raise ConfigError(
                "a base is sharded over the processes of a training",
                found="learner.shard=true in one process",
                remedy="run it by `paretune fit`, `bench` or a launcher, or set learner.shard=false",
            )
        with loaded_in_shares(split := functools.partial(shard, device=device)):
            loaded: Any = task.load()
        check_cast(loaded[0], self.dtype)
        return split(loaded[0] if self.dtype is None else loaded[0].to(getattr(torch, self.dtype))), loaded[1]

    @abstractmethod
    def collect(self, policy: Policy, task: Task, spec: TrainSpec, step: int, state: State | None = None) -> Batch:
        """Draw and score one batch; a pure function of the policy's weights, (spec.seed, step) and the weighting's state."""

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch, rows: slice, *, beta: float) -> Tensor:
        """The part of `rows` in the loss of the batch, a scalar with gradient; the parts of all `passes` add up to the loss."""

    @property
    def steps(self) -> int:
        return (self.samples - self.scored) // self.batch

    def _scored(self, model: RewardModel, policy: Policy, spec: TrainSpec, task: Task) -> tuple[Iterable[Scored], dict[str, int]]:
        noise: float = getattr(task, "noise", 0.0)
        if self.own_scores and noise:
            raise ConfigError(
                "own_scores of an exact task are looked up, without the noise that a reward has here",
                found=f"learner.own_scores with noise={noise}",
                remedy="leave one of the two out",
            )
        return sampled(self, model, policy, spec, task)

    def passes(self, made: Responses) -> list[slice]:
        """The rows of each forward and backward."""
        return made.passes(rows=self.micro_batch, tokens=self.micro_tokens, group=self.group)

    def train(self, spec, task, work, *, parents=None, progress=None) -> Cost:
        here, rows = ranks(), self.micro_batch or self.batch
        if here.first and self.micro_tokens is None and math.ceil(self.batch / rows) < here.size:
            note(
                f"a pass has {rows} of {self.batch} rows: {here.size} processes do not share the backward; set micro_batch or micro_tokens"
            )
        try:
            return run_loop(self, spec, task, work, parents, progress)
        finally:
            if self.rollouts is not None:
                self._server(spec).end()

    def combine(self, spec: TrainSpec) -> Combine:
        """How the training combines its objectives under this learner."""
        return Combine.of(spec)

    def finished(self, run: Run) -> bool:
        if self.patience is None or run.best is None:
            return run.step >= self.steps or run.converged
        since = sum("moving" not in look for look in run.looks[run.best + 1 :])  # weights by step have yet to come to the preference
        return run.step >= self.steps or run.converged or since >= self.patience

    def validate(self, policy: Policy, task: Task, spec: TrainSpec, run: Run) -> float:
        """From fresh responses to training prompts, whose streams are their own."""
        apart = dataclasses.replace(spec, seed=seed_for(spec.seed, "validation"))
        shape: dict[str, Any] = {"prompts": self.validation_samples, "group": 1, "temperature": self.temperature}
        made = draw(policy, task, apart, step=run.step, first=0, by=self.draws(spec), **shape)
        charge(run, made)
        run.evaluations += 1
        return self.combine(spec).mean_score(made.rewards_NM, made.w_NM, task.objectives)

    def advance(self, policy: ParameterMix, optimizer: torch.optim.Optimizer, task: Task, spec: TrainSpec, run: Run) -> dict[str, Any]:
        with ranks().gathering():
            return self._advance(policy, optimizer, task, spec, run)

    def _advance(self, policy: ParameterMix, optimizer: torch.optim.Optimizer, task: Task, spec: TrainSpec, run: Run) -> dict[str, Any]:
        if run.step == 0:
            look(self, policy, task, spec, run)
            respond(self, policy, task, spec, run)
        began = time.perf_counter()
        batch = self.collect(policy, task, spec, run.step, run.weighting)
        decided = ("kl_N", "weights_NM", "advantage_N", "state")
        batch = dataclasses.replace(batch, **ranks().shared({name: getattr(batch, name) for name in decided}))
        run.weighting, collected = batch.state, time.perf_counter()
        told: dict[str, Any] = {"kl": float(batch.kl_N.mean()), "kl_max": float(batch.kl_N.max())}
        run.kl += (max(0.0, float(batch.kl_N.mean())) - run.kl) / (5 if run.step else 1)  # over about five batches
        self._count(run, policy, batch, task)
        for epoch in range(self.epochs):
            lr = self.lr * self.pace(run.step) * run.lr_share * run.lr_cap
            for group in optimizer.param_groups:
                group["lr"] = lr
            with self.bounded(policy, batch, run, fresh=epoch == 0):
                loss, norm = self.update(policy, optimizer, batch, beta=task.beta, step=run.step)
            told |= self._scoring(batch) if epoch == 0 else {"clipped": self.clipped(batch)}
        seconds = {**batch.responses.seconds, "update": time.perf_counter() - collected}
        seconds["reference"] = max(0.0, collected - began - sum(batch.responses.seconds.values()))
        run.step += 1
        self.watch(policy, task, spec, run)
        if run.step % self.validate_every == 0 or run.step == self.steps:
            look(self, policy, task, spec, run)
            self._turn_back(policy, optimizer, task, run)
        respond(self, policy, task, spec, run)
        made = batch.responses
        told |= {"loss": loss, "gradient_norm": norm, "lr": lr, "seconds_of": seconds}
        told |= self.combine(spec).told(batch.weights_NM, task.objectives)
        told |= {"length": float(made.mask_NT.sum(1).double().mean()), "cut": float(cut_off(policy, made, task.max_new_tokens).mean())}
        return {"rewards_NM": made.rewards_NM, **told}

    def _turn_back(self, policy: ParameterMix, optimizer: torch.optim.Optimizer, task: Task, run: Run) -> None:
        """From a policy that was just seen to have lost more of a guard than it may, to the one that is kept, with steps half as long."""
        if run.kept is None or run.best is None:
            return
        seen, best = run.looks[-1], run.looks[run.best]
        if guard_slack(seen, task.guards, self.guard_drop, sure=False) < 0 <= guard_slack(best, task.guards, self.guard_drop):
            with torch.no_grad():
                for weight, kept in zip(policy.parameters(), run.kept, strict=True):
                    weight.copy_(kept)
            optimizer.state.clear()  # momentum points where the policy came from
            run.lr_cap /= 2
            seen["back_to"] = best["step"]

    def clipped(self, batch: Batch) -> float | None:
        """The share of the batch that the last update clipped; None for a loss that does not clip."""
        return None

    def _scoring(self, batch: Batch) -> dict[str, float | None]:
        """For the log, of a batch that was just scored: entropy, the gap between sampling and scoring, the spread of advantages.

        `entropy_estimate` is minus the mean log-probability of the responses, nats per response, which has the entropy's expectation;
        `logp_gap` the mean difference per token, nats, of what sampling and scoring say of it. Where another engine drew: the mean and
        the largest of the importance weights, and the share of them that the cap has `truncated`.
        """
        made, seen_NT = batch.responses, batch.seen_NT()
        found: dict[str, float | None] = {"advantage_spread": float(batch.advantage_N.std()) if batch.advantage_N.any() else None}
        if self.on_policy:
            found["entropy_estimate"] = -float((made.logp_NT * made.mask_NT).sum(1).double().mean())
            if seen_NT is not None:
                known_NT = made.mask_NT.bool() & ~seen_NT.isnan()
                sampled_NT = made.logp_NT if made.sampled_logp_NT is None else made.sampled_logp_NT
                found["logp_gap"] = float((seen_NT - sampled_NT.float()).abs()[known_NT].double().mean())
        if made.weight_N is not None:
            found |= {"weight": float(made.weight_N.mean()), "weight_max": float(made.weight_N.max())}
            found["truncated"] = float((made.weight_N >= self.rollouts_cap).double().mean())
        return found

    @contextlib.contextmanager
    def bounded(self, policy: ParameterMix, batch: Batch, run: Run, *, fresh: bool) -> Iterator[None]:
        """A trust region around one update: what goes further is shortened, and the next steps with it.

        The bound is `step_kl`, or a tenth of the policy's KL from the reference where that is more, so that an update is no more than a
        third of the way that the policy has come: in nats, a distance is squared. In bfloat16 rounding alone moves log-probabilities; how
        far, is seen where scoring repeats what sampling said of the same tokens, and the bound is above that, too.

        Moved is what the update does to the log-probabilities of some of the batch's responses: KL = mean of (log pi_new - log pi_old)^2
        / 2 over whole responses, nats. Log-probabilities change in proportion to short updates; long ones are shortened again. The
        learning rate then falls by the same factor, and comes back by a quarter a step where there is room. Near the bound every update
        is looked at, elsewhere one of LOOK_EVERY.

        Source: the second-order KL of trust regions (Schulman et al. 2015); a learning rate that follows the measured KL as in rl_games.
        Differs: an update beyond the bound is shortened before it is kept. Hides: half a batch can move where the other half stays.
        """
        if self.step_kl is None:
            yield
            return
        bound = self._bound(run)
        near = run.step_kl is None or run.step_kl > bound / 4 or run.lr_share < 1
        if not (near or run.step % LOOK_EVERY == 0):
            yield
            return
        made, weights = batch.responses, policy.parameters()
        count = min(len(made.tokens_NT), max(self.group, LOOK_ROWS - LOOK_ROWS % self.group), self.passes(made)[0].stop)
        rows = slice(0, count)

        def logp_N(*, first: bool = False, reference: bool = False) -> Tensor:
            with torch.inference_mode():
                logp_NT = self.logp(policy, made, rows, gates_NK=None if reference else made.gates_NK[rows])
            if first:
                batch.scored(rows, logp_NT)
            return (logp_NT * made.mask_NT[rows]).sum(1).double()

        old_N, before = logp_N(first=fresh), [weight.detach().clone() for weight in weights]
        if fresh:
            said_N = old_N if self.on_policy else logp_N(reference=True)  # by whom they were drawn
            gap_N = said_N - (made.logp_NT[rows] * made.mask_NT[rows]).sum(1).double()
            run.rounding = ranks().shared(float((gap_N**2).mean()) / 2)
            bound = self._bound(run)
        yield
        kept = 1.0  # of the update
        for attempt in range(ATTEMPTS):
            kl = ranks().shared(float(((logp_N() - old_N) ** 2).mean()) / 2)
            if not math.isfinite(kl):
                raise not_finite("log-probabilities that are no numbers after an update", run.step, self.lr * run.lr_share)
            if attempt == 0:
                run.step_kl = kl
            if kl <= (bound if attempt == 0 else 1.5 * bound):
                break
            kept *= math.sqrt(bound / kl)
            with torch.no_grad():
                for weight, start in zip(weights, before, strict=True):
                    weight.copy_(start + math.sqrt(bound / kl) * (weight - start))
        room = math.sqrt(bound / max(run.step_kl or 0.0, 1e-12))
        run.lr_share = min(1.0, run.lr_share * (max(kept, 0.1) if kept < 1 else min(room, 1.25)))

    def _bound(self, run: Run) -> float:
        return max(self.step_kl or 0.0, run.kl * SHARE, run.rounding * ABOVE)

    def record(
        self, task: Task, spec: TrainSpec, run: Run, window: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        counted = {"step": run.step, "samples": run.samples, "tokens": run.tokens, "lr": window[-1]["lr"]}
        record = log_record(task.objectives, window, **counted, group=self.group)
        if run.validations:
            record["validation"] = run.validations[-1]
        first = run.step - len(window)
        if looks := [look for look in run.looks if look["step"] > first or (look["step"] == first == 0)]:
            record["looks"] = looks
        record |= {"responses": run.responses} if run.responses else {}
        run.responses = []
        found = warnings_of([*records, record], run.looks, task, spec.preference, group=self.group)
        if KL_ROSE in found and (run.lr_cut is None or run.step >= run.lr_cut + ACT_EVERY * self.log_every):
            run.lr_cap, run.lr_cut = run.lr_cap / 2, run.step
        record |= unsaid(found, records)
        if self.finished(run):
            record |= self._ended(run)
        return record

    def _ended(self, run: Run) -> dict[str, Any]:
        """What the end of a training adds to its last record."""
        if run.best is None or self.keep == "last":
            return {}
        best, last = run.looks[run.best], run.looks[-1]
        return {"kept": {"step": best["step"], "utility": best["utility"], "utility_at_the_end": last["utility"]}}

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
        ranks().share(optimizer.param_groups[0]["params"])
        return loss, norm

    def gradient(self, policy: Policy, batch: Batch, *, beta: float) -> float:
        """Add the gradient of the loss to `.grad` of the trained parameters, pass by pass; returns the loss."""
        largest = float(np.abs(batch.advantage_N).max()) or 1.0  # 0: a loss without advantages
        times = loss_scale(policy.bank.base.dtype, largest) * loss_scale(policy.bank.base.dtype, 1 / len(batch.kl_N))

        def one(rows: slice) -> tuple[float, Tensor | None]:
            loss = self.loss(policy, batch, rows, beta=beta)
            (loss if times == 1 else loss * times).backward()
            seen_NT = batch.seen_NT()
            return float(loss.detach()), None if seen_NT is None else seen_NT[rows]

        here, passes = ranks(), self.passes(batch.responses)
        gradients = GradientSum(here, policy.parameters())

        def along(rows: slice) -> None:
            one(rows)
            gradients.clear()

        along_too = along if is_sharded(policy.model) else None
        found = here.mapped(passes, one, each=gradients.add, device=policy.device, along=along_too)
        gradients.settle()
        for parameter in () if times == 1 else policy.parameters():
            if parameter.grad is not None:
                parameter.grad /= times
        for rows, (_, seen_NT) in zip(passes, found, strict=True):
            if seen_NT is not None:
                batch.scored(rows, seen_NT)  # in whichever process it was
        return sum(loss for loss, _ in found)

    def reference_logp(self, policy: Policy, made: Responses, *, group: int | None = None, gates_NK: Tensor | None = None) -> Tensor:
        """(N, T) log-probabilities of the reference, or under these gates, pass by pass: an ordinary tensor, which autograd may keep."""
        passes = made.passes(rows=self.micro_batch, tokens=self.micro_tokens, group=group or self.group)

        def one(part: slice) -> Tensor:
            with torch.inference_mode():
                return self.logp(policy, made, part, gates_NK=None if gates_NK is None else gates_NK[part], group=group)

        return torch.cat(ranks().mapped(passes, one, device=policy.device, along=one if is_sharded(policy.model) else None))

    def logp(self, policy: Policy, made: Responses, rows: slice, *, gates_NK: Tensor | None, group: int | None = None) -> Tensor:
        """(rows, T) log-probabilities, gates None for the reference; whole groups, of `self.group` by default, read their prompt once."""
        ids, mask, group = made.prompt_ids_PT, made.prompt_mask_PT, group or self.group
        again = self.checkpointing and torch.is_grad_enabled()  # a cache, which shares prompts, cannot be filled twice
        if again or anyone(policy.model, bool(rows.start % group or (rows.stop - rows.start) % group)):
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
        run.flops += (4 + 4 * self.epochs + 2 * (self.rollouts is not None)) * policy.model.num_parameters() * positions
        last, names = run.step + 1 == self.steps, task.objectives.names
        run.unscored = watch_unscored(run.unscored, made.rewards_NM, names, limit=self.max_unscored, last=last)
