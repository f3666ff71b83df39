"""Training: a `TrainSpec` becomes adapters."""
