"""The words of the project: frozen dataclasses over NumPy arrays, and what their axes mean.

Axis legend (suffixes of array names in every module):

    N  sequences in a batch = P * G     P  prompts             G  samples per prompt
    T  token positions                  V  vocabulary          M  objectives
    W  preferences                      S  samples at one preference
    K  points of a front, or adapters   R  enumerable responses L  layers

Every objective is MAXIMIZED. NaN in a reward means "could not be scored"; it is never 0 and is always counted.
Rewards stay vectors (axis M last) until `scalarize` or `advantage`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeGuard

import numpy as np
from pydantic import Field

from paretune.errors import IN_URL, KEY, SECRET, ConfigError, nearest, shown

__all__ = [
    *("Amount", "Cost", "Count", "Curve", "Device", "Estimate", "Fraction", "Front", "Name", "Natural", "Objectives", "Positive"),
    *("Preference", "Prompt", "Share", "canonical_json", "check_name", "is_number", "key_of", "last_words", "refuse_secrets", "spelled"),
]

# Bounds of fields of registered classes, which `Registry.build` checks; all floats are finite.
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu|npu)(:\d{1,3})?)$")]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


def canonical_json(value: Any) -> str:
    """One spelling of a JSON value: sorted keys, no spaces, shortest floats; NaN and infinities are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def is_number(given: Any) -> TypeGuard[float]:
    """Whether it is a real number, as settings given by name may not be; a truth value is none."""
    return isinstance(given, int | float | np.integer | np.floating) and not isinstance(given, bool)


def key_of(value: Any) -> str:
    """The 20-hex-digit name of a JSON value, used as a directory name."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:20]


BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"  # letters that show nothing


def check_name(kind: str, name: Any) -> None:
    """ConfigError unless `name` is a text that a reader sees as it is: no controls, line ends, bidi marks or characters without a width."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or any(c in BLANK for c in name):
        raise ConfigError(
            f"the name of {kind} is made of characters that can be seen",
            found=ascii(name),
            remedy="rename it: no control characters, line ends, direction marks or zero-width characters",
        )


