"""Sweeps: one single-policy training per preference of a lattice, and the nearest trained policy answers.

What each training is, is a hook (`_training`), so that a single-policy method is a few lines: the weighted sum (`linear`), weights that
follow the training (`adaptive`), gradients that are aggregated (`gradient`), advantages that are normalized per objective (`normalized`),
and pairs of responses instead of rewards (`modpo`). Those that climb another utility stand in `utility_sweeps`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.base import Card, Method, adapters_for, training
from paretune.methods.search import simplex_lattice
from paretune.policy.family import Family
from paretune.policy.rules import Nearest, rows_of
from paretune.registry import METHODS, describe
from paretune.tasks.base import Task
from paretune.tasks.preferences import KEEP_OUT
from paretune.training.advantages import EXPERIMENTAL
from paretune.training.learners.base import Learner
from paretune.training.learners.modpo import Modpo
from paretune.training.spec import Artifact, TrainSpec
from paretune.training.trl.dpo import TrlModpo
from paretune.training.weightings.base import WEIGHTINGS
from paretune.types import Amount, Preference

__all__ = ["SWEEP_TRAININGS", "Adaptive", "Gradient", "Linear", "ModpoSweep", "Normalized", "Sweep", "near_judged"]

SWEEP_TRAININGS = "C(points + M - 2, M - 1), or W for points = 0"
"""What a sweep's card says under `trainings`."""

SAME = 1e-9  # preferences that are nearer to each other are one


