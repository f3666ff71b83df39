"""Measure a family of policies: raw curves over the judged preferences, and what they are worth.

On exact tasks every number is exact. Elsewhere each preference is measured on the same prompts with the same uniforms, as is the
reference policy, so that differences are paired and much narrower than the numbers themselves.

Where the loss comes from, in units of attainment: 1 - attainment(w) = composition + learning + remainder, with

    composition  1 - attainment of the OPTIMAL experts pi*_k, mixed token by token with this family's gates
    learning     attainment of those minus attainment of this family, signed: under-trained experts may mix better than perfect ones
    remainder    what is attributed to neither

For logit mixing, and for hidden states under one shared linear head, composition is exact and nothing remains. For soups there is no
such limit (their result depends on where in parameter space the experts lie), so all of their loss remains. `experts` says how far
each expert is below its own optimum, at its own vertex. That shortfall, carried over to w, is no measure of learning: where
objectives conflict it exceeds the whole gain at w (.53 of it, in a case where the family loses .09), because it mostly cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paretune.errors import ConfigError, html_table
from paretune.evaluation import metrics
from paretune.evaluation.metrics import hypervolume, igd_plus, plain, summary
from paretune.evaluation.stats import over_prompts
from paretune.evaluation.utility import exact_own_utility, sampled_own_utility
from paretune.policy.family import Family
from paretune.policy.returns import ExactReturns, Measured, SampledReturns
from paretune.tasks.base import Task
from paretune.tasks.exact.task import ExactTask
from paretune.types import Cost, Curve, Estimate, Preference, Prompt

__all__ = ["Evaluation", "compare", "evaluate"]

SPLITS = ("train", "test")
SHOWN_PREFERENCES, SHOWN_PROMPTS = 5, 10  # of the responses that a report shows


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Curves per split, raw; `metrics`, nested and strict JSON (None = unknown); and what the outer level's searches cost.

    `worst` and `mean` are over the preferences: of attainment where the optimum is known, else of the gain over the untrained model; on
    training prompts where the optimum is known, else on test prompts, if these were measured (`split` says which). None is unknown.
    """

    curves: dict[str, Curve]
    metrics: dict[str, Any]
    cost: Cost

    @property
    def quality(self) -> str:
        """What `worst` and `mean` are of: "attainment", or "gain"."""
        return "attainment" if self.metrics["exact"] else "gain"

    @property
    def split(self) -> str:
        """The prompts that `worst` and `mean` are on."""
        order = SPLITS if self.metrics["exact"] else SPLITS[::-1]
        return next(split for split in order if split in self.metrics["splits"])

    @property
    def worst(self) -> float | None:
        """The lowest attainment, or gain, at any of the preferences."""
        return min(known) if (known := self._known()) else None

    @property
    def mean(self) -> float | None:
        """The mean attainment, or gain, over the preferences."""
        return sum(known) / len(known) if (known := self._known()) else None

    def _known(self) -> list[float]:
        return [value for value in self._per_preference() if value is not None]

    def _per_preference(self) -> list[float | None]:
        values = self.metrics["splits"][self.split][self.quality]["per_preference"]
        return [value["value"] if isinstance(value, dict) else value for value in values]

    def _head(self) -> str:
        of = f"{self.quality} on {self.split} prompts at {len(self.metrics['preferences'])} preferences"
        return f"{of}: worst {_shown(self.worst)}, mean {_shown(self.mean)}"

    def __repr__(self) -> str:
        return f"<Evaluation: {self._head()}>"

    def _repr_html_(self) -> str:
        """A table for notebooks: one row per preference, with its interval where there is one."""
        found, names = self.metrics["splits"][self.split], self.metrics["objectives"]
        known = found[self.quality]["per_preference"]
        low_high = [f"[{_shown(v['low'])}, {_shown(v['high'])}]" if isinstance(v, dict) and v["low"] is not None else "" for v in known]
        head = [*(f"w {name}" for name in names), self.quality, *(["95 %"] if any(low_high) else []), *names, "KL"]
        rows = []
        for n, w_M in enumerate(self.metrics["preferences"]):
            interval = [low_high[n]] if any(low_high) else []
            numbers = [_shown(value) for value in (*found["rewards"][n], found["kl"]["per_preference"][n])]
            rows.append([*(f"{w:.2g}" for w in w_M), _shown(self._per_preference()[n]), *interval, *numbers])
        return html_table(self._head(), head, rows)


