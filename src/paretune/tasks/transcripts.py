"""Conversations written as one text, "\\n\\nHuman: ... \\n\\nAssistant: ...", as the HH-RLHF data have them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paretune.errors import ConfigError
from paretune.tasks.rows import short

__all__ = ["Transcript", "read_transcript"]

TURN = re.compile(r"(?:^|\n\n)[ \t]*(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Transcript:
    """A conversation up to the place where the assistant speaks last, and what it said there ("" where it has yet to speak)."""

    messages: tuple[dict[str, str], ...]
    text: str  # the same as the file wrote it, ending in "Assistant:"
    reply: str


def read_transcript(where: str, text: str) -> Transcript:
    """Cut a transcript before the assistant's last words; ConfigError, with the place, where it is none."""
    marks = list(TURN.finditer(text))
    turns = []
    for place, mark in enumerate(marks):
        said = text[mark.end() : marks[place + 1].start() if place + 1 < len(marks) else None]
        turns.append((ROLES[mark[1]], said.strip()))
    begins = bool(marks) and not text[: marks[0].start()].strip()
    if not begins or "user" not in [role for role, _ in turns] or turns[-1][0] != "assistant":
        raise ConfigError(
            "a transcript reads Human: ... Assistant: ..., each after an empty line, and ends with the assistant",
            found=f"{short(text.strip()) or 'an empty text'!r} in {where}",
            remedy="leave transcript: out for other texts, or remove that line",
        )
    messages = tuple({"role": role, "content": said} for role, said in turns[:-1])
    return Transcript(messages=messages, text=text[: marks[-1].end()], reply=turns[-1][1])
