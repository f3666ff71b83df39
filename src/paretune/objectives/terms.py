"""Terms: what else is asked of a training beside its preference, declared alike in recipes, suites and the drop-in for TRL.

    terms:
      schedule: {kind: linear, start: {correct: 1}, until: 0.5}   # weights by step, from `start` to the preference
      when: {brief: {reward: correct, at_least: 0.5}}             # a gated reward: `brief` counts in correct responses only
      constraints: {correct: 0.7}                                 # w . J is climbed while this return is kept
      targets: {correct: 0.8, brief: 0.6}                         # instead: the worst distance from these returns is made small

`when` changes what a task's rewards are. The other three change how a training weighs them: a `TrainSpec` brings them into its weighting.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from paretune.errors import ConfigError, nearest, shown
from paretune.registry import GIVEN, checked
from paretune.types import Objectives, Preference, Share

__all__ = ["Course", "Declared", "Terms", "When", "brief"]

Weights = dict[str, float] | tuple[float, ...]


def _keys_of(kind: Any, what: str) -> BeforeValidator:
    """Refuses, with the nearest name, a key that the dataclass `kind` does not have."""

    def look(given: Any) -> Any:
        known = [f.name for f in dataclasses.fields(kind)]
        for key in given if isinstance(given, Mapping) else ():
            if key not in known:
                raise ConfigError(f"{what}: its keys are those that it declares", found=shown(key), remedy=nearest(shown(key), known))
        return given

    return BeforeValidator(look)


@dataclass(frozen=True, kw_only=True)
class Course:
    """Weights by step: from the first row, along straight lines or half a cosine, to the preference that is asked for.

    "linear" and "cosine" have one row, `start`. "table" has `rows`, [share of the training, weights], with straight lines between them;
    two rows at one share are a jump. All arrive at the preference at the share `until`, and stay there.
    """

    kind: Literal["linear", "cosine", "table"] = "linear"
    start: Weights | None = None
    rows: tuple[tuple[Share, Weights], ...] = ()
    until: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the training

    def __post_init__(self):
        wanted, other = ("rows", "start") if self.kind == "table" else ("start", "rows")
        if not getattr(self, wanted) or getattr(self, other):
            raise ConfigError(
                "terms.schedule: linear and cosine have a start, and a table has rows",
                found=f"kind {self.kind} with {shown({name: v for name in ('start', 'rows') if (v := getattr(self, name))})}",
                remedy="{kind: linear, start: {correct: 1}}, or {kind: table, rows: [[0, {correct: 1}], [0.3, {brief: 1}]]}",
            )
        shares = [share for share, _ in self.rows]
        if self.rows and (shares != sorted(shares) or shares[0] != 0 or shares[-1] >= self.until):
            raise ConfigError(
                "terms.schedule: the rows of a table begin at share 0, rise, and end before `until`",
                found=f"shares {', '.join(f'{share:g}' for share in shares)}, until {self.until:g}",
                remedy="rows: [[0, ...], [0.3, ...]]: the preference itself comes at `until` (1: the last step)",
            )

    def named(self, names: Sequence[str]) -> Course:
        """With each preference as weights in the order of `names`; ConfigError where one is none."""

        def of(given: Any) -> tuple[float, ...]:
            try:
                return Preference.of(names, given).weights
            except ConfigError as error:
                raise ConfigError(f"terms.schedule: {error.rule}", found=error.found, remedy=error.remedy) from None

        start = None if self.start is None else of(self.start)
        return dataclasses.replace(self, start=start, rows=tuple((share, of(row)) for share, row in self.rows))

    def at(self, share: float, w_NM: np.ndarray) -> np.ndarray:
        """(N, M) weights at a share of the training, 0 to 1, for rows that are asked for `w_NM`; a pure function."""
        rows = self.rows or ((0.0, self.start or ()),)
        shares = [row[0] for row in rows]
        place = bisect.bisect_right(shares, share) - 1
        if share >= self.until:
            return w_NM
        begin, left_M = rows[place][0], np.array(rows[place][1])
        last = place + 1 == len(rows)
        end, right_NM = (self.until, w_NM) if last else (rows[place + 1][0], np.array(rows[place + 1][1]))
        way = (share - begin) / (end - begin)
        way = 0.5 - 0.5 * math.cos(math.pi * way) if self.kind == "cosine" else way
        return (1 - way) * left_M + way * np.broadcast_to(right_NM, w_NM.shape)


@dataclass(frozen=True, kw_only=True)
class When:
    """Where a gated reward counts: the score of `reward` is at least, at most, or between. A bound itself passes.

    Source: conditioned rewards (GDPO, 2601.05242, equation 8). Differs: a gated reward has its own `low` where it does not count, not 0, so
    that scales that do not begin at 0 are gated, too; there is an upper bound; a response whose gate is unscored is unscored.
    Hides: a gated reward's mean falls where the gate closes more often, although what it scores is as before.
    """

    reward: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self):
        low, high = self.at_least, self.at_most
        if (low is None and high is None) or (low is not None and high is not None and low > high):
            raise ConfigError(
                "terms.when: a condition has at_least, at_most, or both with at_least the smaller one",
                found=f"reward {self.reward} with "
                + (f"at_least {low:g}, at_most {high:g}" if low is not None and high is not None else "neither"),
                remedy="for example {reward: correct, at_least: 0.5}",
            )

    def holds(self, scores: np.ndarray) -> np.ndarray:
        """Where it passes; NaN does not."""
        above = -math.inf if self.at_least is None else self.at_least
        below = math.inf if self.at_most is None else self.at_most
        return (scores >= above) & (scores <= below)

    def __str__(self) -> str:
        low, high = self.at_least, self.at_most
        bounds = [f"at {word} {bound:g}" for word, bound in (("least", low), ("most", high)) if bound is not None]
        return f"{self.reward} is {' and '.join(bounds)}"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """See the module. `of` makes one for given objectives; weights, targets and constraints are then in their order.

    targets: the returns to come near to, of every objective; the weights follow smooth Tchebycheff (`utilities.Tchebycheff`).
    constraints: the returns to keep, of some or all; prices on them grow while they are missed (`utilities.Constrained`).
    """

    schedule: Annotated[Course, _keys_of(Course, "terms.schedule")] | None = field(default=None, metadata=GIVEN)
    when: dict[str, Annotated[When, _keys_of(When, "terms.when")]] | None = field(default=None, hash=False, metadata=GIVEN)
    targets: Weights | None = field(default=None, metadata=GIVEN)
    constraints: dict[str, float | None] | tuple[float | None, ...] | None = field(default=None, metadata=GIVEN)

    @classmethod
    def of(cls, given: Any, names: Sequence[str], guards: Sequence[str] = ()) -> Terms | None:
        """Checked for objectives and guards of these names; None where nothing is asked. Ranges are `check`'s."""
        terms = given if isinstance(given, Terms | None) else checked("terms", Declared, given)
        if terms is None or terms == cls():
            return None
        if terms.targets and terms.constraints:
            raise ConfigError(
                "terms: have targets or constraints, each of which is a training's weighting",
                found="both",
                remedy="a target that must be reached is a constraint",
            )
        _check_conditions(terms.when or {}, names, guards)
        return cls(
            schedule=terms.schedule and terms.schedule.named(names),
            when=terms.when or None,
            targets=_in_order("targets", terms.targets, names, all_of_them=True),  # type: ignore[arg-type]  # every one is a number
            constraints=_in_order("constraints", terms.constraints, names, all_of_them=False),
        )

    def check(self, objectives: Objectives, guards: Objectives | None = None) -> None:
        """ConfigError for bounds, targets and constraints that the declared ranges rule out."""
        ranges = {
            name: (low, high)
            for one in (objectives, guards)
            if one is not None
            for name, low, high in zip(one.names, one.low, one.high, strict=True)
        }
        for name, when in (self.when or {}).items():
            low, high = ranges[when.reward]
            least, most = when.at_least, when.at_most
            if not ((least is None or low < least <= high) and (most is None or low <= most < high)):
                raise ConfigError(
                    f"terms.when: a bound divides the range of {when.reward}, {low:g} to {high:g}",
                    found=f"{name} counts where {when}",
                    remedy="a bound that every score passes, or none, is no condition: choose one between",
                )
        for what, given in (("targets", self.targets), ("constraints", self.constraints)):
            for name, value in zip(objectives.names, given or (), strict=False):
                low, high = ranges[name]
                if value is not None and not low <= float(value) <= high:
                    raise ConfigError(
                        f"terms.{what}: are returns within the objectives' ranges",
                        found=f"{name}: {float(value):g}, and its range is {low:g} to {high:g}",
                        remedy="choose a return between",
                    )

    def utility(self) -> dict[str, Any] | None:
        """The utility of returns that targets or constraints stand for; None where there are none."""
        if self.constraints is not None:
            return {"name": "constrained", "thresholds": list(self.constraints)}
        return None if self.targets is None else {"name": "tchebycheff", "ideal": list(self.targets)}

    def gated(self, rewards: np.ndarray, objectives: Objectives, guards: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """(..., M) rewards with `low` where a condition does not hold, NaN where its reward is unscored. `guards` are theirs by name."""
        found = np.array(rewards, dtype=np.float64)
        scores = {name: rewards[..., k] for k, name in enumerate(objectives.names)} | dict(guards or {})
        for name, when in (self.when or {}).items():
            k, gate = objectives.names.index(name), scores[when.reward]
            counted = np.where(when.holds(gate), rewards[..., k], objectives.low[k])
            found[..., k] = np.where(np.isnan(gate), np.nan, counted)
        return found

    def sentences(self, names: Sequence[str]) -> list[str]:
        """What is asked, for people."""

        def weights(row: Any) -> str:
            return returns([value or None for value in row])

        def returns(row: Any) -> str:  # 0 is one of them
            return ", ".join(f"{name} {value:g}" for name, value in zip(names, row, strict=True) if value is not None)

        said = []
        if (course := self.schedule) is not None:
            rows = " then ".join(f"{weights(row)} at {share:.0%}" for share, row in course.rows or ((0.0, course.start),))
            said.append(f"weights by step ({course.kind}): {rows}, then the preference at {course.until:.0%} of the training")
        said += [f"{name} counts where {when}" for name, when in (self.when or {}).items()]
        said += [f"returns are to come near to {returns(self.targets)}"] if self.targets else []
        return said + ([f"returns are to be at least {returns(self.constraints)}"] if self.constraints else [])


Declared = Annotated[Terms, _keys_of(Terms, "terms")]


def brief(terms: Mapping[str, Any]) -> str:
    """A few words that tell described terms apart: `linear from (1, 0) until 0.5, objective_2 where objective_1 is at least 0.5`."""

    def row(weights: Sequence[float | None]) -> str:
        return f"({', '.join('-' if w is None else f'{w:g}' for w in weights)})"

    said = []
    if course := terms.get("schedule"):
        rows = " then ".join(f"{row(weights)} at {share:g}" for share, weights in course["rows"]) or row(course["start"])
        said.append(f"{course['kind']} from {rows} until {course['until']:g}")
    said += [f"{name} where {When(**when)}" for name, when in (terms.get("when") or {}).items()]
    return ", ".join(said + [f"{what} {row(terms[what])}" for what in ("targets", "constraints") if terms.get(what)])


def _check_conditions(when: Mapping[str, When], names: Sequence[str], guards: Sequence[str]) -> None:
    """ConfigError where a condition gates or asks what is not there, or asks what is gated itself."""
    for name, condition in when.items():
        for asked, known in ((name, names), (condition.reward, (*names, *guards))):
            if asked not in known:
                rule = "terms.when: names the objective that is gated, and under `reward` an objective or a guard"
                raise ConfigError(rule, found=shown(asked), remedy=nearest(asked, known))
        if condition.reward in when:
            raise ConfigError(
                "terms.when: a condition looks at a reward that is not gated itself",
                found=f"{name} counts where {condition}" + ("" if condition.reward == name else f", and {condition.reward} is gated, too"),
                remedy="ask what the other condition asks, or combine both into one reward function",
            )


def _in_order(what: str, given: Any, names: Sequence[str], *, all_of_them: bool) -> tuple[float | None, ...] | None:
    """One number per objective from a mapping or a list of such; None where an objective has none."""
    if not given:
        return None
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise ConfigError(f"terms.{what}: names existing objectives", found=shown(name), remedy=nearest(shown(name), names))
        given = [given.get(name) for name in names]
    missing = len(given) != len(names) or all(value is None for value in given) or (all_of_them and None in given)
    if missing:
        raise ConfigError(
            f"terms.{what}: {'every objective has one' if all_of_them else 'an objective has one or none'}",
            found=f"{list(given)} for {', '.join(names)}",
            remedy=f"for example {what}: {{{', '.join(f'{name}: 0.5' for name in names[: None if all_of_them else 1])}}}",
        )
    return tuple(given)
