"""Evaluation: what a family of policies is worth, and why."""