def refuse_secrets(what: str, given: Any, *, names: re.Pattern[str] | None = None) -> None:
    """ConfigError where something that is written down holds a key: in a URL, by its look, or in an entry whose name `names` matches."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            if names is not None and names.fullmatch(str(name)) and value not in (None, ""):
                raise _secret(what, f"a value for {str(name)!r}")
            refuse_secrets(what, value, names=names)
    elif isinstance(given, list | tuple):
        for value in given:
            refuse_secrets(what, value, names=names)
    elif isinstance(given, str) and (("://" in given and IN_URL.search(given)) or KEY.search(given)):
        raise _secret(what, "a URL with one in it" if "://" in given else f"a text of {len(given)} characters that looks like one")


SECRET_NAMES = re.compile(rf"[\w -]{{0,40}}{SECRET}", re.IGNORECASE)  # of a field
IN_REQUEST = re.compile(rf"[\w -]{{0,40}}{SECRET}|key|token|auth|bearer|sig|signature", re.IGNORECASE)  # of what is sent to a service


def _secret(what: str, found: str) -> ConfigError:
    return ConfigError(
        f"{what}: keys and passwords are not written down, because descriptions go into spec.json, job files and logs",
        found=found,
        remedy="put the key into an environment variable, and name that: `key_env: MY_KEY` for a judge, HF_TOKEN for the hub",
    )


@dataclass(frozen=True)
class Objectives:
    """The ordered meaning of axis M. `low` and `high` are the (M,) range; `low` is also the hypervolume reference point."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self):
        for name in self.names:
            check_name("an objective", name)
        if len(set(self.names)) != len(self.names) or not self.names:
            raise ConfigError(
                "objective names are distinct and there is at least one",
                found=", ".join(self.names) or "none",
                remedy="rename the repeated objective, or list at least one",
            )
        if not len(self.names) == len(self.low) == len(self.high):
            raise ConfigError(
                "every objective has a name, a low and a high",
                found=f"{len(self.names)} names, {len(self.low)} lows, {len(self.high)} highs",
                remedy="give one of each per objective",
            )

    def outside(self, rewards_NM: np.ndarray) -> dict[str, dict[str, float]]:
        """Name -> how many rewards (..., M) lie outside of the declared range, the lowest and the highest; without objectives that keep it.

        A millionth of the range is rounding.
        """
        found = {}
        for name, low, high, rewards_N in zip(self.names, self.low, self.high, rewards_NM.reshape(-1, self.count).T, strict=True):
            slack, known_N = 1e-6 * (high - low), rewards_N[np.isfinite(rewards_N)]
            if count := int(((known_N < low - slack) | (known_N > high + slack)).sum()):
                found[name] = {"count": count, "lowest": float(known_N.min()), "highest": float(known_N.max())}
        return found

    @property
    def count(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Preference:
    """How much each objective matters: non-negative, sums to 1 (checked, never silently renormalized)."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        shown = ", ".join(f"{n}={w:g}" for n, w in zip(self.names, self.weights, strict=False))
        if len(self.names) != len(self.weights):
            raise ConfigError(
                "a preference has one weight per objective",
                found=f"{len(self.weights)} weights for {len(self.names)} objectives ({', '.join(self.names)})",
                remedy="give every objective a weight; unwanted ones get 0",
            )
        bad = not all(np.isfinite(w) and w >= 0 for w in self.weights)
        if bad or not _sum_to_one(self.weights):
            total = sum(self.weights)
            fix = "use finite weights of at least 0"
            if not bad and total > 0:
                fix = "divide by the sum: " + spelled(self.names, [w / total for w in self.weights], digits=4)
            raise ConfigError("the weights of a preference are non-negative and sum to 1", found=f"{shown} (sum {total:g})", remedy=fix)

    @property
    def w_M(self) -> np.ndarray:
        return np.asarray(self.weights, dtype=np.float64)

    @classmethod
    def of(cls, names: Sequence[str], given: Mapping[str, float] | Sequence[float] | str) -> Preference:
        """From `{"a": .7, "b": .3}`, `[.7, .3]` or `"a=.7,b=.3"`; an objective that is left out gets 0."""
        names = tuple(names)
        if isinstance(given, str):
            given = _parse_weights(given)
        if isinstance(given, Mapping):
            for name in given:
                if name not in names:
                    raise ConfigError("a preference names existing objectives", found=shown(name), remedy=nearest(shown(name), names))
            given = [given.get(n, 0.0) for n in names]
        try:
            return cls(names, tuple(_weight(w) for w in given))
        except (TypeError, ValueError, OverflowError) as error:
            remedy = "for example " + spelled(names, [1 / len(names)] * len(names), digits=3)
            raise ConfigError("the weights of a preference are numbers", found=f"{shown(given)}: {error}", remedy=remedy) from None


def _weight(given: Any) -> float:
    if isinstance(given, bool | str):
        raise TypeError(f"{given!r} is no number")
    return float(given)


def _parse_weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, sep, value = part.partition("=")
        try:
            if not sep:
                raise ValueError
            weight = float(value)
        except ValueError:
            raise ConfigError(
                "a preference reads name=weight,name=weight", found=shown(part), remedy="for example --preference helpful=.7,brief=.3"
            ) from None
        if name.strip() in weights:
            raise ConfigError("a preference names each objective once", found=repr(text), remedy=f"give {name.strip()!r} one weight")
        weights[name.strip()] = weight
    return weights


@dataclass(frozen=True)
class Prompt:
    """One prompt: plain `text`, or chat `messages` ([{"role", "content"}, ...]); `columns` go to the objectives by name."""

    text: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def raw(self) -> str | list[dict[str, str]]:
        """What a TRL-style reward function receives in `prompts`."""
        return self.text if self.messages is None else [dict(m) for m in self.messages]  # type: ignore[return-value]

    @property
    def digest(self) -> str:
        """Names this prompt's random streams, wherever it stands in a batch."""
        return key_of([self.text, None if self.messages is None else [dict(m) for m in self.messages]])


def spelled(names: Sequence[str], weights: Sequence[float], *, digits: int = 6) -> str:
    """A preference as one word that `Preference.of` reads: polite=0.7,brief=0.3. Thirds get more `digits`, until their sum is 1."""
    rounded = ([f"{weight:.{count}g}" for weight in weights] for count in range(digits, 18))
    texts = next((texts for texts in rounded if _sum_to_one([float(text) for text in texts])), [f"{weight:g}" for weight in weights])
    return ",".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))