def _shown(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def evaluate(
    task: Task,
    family: Family,
    *,
    w_WM: np.ndarray | None = None,
    splits: Sequence[str] = SPLITS,
    samples: int = 64,
    seed: int = 0,
    exact: bool | None = None,
) -> Evaluation:
    """Measure `family` at the preferences `w_WM` (default: the judged ones) on the given splits.

    `samples` and `seed` matter where the task is not exact: that many responses per preference, spread over the prompts.
    `exact=False` samples on an exact task too. Raises ConfigError for preferences that are none.
    """
    w_WM = _preferences(task, task.judged() if w_WM is None else w_WM)
    exact = task.is_exact if exact is None else exact
    if samples < 1 or (exact and not task.is_exact):
        raise ConfigError(
            "an evaluation draws at least one sample, and is exact on exact tasks only",
            found=f"samples = {samples}, exact = {exact} on task {task.registered_name!r}",
            remedy="leave `exact` out, and ask for samples=64, for example",
        )
    gates_WK = family.gates(w_WM)
    curves: dict[str, Curve] = {}
    measured: dict[str, Any] = {}
    for split in splits:
        gates_W = family.gates(w_WM, task.prompts(split))
        curves[split], measured[split] = (
            _exact(task, family, split, w_WM, gates_W)  # type: ignore[arg-type]
            if exact
            else _sampled(task, family, split, w_WM, gates_W, samples, seed)
        )
    result = {
        "exact": exact,
        "beta": task.beta,
        "objectives": list(task.objectives.names),
        "preferences": w_WM,
        "gates": gates_WK,
        "splits": measured,
    }
    return Evaluation(curves=curves, metrics=plain(result), cost=family.cost(w_WM))


def compare(a: Evaluation, b: Evaluation, *, split: str) -> dict[str, Any]:
    """Utility of `a` minus utility of `b`, paired: {"mean": estimate, "per_preference": [estimate, ...]} as strict JSON.

    Both were evaluated at the same preferences, and with the same samples and seed. A pair counts where both samples were scored.
    The mean over preferences is that of a sample's row (one prompt, one noise, all preferences). Exact curves: no interval.
    """
    one, two = a.curves[split], b.curves[split]
    same = one.exact == two.exact and np.array_equal(one.w_WM, two.w_WM) and np.array_equal(one.prompt_S, two.prompt_S)
    if not same:
        raise ConfigError(
            "evaluations are compared at the same preferences, prompts and samples",
            found=f"{one.rewards_WSM.shape[:2]} and {two.rewards_WSM.shape[:2]} preferences and samples, or others of them",
            remedy="evaluate both with the same w_WM, samples and seed",
        )
    return plain(_paired(_utility_WS(one), _utility_WS(two), one.prompt_S, exact=one.exact))


def _preferences(task: Task, given: np.ndarray) -> np.ndarray:
    w_WM = np.asarray(given, dtype=np.float64)
    if w_WM.ndim != 2 or not len(w_WM):
        raise ConfigError(
            "preferences are a (W, M) array with at least one row", found=f"shape {w_WM.shape}", remedy="give one row per preference"
        )
    for row in w_WM:
        Preference.of(task.objectives.names, row.tolist())
    return w_WM


def _exact(task: ExactTask, family: Family, split: str, w_WM: np.ndarray, gates_W: np.ndarray) -> tuple[Curve, dict[str, Any]]:
    returns = ExactReturns(task, family.policy, split)
    curve = _curve(split, w_WM, returns.at(gates_W), exact=True)

    points_WM = curve.returns_WSM.mean(1)
    reference_M = task.J_M(task.reference_logp_PR(split), split)
    optimum_WM = task.front(split, w_WM).points_KM
    utility_W, start_W, best_W = (metrics.utility(p, w_WM) for p in (points_WM, reference_M, optimum_WM))
    attainment_W = metrics.attainment(utility_W, start_W, best_W)
    regret_W = metrics.regret(utility_W, best_W)
    expected, maximum = metrics.utility_losses(points_WM, w_WM, best_W)

    front_KM, low_M = task.front(split).points_KM, task.reference_point(split)
    volume = hypervolume(front_KM, low_M)
    mine, theirs = hypervolume(points_WM, low_M), hypervolume(optimum_WM, low_M)
    return curve, {
        **_means(curve),
        "utility": {"mean": utility_W.mean(), "per_preference": [_known(u) for u in utility_W]},
        "gain": {"mean": (utility_W - start_W).mean(), "per_preference": [_known(u) for u in utility_W - start_W]},
        "attainment": summary(attainment_W, worst=np.min),
        "regret": summary(regret_W, worst=np.max),
        "hypervolume": {"value": mine, "reference_point": low_M, "share": mine / volume, "share_of_optimum": theirs / volume},
        "igd_plus": {"value": igd_plus(points_WM, front_KM), "of_optimum": igd_plus(optimum_WM, front_KM)},
        "utility_loss": {"expected": expected, "maximum": maximum},
        "controllability": metrics.controllability(points_WM, optimum_WM) if len(w_WM) > 1 else np.nan,
        "loss": _loss(task, family, returns, w_WM, gates_W, attainment_W, start_W, best_W),
        "own_utility": exact_own_utility(task, family, returns, w_WM, gates_W, points_WM),
    }


def _loss(
    task: ExactTask,
    family: Family,
    returns: ExactReturns,
    w_WM: np.ndarray,
    gates_W: np.ndarray,
    attainment_W: np.ndarray,
    start_W: np.ndarray,
    best_W: np.ndarray,
) -> dict[str, Any] | None:
    """Composition, learning and remainder, for families that say which adapter is the expert of which objective; else None."""
    experts = family.experts
    if experts is None:
        return None
    split, vertices = returns.split, np.eye(task.objectives.count)
    reached_M = np.diagonal(returns.at(np.eye(family.policy.K)[list(experts)]).returns_WSM.mean(1))
    start_M = task.J_M(task.reference_logp_PR(split), split)
    best_M = np.diagonal(task.front(split, vertices).points_KM)
    total_W = 1.0 - attainment_W
    composition_W, learning_W, remainder_W = None, None, total_W
    if family.policy.has_composition_limit and len(experts) == family.policy.K:
        own_W = gates_W[..., list(experts)]  # gates of the experts, in the order of the objectives
        limit_WM = np.stack([task.J_M(task.composition_limit_logp_PR(own, split), split) for own in own_W])
        composition_W = 1.0 - metrics.attainment(metrics.utility(limit_WM, w_WM), start_W, best_W)
        learning_W = total_W - composition_W
        remainder_W = 0.0 * total_W
    return {
        "composition": composition_W,
        "learning": learning_W,
        "remainder": remainder_W,
        "experts": 1.0 - metrics.attainment(reached_M, start_M, best_M),
    }


def _sampled(
    task: Task, family: Family, split: str, w_WM: np.ndarray, gates_W: np.ndarray, samples: int, seed: int
) -> tuple[Curve, dict[str, Any]]:
    returns = SampledReturns(task, family.policy, split, samples=samples, seed=seed)
    drawn, base = returns.at(gates_W), returns.at([None])
    curve, start = _curve(split, w_WM, drawn, exact=False), _curve(split, w_WM, base, exact=False)
    points_WM = np.array(_means(curve)["returns"])
    low_M = np.asarray(task.objectives.low)
    utility_WS, start_WS = _utility_WS(curve), _utility_WS(start)
    nothing: dict[str, Any] = dict.fromkeys(("attainment", "regret", "igd_plus", "utility_loss", "controllability", "loss"))
    return curve, {
        **_means(curve),
        "reference": {
            "rewards": _means(start)["rewards"][0],
            "rewards_error": over_prompts(start.returns_WSM[0], start.prompt_S).half,
            "utility": _estimates(start_WS, start.prompt_S)["per_preference"],
        },
        "utility": _estimates(utility_WS, drawn.prompt_S),
        "gain": _paired(utility_WS, start_WS, drawn.prompt_S, exact=False),
        "hypervolume": {
            "value": hypervolume(points_WM, low_M),
            "reference_point": low_M,
            "share": None,
            "share_of_optimum": None,
        },
        **nothing,
        "rewards_error": over_prompts(curve.rewards_WSM.swapaxes(0, 1), curve.prompt_S).half,
        "returns_error": over_prompts(curve.returns_WSM.swapaxes(0, 1), curve.prompt_S).half,
        "outside": task.objectives.outside(curve.rewards_WSM),
        "own_utility": sampled_own_utility(task, family, curve, start),
        "generations": _generations(task, split, w_WM, drawn, base),
        **({} if task.guards is None else {"guards": _guards(task, split, drawn, base)}),
    }


def _guards(task: Task, split: str, drawn: Measured, base: Measured) -> dict[str, Any]:
    """Guard -> its mean at each preference and for the reference, and the paired differences between them."""
    assert task.guards is not None
    prompts = [task.prompts(split)[place] for place in drawn.prompt_S]
    scores_WSG = np.stack([task.score_guards(prompts, texts_S) for texts_S in drawn.texts_WS])
    start_SG = task.score_guards(prompts, base.texts_WS[0])
    found = {}
    for name, scores_WS, start_S in zip(task.guards.names, np.moveaxis(scores_WSG, 2, 0), start_SG.T, strict=True):
        found[name] = {
            "per_preference": [_mean_known(scores_S) for scores_S in scores_WS],
            "reference": _mean_known(start_S),
            "change": _paired(scores_WS, np.broadcast_to(start_S, scores_WS.shape), drawn.prompt_S, exact=False),
        }
    return found


def _mean_known(scores_S: np.ndarray) -> float:
    """Of what was scored; NaN where nothing was."""
    known_S = scores_S[~np.isnan(scores_S)]
    return float(known_S.mean()) if len(known_S) else float("nan")


def _generations(task: Task, split: str, w_WM: np.ndarray, drawn: Measured, base: Measured) -> dict[str, Any]:
    """The first responses to different prompts, side by side at few preferences and from the reference: same prompts, same noise."""
    shown, prompts = spread_out(w_WM, SHOWN_PREFERENCES), task.prompts(split)
    rows = range(min(SHOWN_PROMPTS, len(prompts), len(drawn.prompt_S)))
    return {
        "preferences": [int(n) for n in shown],
        "prompts": [_plain_text(prompts[int(drawn.prompt_S[s])]) for s in rows],
        "reference": [base.texts_WS[0][s] for s in rows],
        "texts": [[drawn.texts_WS[n][s] for s in rows] for n in shown],
    }


def spread_out(w_WM: np.ndarray, count: int) -> list[int]:
    """Rows of at most `count` preferences far from each other: the most balanced one first, then always the one farthest from all taken."""
    taken = [int((w_WM**2).sum(1).argmin())]
    while len(taken) < min(count, len(w_WM)):
        gap_W = np.linalg.norm(w_WM[:, None] - w_WM[taken], axis=-1).min(1)
        if gap_W.max() <= 0:
            break
        taken.append(int(gap_W.argmax()))
    return sorted(taken, key=lambda n: tuple(-w_WM[n]))


def _plain_text(prompt: Prompt) -> str:
    return prompt.text if prompt.text is not None else "\n".join(f"{m['role']}: {m['content']}" for m in prompt.messages or ())


def _curve(split: str, w_WM: np.ndarray, drawn: Measured, *, exact: bool) -> Curve:
    """One preference's samples stand for all of them where only one row was drawn (the reference)."""
    count = len(w_WM)
    rewards_WSM = np.broadcast_to(drawn.rewards_WSM, (count, *drawn.rewards_WSM.shape[1:]))
    kl_WS = np.broadcast_to(drawn.kl_WS, (count, *drawn.kl_WS.shape[1:]))
    return Curve(w_WM=w_WM, rewards_WSM=rewards_WSM, kl_WS=kl_WS, prompt_S=drawn.prompt_S, beta=drawn.beta, split=split, exact=exact)


def _means(curve: Curve) -> dict[str, Any]:
    """Means per preference over what was scored, KL, and how much was not scored."""
    missing_WSM = np.isnan(curve.rewards_WSM)
    scored_WM = (~missing_WSM).sum(1)
    total_WM = np.where(missing_WSM, 0.0, curve.rewards_WSM).sum(1)
    rewards_WM = np.where(scored_WM > 0, total_WM / np.maximum(scored_WM, 1), np.nan)
    kl_W = curve.kl_WS.mean(1)
    return {
        "rewards": rewards_WM,
        "returns": rewards_WM - curve.beta * kl_W[:, None],
        "kl": summary(kl_W, worst=np.max),
        "unscored": {"count": curve.unscored, "of": missing_WSM.size, "per_objective": missing_WSM.sum((0, 1))},
    }


def _utility_WS(curve: Curve) -> np.ndarray:
    """(W, S) w . returns of every sample; NaN where an objective with a weight was not scored."""
    weighted_WSM = np.where(curve.w_WM[:, None] > 0, curve.returns_WSM * curve.w_WM[:, None], 0.0)
    return weighted_WSM.sum(-1)


def _known(value: float) -> Estimate:
    """A number without sampling error: nothing was drawn, so n is 0 and there is no interval."""
    return Estimate(value=float(value), low=float("nan"), high=float("nan"), n=0)


def _estimates(value_WS: np.ndarray, prompt_S: np.ndarray) -> dict[str, Any]:
    """Per preference and over all, with intervals over prompts and samples. Samples that are NaN are left out."""
    return {"mean": _one(value_WS.mean(0), prompt_S), "per_preference": [_one(value_S, prompt_S) for value_S in value_WS]}


def _paired(a_WS: np.ndarray, b_WS: np.ndarray, prompt_S: np.ndarray, *, exact: bool) -> dict[str, Any]:
    if exact:
        gap_W = (a_WS - b_WS).mean(1)
        return {"mean": _known(gap_W.mean()), "per_preference": [_known(gap) for gap in gap_W]}
    return _estimates(a_WS - b_WS, prompt_S)


def _one(value_S: np.ndarray, prompt_S: np.ndarray) -> Estimate:
    found = over_prompts(value_S, prompt_S)
    value, half = float(found.value), float(found.half)
    return Estimate(value=value, low=value - half, high=value + half, n=int(found.n))
