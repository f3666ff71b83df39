"""Texts with {column} in them: which columns they name, and what they become for one row."""

from __future__ import annotations

import string

from paretune.errors import ConfigError

__all__ = ["names_in"]


def names_in(template: str) -> list[str]:
    """The columns that a template names, in order; ConfigError where it is no template, or names none."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            "a template is text with {column} in it", found=f"{template!r}: {error}", remedy="write a literal brace twice: {{ or }}"
        ) from None
    if not names:
        raise ConfigError("a template names at least one column", found=repr(template), remedy='for example "Question: {prompt}"')
    return names
