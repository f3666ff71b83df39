"""Weightings: how the weights of a training step follow from the preference and from what the training has seen."""
