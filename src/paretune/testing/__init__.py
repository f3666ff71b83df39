"""Conformance suites for plug-in authors: each proves that a class of one file works with everything else."""

from paretune.testing.golden import check_golden, golden
from paretune.testing.losses import check_loss
from paretune.testing.methods import check_method, quick_learner, train_plan
from paretune.testing.mixings import check_gate_rule, check_mixing, quick_task
from paretune.testing.objectives import ConformanceError, check_objective
from paretune.testing.tasks import check_task

__all__ = [
    "ConformanceError",
    "check_gate_rule",
    "check_golden",
    "check_loss",
    "check_method",
    "check_mixing",
    "check_objective",
    "check_task",
    "golden",
    "quick_learner",
    "quick_task",
    "train_plan",
]