@dataclass(frozen=True)
class Sweep(Method):
    """Base of all sweeps. A subclass is a registered dataclass with a card, and overrides `_training` (and `_utility`, see there).

    `points` trained preferences on each edge of the simplex, vertices included; 0 trains at the judged preferences themselves, the
    dedicated training that every shortcut is compared with; `at` names the trained preferences one by one instead. For M = 2 an odd
    `points` would train at (.5, .5), which is judged; hence the even default. The family says in `trained_at_judged` how many of its
    trainings lie within 0.005 of a judged preference.
    """

    points: int = 6
    at: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        if self.points < 0 or self.points == 1:
            raise ConfigError(
                f"method {self.registered_name}: points is 0 (the judged preferences) or at least 2 (the vertices)",
                found=f"points = {self.points}",
                remedy="for example points = 6",
            )

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        """The hook: the training for the preference `w_M`. Change what `training` gives with `dataclasses.replace`."""
        return training(task, learner, w_M, seed)

    def _utility(self) -> Mapping[str, Any] | None:
        """The description of the utility that the trainings climb, where it is not w . J: evaluation judges by it, too."""
        return None

    def preferences(self, task: Task) -> np.ndarray:
        """(K, M) what is trained."""
        if self.at:
            given_KM = np.stack([Preference.of(task.objectives.names, w_M).w_M for w_M in self.at])
            apart_KK = np.abs(given_KM[:, None] - given_KM[None]).max(-1)
            if twice := sorted({int(k) for k in np.argwhere(np.triu(apart_KK < SAME, 1))[:, 1]}):
                raise ConfigError(
                    f"method {self.registered_name}: at names every trained preference once",
                    found=", ".join(str(list(self.at[k])) for k in twice) + " again",
                    remedy="leave it out, or write down how it differs",
                )
            return given_KM
        return task.judged() if self.points == 0 else simplex_lattice(task.objectives.count, self.points)

    def plan(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Sequence[TrainSpec]:
        task.judged()  # refuses a single objective before anything is trained
        return list(self._specs(task, learner, seed).values())

    def policy(self, task: Task, learner: Learner, done: Mapping[str, Artifact], seed: int) -> Family:
        w_KM = self.preferences(task)
        adapters = adapters_for(self._specs(task, learner, seed), done)
        meta = {"trained_at_judged": near_judged(task, w_KM)}
        return self.family(task, "parameter", Nearest(points_KM=rows_of(w_KM)), adapters, seed, meta=meta, utility=self._utility())

    def _specs(self, task: Task, learner: Learner, seed: int) -> dict[str, TrainSpec]:
        return {f"policy-{k}": self._training(task, learner, w_M, seed) for k, w_M in enumerate(self.preferences(task))}


def near_judged(task: Task, w_KM: np.ndarray) -> int:
    """How many of these preferences lie within 0.005 of a judged one."""
    return int((np.abs(w_KM[:, None] - task.judged()[None]).max(-1).min(1) <= KEEP_OUT).sum())


@METHODS.register("linear")
@dataclass(frozen=True)
class Linear(Sweep):
    """Single policies trained at fixed weighted sums, vertices included, so that the experts are among them; the nearest one answers.

    points = 0 trains at the judged preferences themselves: the dedicated training that every shortcut is compared with.
    """

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="one linearly scalarized training per preference of a lattice, so a sweep of single policies; the nearest one answers",
        source='the weighted sum of rewards ("MORLHF"), as most trainers do it',
        differs="the learner's: KL in the reward and a leave-one-out baseline by default, so that its optimum is that of w . J",
        hides="points = 0 was trained at the very preferences it is judged at; otherwise some of the loss is the lattice's, not the "
        "training's; a preference half-way between two policies takes the first",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True


RULES_OF: Mapping[str, Mapping[str, Any]] = {
    "influence": {"name": "influence"},
    "ctwa": {"name": "ctwa"},
    "exp3": {"name": "exp3"},
    "linucb": {"name": "contextual", "rule": "linucb"},
    "thompson": {"name": "contextual", "rule": "thompson"},
}


@METHODS.register("adaptive")
@dataclass(frozen=True)
class Adaptive(Sweep):
    """One training per preference, whose weights start there and then follow what the training sees; the nearest policy answers.

    `weighting` names the rule, `settings` change its fields (`paretune show NAME` lists them). At a vertex the training is the
    expert's.
    """

    weighting: Literal["influence", "ctwa", "exp3", "linucb", "thompson"] = "influence"
    settings: Mapping[str, float] = field(default_factory=dict)

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="a sweep whose weights adapt: gradient influence, covariance targets, an Exp3 bandit, or a bandit over prompt features",
        source="gradient influence (2509.11452); CTWA (2602.06869); DynaOpt's Exp3 (2403.13578); LinUCB and Thompson sampling over prompts "
        "(2510.02850, LASeR)",
        differs="all start at the preference and multiply it, so that an objective with weight 0 stays out and weights sum to 1; returns "
        "of the training batches, with KL, stand for the validation sets of the sources; influence is in units of the mean square; "
        "CTWA's statistic is a correlation; the contextual bandits tilt the preference for a prompt instead of selecting a reward",
        hides="what is climbed in the end is not w . J for the w that is asked for; the source's settings suit its scale of rewards and "
        "number of steps, and `settings` are tuned or not tuned per task",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )

    def __post_init__(self):
        super().__post_init__()
        self._weighting()  # its fields are checked here

    def _weighting(self) -> dict[str, Any]:
        return describe(WEIGHTINGS.build({**RULES_OF[self.weighting], **self.settings}))

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        plain = super()._training(task, learner, w_M, seed)
        return plain if np.count_nonzero(w_M) == 1 else dataclasses.replace(plain, weighting=self._weighting())


@METHODS.register("gradient")
@dataclass(frozen=True)
class Gradient(Sweep):
    """One training per preference, each step weighing the objectives by how their gradients meet; the nearest policy answers.

    At a vertex one objective is left, and the training is that of its expert.
    """

    aggregator: Literal["mgda", "pcgrad", "cagrad", "nash_mtl", "imtl_g", "upgrad", "aligned_mtl"] = "upgrad"
    c: Amount = 0.5  # of cagrad

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="a sweep whose steps combine the objectives' gradients by MGDA, PCGrad, CAGrad, Nash-MTL, IMTL-G, UPGrad or Aligned-MTL",
        source="MGDA (Sener & Koltun 2018), PCGrad (2001.06782), CAGrad (2110.14048), Nash-MTL (2202.01017), IMTL-G (Liu et al. 2021), "
        "UPGrad (2406.16232), Aligned-MTL (Senushkin et al. 2023)",
        differs="none of the sources but UPGrad's and Aligned-MTL's has a preference: it scales the gradients for pcgrad and cagrad, "
        "divides them for mgda, and enters the equations of nash_mtl and imtl_g, which do not see a scale; gradients are those of the "
        "LoRA factors, of returns with KL; weights are scaled to absolute sum 1",
        hides="they stop wherever gradients oppose each other, which is anywhere on the front, so the preference decides less than the "
        "start does; estimated gradients hardly ever oppose each other exactly; needs the extra `gradient` but for nash_mtl and imtl_g",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        plain = super()._training(task, learner, w_M, seed)
        if np.count_nonzero(w_M) == 1:
            return plain
        weighting = WEIGHTINGS.build({"name": "gradient", "aggregator": self.aggregator, "c": self.c})
        weighting.check()
        return dataclasses.replace(plain, weighting=describe(weighting))


