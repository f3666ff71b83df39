"""Runs: suites, recipes, jobs and workers, and the run directory."""
