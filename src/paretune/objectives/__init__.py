"""Objectives: what a user wants of responses, as reward functions and as utilities over them."""
