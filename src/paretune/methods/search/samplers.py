"""Search by Optuna, an optional dependency: candidates drawn from a model of what was good so far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from paretune.errors import ConfigError
from paretune.methods.search.base import Evaluations, Score, SearchResult, Spent
from paretune.seeds import seed_for

__all__ = ["load_optuna", "optuna_search", "quiet"]

TRIALS = 100  # where no budget is given


def optuna_search(
    score: Score,
    count: int,
    *,
    start: np.ndarray | None = None,
    budget: int | None = None,
    sampler: Literal["tpe", "gp", "cmaes"] = "gp",
    seed: int = 0,
) -> SearchResult:
    """`budget` trials (100 by default) in [0, 1]^count: "tpe" is a Parzen estimator, "gp" a Gaussian process, "cmaes" CMA-ES.

    Source: Optuna (Akiba et al. 2019) and its samplers, with their defaults. Differs: the start is the first trial. Hides: global
    models pay for what a local search gets from its start; the first 10 trials of the Gaussian process and of TPE are random. Another
    version of Optuna may draw other candidates.
    """
    optuna = load_optuna()
    evaluations = Evaluations(score, budget=budget or TRIALS, cache=False)
    with quiet(optuna), contextlib.suppress(Spent):
        study = optuna.create_study(direction="maximize", sampler=_sampler(optuna, sampler, seed_for(seed, "optuna") % 2**32))
        if start is not None:
            study.enqueue_trial({_name(k): float(weight) for k, weight in enumerate(start)})
        while True:
            trial = study.ask()
            value = evaluations(np.array([trial.suggest_float(_name(k), 0.0, 1.0) for k in range(count)]))
            if np.isnan(value):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, value)
    return evaluations.result()


def _name(k: int) -> str:
    return f"weight_{k}"


def _sampler(optuna: Any, name: str, seed: int) -> Any:
    makers = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler, "cmaes": optuna.samplers.CmaEsSampler}
    assert name in makers, name
    return makers[name](seed=seed)


def load_optuna(*, otherwise: str = ', or search "model"') -> Any:
    """Optuna, or a ConfigError that says which extra to install, or what to do `otherwise`."""
    try:
        import optuna
    except ImportError:
        remedy = f'`pip install "paretune[search]"`{otherwise}'
        raise ConfigError("a search by Optuna needs Optuna", found="it is not installed", remedy=remedy) from None
    return optuna


@contextlib.contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """No line for every study, and the reader's own setting afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
