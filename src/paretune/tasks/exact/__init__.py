"""Exact tasks: every response of a small language can be enumerated, so that the true Pareto front is known."""
