"""What an objective is: a function from prompts and completions to scores, by the reward-function convention of TRL.

`__call__(prompts, completions, **columns) -> list[float | None]`: plain prompts and completions are strings; conversational ones
are lists of messages, and then a completion is `[{"role": "assistant", "content": text}]`. Every other column of the prompts
arrives by name as a list with one item per completion, and so do the completions' tokens as `completion_ids`. None or NaN means
"could not be scored". Any function written for `reward_funcs` of TRL's trainers works here, and every objective here works there.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import itertools
import math
import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from paretune.errors import ConfigError, RewardError, own_code, raised_by, shown
from paretune.types import Objectives, Prompt

SCORES, REMEDY = "objective {!r} scores every completion without an exception", "return None for what cannot be scored; mend the named line"

__all__ = ["Objective", "check_callable", "refuse_unscored", "score_all", "score_given", "text_of"]

RESERVED = ("prompt", "prompts", "completion", "completions", "completion_ids")


LOGGERS = ("log_extra", "log_metric")  # TRL's hooks for extra columns of its logs; here they lead nowhere
ENVIRONMENTS = "environments"  # TRL's live objects, one per completion: handed on as they are


EXAMPLE = "def score(prompts, completions, **columns): return [float(len(text)) for text in completions]"


Score = Callable[..., Any]
_WARNED: set[Objectives] = set()  # objectives whose scores have left their range in this process


class Objective(ABC):
    """A registered objective: a frozen dataclass whose fields are its hyperparameters; `low` and `high` state its range.

    Every objective is maximized. `low` is also the hypervolume's reference point, so state what the worst text really scores.
    """

    registered_name: ClassVar[str]
    version: ClassVar[int]

    low: float
    high: float

    rounding: ClassVar[float] = 0.0  # how much a score may change with the other texts of its batch: 0 unless a model computes it
    asks_service: ClassVar[bool] = False  # every score is a request that may cost money
    lacks: ClassVar[Mapping[str, tuple[str, str]]] = {
        "when": ("conditions stand under terms:, beside the objectives", "terms: {when: {brief: {reward: correct, at_least: 0.5}}}")
    }
    places: ClassVar[Mapping[str, str]] = {}  # fields that hold a "path", or a "model" (a path or a name on the hub)

    @property
    def __name__(self) -> str:
        """What trainers print beside the score."""
        return self.registered_name

    @abstractmethod
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One score per completion; None where this one cannot be scored."""

    def needs(self) -> tuple[str, ...]:
        """The columns that must be there, beside those that the signature of `__call__` names."""
        return ()

    def check(self) -> None:  # noqa: B027
        """Raise ConfigError for what can be found wrong before anything runs and without loading a model."""

    def trusts(self) -> tuple[str, ...]:
        """What it runs, or sends texts to, on the word of whoever described it: code files, a model's own code, services."""
        return ()

    def squashed(self, fraction: float) -> float:
        """From [0, 1] to [low, high]."""
        return self.low + (self.high - self.low) * fraction

    def check_range(self) -> None:
        """Called by `__post_init__` of the subclasses."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(
                f"objective {self.registered_name}: the range is finite and low is below high",
                found=f"low={self.low}, high={self.high}",
                remedy="state the worst and the best score",
            )


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The words of a completion: itself, or the contents of its messages, one per line."""
    return completion if isinstance(completion, str) else "\n".join(str(message.get("content") or "") for message in completion)