def _sum_to_one(weights: Sequence[float]) -> bool:
    return abs(sum(weights) - 1.0) <= 1e-6


def last_words(raw: Any) -> str:
    """What a prompt asks, for a person: a text whole, of a conversation (messages) the last message."""
    return raw if isinstance(raw, str) else raw[-1]["content"]


@dataclass(frozen=True)
class Front:
    """Points on (or estimating) a Pareto front of regularized returns, best known per preference.

    `policies` says over which class it is the front: "kl" (all policies, KL-regularized), "stochastic" or "deterministic".
    `proof` says why it can be believed, e.g. "closed form" or "best found".
    """

    points_KM: np.ndarray
    w_KM: np.ndarray
    policies: str
    beta: float
    proof: str


@dataclass(frozen=True)
class Curve:
    """What was measured along the preferences, raw. S runs over prompts (exact) or over samples (sampled).

    Returns in the sense of the project are `rewards - beta * kl`, per objective; see `returns_WSM`.
    """

    w_WM: np.ndarray
    rewards_WSM: np.ndarray
    kl_WS: np.ndarray  # nats per whole response, against the reference policy
    prompt_S: np.ndarray  # which prompt of the split each S belongs to
    beta: float
    split: str  # "train" | "test"
    exact: bool

    @property
    def returns_WSM(self) -> np.ndarray:
        return self.rewards_WSM - self.beta * self.kl_WS[:, :, None]

    @property
    def unscored(self) -> int:
        return int(np.isnan(self.rewards_WSM).sum())


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; `low` and `high` are NaN where n is too small to say."""

    value: float
    low: float
    high: float
    n: int


PEAKS = ("memory_bytes",)  # a maximum, however things are arranged
STOCKS = ("storage_bytes",)  # a sum, however things are arranged


@dataclass(frozen=True)
class Cost:
    """Counts, all non-negative. The default is "nothing"."""

    samples: int = 0  # responses drawn for training
    tokens: int = 0  # generated in training, validation and search; enumerated where responses are
    steps: int = 0  # optimizer steps
    flops: float = 0.0  # floating-point operations, estimated
    seconds: float = 0.0  # wall clock on the machine that ran it, from the first step on: without loading the model
    evaluations: int = 0  # calls of a search's score
    validation_samples: int = 0  # responses drawn for validation, calibration and search; not in `samples`
    memory_bytes: int = 0  # peak
    storage_bytes: int = 0  # of the published files

    def __post_init__(self):
        for name, value in self.to_json().items():
            assert 0 <= value < math.inf, f"{name} = {value}: a cost is a finite count"

    def then(self, other: Cost) -> Cost:
        """Both, one after the other."""
        return self._merge(other, lambda name, a, b: max(a, b) if name in PEAKS else a + b)

    def beside(self, other: Cost) -> Cost:
        """Both, at the same time on a machine each."""
        return self._merge(other, lambda name, a, b: a + b if name in STOCKS else max(a, b))

    def _merge(self, other: Cost, rule: Callable[[str, Any, Any], Any]) -> Cost:
        return Cost(**{name: rule(name, value, getattr(other, name)) for name, value in self.to_json().items()})

    def to_json(self) -> dict[str, float]:
        """Field -> number, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cost:
        return cls(**data)
