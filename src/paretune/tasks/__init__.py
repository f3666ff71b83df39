"""Tasks: prompts, objectives and a reference model; where it can be known, the exact Pareto front."""