def score_all(
    objectives: Sequence[tuple[str, Score]],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """(N, M) float64 raw scores of N completions under the M named `objectives`; NaN where one returned None or NaN.

    Raises RewardError, naming the objective, for an exception inside it (chained), for anything that is not one real number or
    None per completion, and for an infinity.
    """
    assert len(prompts) == len(completions), "one prompt per completion"
    if not len(completions) or not objectives:  # guards may be none
        return np.full((len(completions), len(objectives)), np.nan)
    return score_given(objectives, _arguments(prompts, completions, completion_ids))


def score_given(objectives: Sequence[tuple[str, Score]], given: Mapping[str, Any]) -> np.ndarray:
    """(N, M) as `score_all`, from the arguments that a trainer gives to a reward function: "completions", columns, and more by name."""
    count, returned, scores = len(given["completions"]), [], []
    for name, function in objectives:
        with _code_of(name):
            returned.append(_call(name, function, given))
    names = [name for name, _ in objectives]
    for name, value in zip(names, _awaited(names, returned), strict=True):
        with _code_of(name):
            scores.append(_scores(name, value, count))
    scores_NM = np.stack(scores, axis=1)
    for (name, function), scores_N in zip(objectives, scores_NM.T, strict=True):
        if hasattr(function, "low") and hasattr(function, "high"):
            _warn_outside(Objectives((name,), (float(function.low),), (float(function.high),)), scores_N)
    return scores_NM


def _code_of(name: str) -> contextlib.AbstractContextManager[None]:
    """Around the code of one objective: what it raises is a RewardError that names the line."""
    return own_code(RewardError, SCORES.format(name), REMEDY)


def _warn_outside(declared: Objectives, scores_N: np.ndarray) -> None:
    """Warn of scores outside of the range of one objective, at the first batch that has any; logs and cells count them all."""
    for name, found in declared.outside(scores_N[:, None]).items():
        if declared not in _WARNED:
            _WARNED.add(declared)
            low, high = declared.low[0], declared.high[0]
            warnings.warn(
                f"objective {name!r}: {found['count']} of {len(scores_N)} scores lie outside of its range, {low:g} to {high:g}: they reach "
                f"from {found['lowest']:g} to {found['highest']:g}. Hypervolume, utilities, stopping rules count on the range: state the "
                'worst and the best score as low and high. Further ones are counted as "outside" in train.jsonl and cell.json',
                stacklevel=3,
            )


def refuse_unscored(names: Sequence[str], unscored_M: Sequence[int] | np.ndarray, count: int, *, limit: float = 0.1) -> None:
    """Raise RewardError when more than `limit` of `count` completions could not be scored by one of the objectives `names`."""
    for name, unscored in zip(names, unscored_M, strict=True):
        if unscored > limit * count:
            raise RewardError(
                f"objective {name!r} scores at least {1 - limit:.0%} of the completions",
                found=f"{int(unscored)} of {count} came back as None or NaN ({unscored / count:.0%})",
                remedy="return a number for completions that are merely bad; or raise max_unscored (now "
                f"{limit:g}) if so many really cannot be scored",
            )


def check_callable(name: str, function: Score, columns: Sequence[str] | None) -> None:
    """Raise ConfigError if `function` cannot be called with prompts that have these `columns` (None: not known yet)."""
    wanted = _required(function)  # a function of a file is imported here
    if columns is None:
        return
    missing = [needed for needed in wanted if needed not in ("prompts", "completions", "completion_ids", *columns, *LOGGERS)]
    if missing:
        raise ConfigError(
            f"objective {name!r} takes prompts, completions, completion_ids and columns of the prompts",
            found=f"it needs {', '.join(map(repr, missing))}; the columns are {', '.join(columns) or 'none'}",
            remedy="add the column to every prompt, or give the parameter a default",
        )


def _arguments(prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    texts = [c if p.messages is None else [{"role": "assistant", "content": c}] for p, c in zip(prompts, completions, strict=True)]
    given: dict[str, Any] = {"prompts": [p.raw for p in prompts], "completions": texts}
    if completion_ids is not None:
        given["completion_ids"] = [list(ids) for ids in completion_ids]
    names = dict.fromkeys(name for p in prompts for name in p.columns if name not in RESERVED)  # ordered, distinct
    return given | {name: [p.columns.get(name) for p in prompts] for name in names}


def _parameters(function: Score) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # built in C, without a signature
        return None


def _required(function: Score) -> list[str]:
    loose = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = [p.name for p in _parameters(function) or () if p.default is p.empty and p.kind not in loose]
    return [*named, *(function.needs() if isinstance(function, Objective) else ())]


def _call(name: str, function: Score, given: Mapping[str, Any]) -> Any:
    """Call `function` with what its signature accepts: copies, so that what it changes reaches neither the rows nor the next objective."""
    missing = [needed for needed in _required(function) if needed not in given and needed not in LOGGERS]
    if missing:
        raise RewardError(
            f"objective {name!r} takes prompts, completions and columns of the prompts",
            found=f"it needs {', '.join(map(repr, missing))}; it was offered {', '.join(given)}",
            remedy="add the column to every prompt, or give the parameter a default",
        )
    copied = {key for key, value in given.items() if isinstance(value, list | tuple) and key != ENVIRONMENTS}
    own = {key: copy.deepcopy(list(value)) if key in copied else value for key, value in given.items()}
    positional, named = _accepted(function, own)
    return function(*positional, **named)


def _raised(name: str, error: BaseException) -> RewardError:
    return RewardError(SCORES.format(name), found=raised_by(error), remedy=REMEDY)


def _awaited(names: Sequence[str], returned: Sequence[Any]) -> list[Any]:
    """`returned`, with what async functions promised in its place: all of them are awaited together."""
    later = {place: value for place, value in enumerate(returned) if inspect.isawaitable(value)}
    if not later:
        return list(returned)

    async def one(name: str, promise: Awaitable[Any]) -> Any:
        try:
            return await promise
        except (Exception, SystemExit) as error:  # returned: the others come to an end first
            return _raised(name, error).with_traceback(error.__traceback__)

    async def together() -> list[Any]:
        return await asyncio.gather(*(one(names[place], promise) for place, promise in later.items()))

    found = asyncio.run_coroutine_threadsafe(together(), _loop(os.getpid())).result()
    for error in found:
        if isinstance(error, RewardError):
            raise error
    kept = dict(zip(later, found, strict=True))
    return [kept.get(place, value) for place, value in enumerate(returned)]


@lru_cache(maxsize=1)
def _loop(pid: int) -> asyncio.AbstractEventLoop:
    """The event loop of this process, in a thread of its own: clients that live from batch to batch belong to one loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="paretune-objectives", daemon=True).start()
    return loop


def _accepted(function: Score, given: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the named arguments: everything where the function takes **kwargs or does not tell."""
    parameters = _parameters(function)
    if parameters is None:
        return [], dict(given)
    offered = {**dict.fromkeys(LOGGERS, _log_nowhere), **given}
    first = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in offered]
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        named |= set(given)
    return [offered[key] for key in first], {key: value for key, value in offered.items() if key in named and key not in first}


def _log_nowhere(*_: Any, **__: Any) -> None:
    """Stands for TRL's `log_extra` and `log_metric`."""


def _scores(name: str, returned: Any, count: int) -> np.ndarray:
    """(N,) float64 from what an objective returned."""
    no_list = isinstance(returned, (str, bytes, bytearray, memoryview, Mapping, Set))
    if no_list or not hasattr(returned, "__iter__") or getattr(returned, "ndim", 1) == 0:
        raise _not_scores(name, count, f"{_short(returned)} instead of a list")
    sized = hasattr(returned, "__len__")
    try:
        values = list(returned) if sized else list(itertools.islice(returned, count + 1))  # a generator may be endless
    except (Exception, SystemExit) as error:  # inside a generator
        raise _raised(name, error) from error
    if len(values) != count:
        raise _not_scores(
            name, count, f"{len(values) if sized or len(values) <= count else f'more than {count}'} scores for {count} completions"
        )
    scores_N = np.empty(count)
    for place, value in enumerate(values):
        plain = value is None or (hasattr(value, "__float__") and not isinstance(value, (str, bytes)) and not getattr(value, "ndim", 0))
        try:
            if not plain or "complex" in str(getattr(value, "dtype", "")):
                raise TypeError
            scores_N[place] = math.nan if value is None else float(value)
        except OverflowError:
            scores_N[place] = math.inf
        except Exception:  # dates, signaling NaN, records: they have a __float__, and are no numbers
            raise _not_scores(name, count, f"{_short(value)} for completion {place}") from None
        if math.isinf(scores_N[place]):
            raise RewardError(
                f"objective {name!r} returns finite scores",
                found=f"{value} for completion {place}" if isinstance(value, float) else f"an infinity for completion {place}",
                remedy="bound the score, or return None for a completion that cannot be scored",
            )
    return scores_N


def _not_scores(name: str, count: int, found: str) -> RewardError:
    return RewardError(f"objective {name!r} returns one number or None per completion", found=found, remedy=f"for example: {EXAMPLE}")


def _short(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"
