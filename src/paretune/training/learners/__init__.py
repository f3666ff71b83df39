"""Learners that need torch, transformers and PEFT only: from sampled responses, by enumeration, from pairs, and from teachers."""
