"""Policies made of tables instead of models: what evaluation must say about them is known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from paretune.policy.family import Family
from paretune.policy.rules import Constant, GateRule
from paretune.tasks.exact.task import ExactTask

SPLITS = ("train", "test")


def small_task(**dials: Any) -> ExactTask:
    """Seconds to build, milliseconds to evaluate: 85 responses to each of 4 + 4 prompts."""
    return ExactTask(**{"alphabet": 4, "length": 3, "prompt_count": 4, "width": 32, "layers": 1, **dials})


class TablePolicy:
    """Adapter k has the response log-probabilities `logp_KPR[k]` of each split; gates mix next-symbol log-probabilities."""

    parts_need_gates = stepwise = False
    device = torch.device("cpu")
    forwards_per_token = 1.0

    def __init__(self, task: ExactTask, tables: dict[str, list[np.ndarray]], mixing: str = "logit"):
        self.task, self.mixing, self.calls = task, mixing, 0
        self.has_composition_limit = mixing in ("logit", "hidden")
        self.K = len(tables["train"])
        self._logits = {split: torch.stack([self._packed(logp, split) for logp in tables[split]]) for split in SPLITS}
        self._reference = {split: self._packed(task.reference_logp_PR(split), split) for split in SPLITS}

    def _packed(self, logp_PR: np.ndarray, split: str) -> torch.Tensor:
        next_PIV = self.task.tree.next_logp(torch.from_numpy(logp_PR))
        before = self.task.inputs(split).prompt_length - 1
        return torch.cat([torch.zeros(len(next_PIV), before, next_PIV.shape[2], dtype=torch.float64), next_PIV], 1)

    def _split(self, ids_PT: torch.Tensor) -> str:
        return next(s for s in SPLITS if torch.equal(self.task.inputs(s).input_ids_PT, ids_PT))

    def parts(self, ids_PT, attention_mask=None, position_ids=None, **_):
        self.calls += 1
        return self._logits[self._split(ids_PT)]

    def combine(self, parts, gates_NK):
        return torch.einsum("kptv,pk->ptv", parts, gates_NK.double())

    def forward(self, ids_PT, *, gates_NK, **given):
        return self._reference[self._split(ids_PT)] if gates_NK is None else self.combine(self.parts(ids_PT), gates_NK)


class OneHot(GateRule):
    """Preference number i of a fixed list gets policy number `order[i]`."""

    registered_name = "one-hot"

    def __init__(self, w_WM: np.ndarray, order: list[int] | None = None):
        self.w_WM, self.order = w_WM, list(range(len(w_WM))) if order is None else order

    def gates(self, w_WM):
        rows = [int(np.abs(self.w_WM - w).sum(1).argmin()) for w in w_WM]
        return np.eye(len(self.w_WM))[[self.order[row] for row in rows]]


def experts_of(task: ExactTask, rule: GateRule, *, mixing: str = "logit", temper: float = 1.0) -> Family:
    """The optimal experts pi*_k; `temper` below 1 leaves them under-trained (pi_ref^(1-t) pi*^t is optimal for beta / t)."""
    vertices = np.eye(task.objectives.count)
    tables = {s: [_tempered(task, task.optimum_logp_PR(e, s), s, temper) for e in vertices] for s in SPLITS}
    policy: Any = TablePolicy(task, tables, mixing)
    return Family(policy, rule, task.objectives, task.base(), experts=tuple(range(task.objectives.count)))


def optimum_of(task: ExactTask, w_WM: np.ndarray, order: list[int] | None = None) -> Family:
    """The exact optimum of every preference of `w_WM`, or with `order` the optimum of another one of them."""
    tables = {s: [task.optimum_logp_PR(w, s) for w in w_WM] for s in SPLITS}
    return Family(TablePolicy(task, tables), OneHot(w_WM, order), task.objectives, task.base())  # type: ignore[arg-type]


def constant_of(task: ExactTask, w_M: list[float]) -> Family:
    """The optimum of one preference, at every preference."""
    tables = {s: [task.optimum_logp_PR(np.array(w_M), s)] for s in SPLITS}
    return Family(TablePolicy(task, tables), Constant(gates_K=(1.0,)), task.objectives, task.base())  # type: ignore[arg-type]


def _tempered(task: ExactTask, logp_PR: np.ndarray, split: str, temper: float) -> np.ndarray:
    mixed = (1 - temper) * task.reference_logp_PR(split) + temper * logp_PR
    return mixed - np.logaddexp.reduce(mixed, axis=1, keepdims=True)
