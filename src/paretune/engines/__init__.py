"""Other people's training loops: a reward function for their scripts (`drop_in`), and one of them as a learner (`trl`)."""

from paretune.engines.drop_in import MultiObjectiveReward

__all__ = ["MultiObjectiveReward"]
