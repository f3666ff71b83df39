"""Policies: a model whose adapters are mixed under gates; sampling, scoring, saving."""
