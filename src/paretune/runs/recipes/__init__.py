"""Recipes: one method on your model, prompts and objectives; a first one, a preview of it, and what is measured after its fit."""
