"""TRL: a reward function for its trainers, and its trainers as learners."""

from paretune.training.trl.reward import MultiObjectiveReward

__all__ = ["MultiObjectiveReward"]