@METHODS.register("normalized")
@dataclass(frozen=True)
class Normalized(Sweep):
    """One training per preference under a named aggregation of advantages (`paretune.training.advantages`); the nearest policy answers.

    With the exact learner the step is the one to which samples converge as groups grow: what is missing then is the aggregation's bias.
    """

    aggregation: Literal["grpo", "mo_grpo", "gdpo", "gd2po", "gd2po_snr", "dvao", "rdpo", "pama"] = "gdpo"

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="a sweep whose advantages are normalized per group or objective: GRPO, GDPO, GD2PO (hard, SNR)",
        source="GRPO (2402.03300) and GDPO (2601.05242) as in TRL; MO-GRPO (2509.22047); GD2PO (2606.16771); DVAO (2605.25604); "
        "RDPO (2605.13641); PAMA (2508.07768)",
        differs="KL is part of every objective's return, not a term of the loss; mo_grpo, dvao, rdpo and pama are experimental (only "
        "abstracts were at hand, or a part is ours), so that their families say so and no comparison has them; gd2po whitens by response, "
        "not by token",
        hides="each climbs something other than w . J: prompts and objectives are divided by spreads that the policy itself changes",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def family(self, task: Task, *given: Any, **fields: Any) -> Family:
        """As of any method; one under an experimental aggregation says why it is none of the published rule."""
        if why := EXPERIMENTAL.get(self.aggregation):
            fields["meta"] = {**fields.get("meta", {}), "experimental": why}
        return super().family(task, *given, **fields)

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        if self.aggregation.startswith("gd2po"):
            form = "snr" if self.aggregation == "gd2po_snr" else "hard"
            aggregation: dict[str, object] = {"name": "gd2po", "form": form, "tau": 0.2}
        else:
            aggregation = {"name": self.aggregation}
        return dataclasses.replace(super()._training(task, learner, w_M, seed), aggregation=aggregation)


@METHODS.register("modpo")
@dataclass(frozen=True)
class ModpoSweep(Sweep):
    """One offline training per preference, with the budget of the learner as responses of the reference; the nearest policy answers.

    labels: how the better response of a pair is named, see learner `modpo`. With the learner `trl`, TRL's DPOTrainer trains (`trl-modpo`).
    """

    labels: Literal["expected", "drawn", "hard"] = "expected"

    card: ClassVar[Card] = Card(
        category="single-policy",
        summary="a sweep of offline trainings on pairs of the reference's responses: DPO with the other objectives as a margin",
        source="MODPO (2310.03708)",
        differs="pairs are built from the task: all pairs of a prompt's responses, compared by the reward of the objective with the "
        "largest weight, so that w_1 is at least 1/M (the source's is fixed, and its loss has no value at w_1 = 0); margins are true "
        "rewards, not learned ones; labels are chances under Bradley-Terry by default; every pair is seen in one pass",
        hides="every training draws responses of its own, which a stored set of pairs would share; it learns only from what the "
        "reference says; labels = hard, the usual ones, have another optimum than J_w",
        trainings=SWEEP_TRAININGS,
        forwards_per_token="1",
        zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def _training(self, task: Task, learner: Learner, w_M: np.ndarray, seed: int) -> TrainSpec:
        kind = TrlModpo if learner.registered_name in ("trl", "trl-modpo") else Modpo
        offline = describe(kind.like(learner, labels=self.labels))
        return dataclasses.replace(super()._training(task, learner, w_M, seed), learner=offline)
