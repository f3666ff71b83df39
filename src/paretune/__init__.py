"""Paretune: train, combine, measure and serve families of language-model policies under several objectives.

The names below are loaded on first use, so that `import paretune` costs nothing (in particular, no torch).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "Family": "paretune.policy.family",
    "MultiObjectiveReward": "paretune.training.trl.reward",
    "Preference": "paretune.types",
    "evaluate": "paretune.evaluation.evaluate",
    "export": "paretune.serve.export",
    "fit": "paretune.runs.suite",
    "method": "paretune.runs.suite",
    "task": "paretune.runs.suite",
}

__all__ = ["Family", "MultiObjectiveReward", "Preference", "__version__", "evaluate", "export", "fit", "method", "task"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'paretune' has no attribute {name!r}")
