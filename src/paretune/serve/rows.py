"""What the engine decodes: a row is one response that somebody waits for. Its text as it grows, and prompts that were read before."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paretune.errors import ParetuneError
from paretune.policy.rollout import row_uniforms
from paretune.policy.sampling import Sampling, stop_at, stop_ids
from paretune.types import Prompt

__all__ = ["Piece", "Prefixes", "Row", "Spoken", "Text"]


@dataclass(frozen=True)
class Spoken:
    """One token with its log-probability under the policy itself, in nats, and the most likely ones in its place."""

    token: int
    logp: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a row has to tell: more text, and with the last piece why it ends: "stop", "length", "cancelled" or "error"."""

    text: str = ""
    spoken: tuple[Spoken, ...] = ()  # only of rows that ask for log-probabilities
    finish: str | None = None
    error: ParetuneError | None = None


@dataclass(eq=False)
class Row:
    """One response. What it says is what `Family.sample` says as response `number` to `prompt`, under the same seed and settings."""

    family: str
    prompt: Prompt
    tokens: Sequence[int]  # of the prompt
    gates_K: np.ndarray
    limit: int
    seed: int = 0
    number: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # how many of the most likely tokens are told beside each; None tells nothing
    stream: bool = False  # whether text is told as it grows, or once at the end
    sink: Callable[[Piece], None] = lambda piece: None

    cancelled: bool = False  # set it to have the row dropped
    said: list[int] = field(default_factory=list)
    spoken: list[Spoken] = field(default_factory=list)  # what was not told yet
    arrived: float = field(default_factory=time.monotonic)
    first: float | None = None  # when its first token was drawn
    ended: bool = False

    def __post_init__(self):
        self.vector = np.asarray(self.gates_K, dtype=np.float32).tobytes()

    def uniforms_1T(self) -> np.ndarray:
        """The draws of this row."""
        return row_uniforms(self.seed, 0, [self.prompt.digest], [self.number], self.limit)


class Text:
    """The text of a response as its tokens come. What may yet become a stop string, or half of a character, is held back.

    The whole is what the tokenizer makes of all tokens at once, cut at the first stop string that is complete.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self.ends = stop_ids(tokenizer, stop)  # tokens that end it as EOS does: no text shows them
        self._longest = max(map(len, stop), default=0)
        self._tokens: list[int] = []
        self._from = self._read = 0  # of the tokens: those before `_read` are in the text; decoding begins at `_from`, for their context
        self._text, self._told = "", 0
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be told now."""
        self._tokens.append(token)
        before, now = (self._decode(self._tokens[self._from : end]) for end in (self._read, None))
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        start = max(0, len(self._text) - self._longest + 1)
        self._text += now[len(before) :]
        at = stop_at(self._text[start:], self._stop)
        if at is not None:
            self._text, self.stopped = self._text[: start + at], True
        return self._tell(len(self._text) - (0 if self.stopped else self._held()))

    def end(self, tokens: Sequence[int]) -> str:
        """What is left to tell when these are all tokens."""
        if not self.stopped:
            whole = self._decode(list(tokens))
            at = stop_at(whole, self._stop)
            self._text, self.stopped = whole[:at], at is not None
        return self._tell(len(self._text))

    @property
    def whole(self) -> str:
        """All of the text so far."""
        return self._text

    def _tell(self, end: int) -> str:
        start, self._told = self._told, max(self._told, end)
        return self._text[start : self._told]

    def _held(self) -> int:
        """Characters at the end that a stop string begins with."""
        most = min(self._longest - 1, len(self._text))
        return next((n for n in range(most, 0, -1) if any(stop.startswith(self._text[-n:]) for stop in self._stop if len(stop) > n)), 0)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.batch_decode([tokens], skip_special_tokens=True)[0] if tokens else ""


SHORTEST = 32  # tokens of a prompt that is worth being kept


class Prefixes:
    """Keys and values of prompts that were read, by what they were read under and their tokens. Those unused for longest go first.

    `under` are the gates where keys and values belong to them, and the same for all where they do not.
    """

    def __init__(self, limit: int):
        self.limit, self.size, self.hits = limit, 0, 0  # bytes, bytes, tokens that were not read again
        self._known: OrderedDict[tuple[bytes, bytes], tuple[np.ndarray, Any, int]] = OrderedDict()
        self._starts: dict[tuple[bytes, bytes], list[tuple[bytes, bytes]]] = {}

    def find(self, under: bytes, tokens: Sequence[int]) -> tuple[Any, int] | None:
        """The keys and values of a prompt with the longest common beginning, and how many tokens of it: not the last one."""
        if len(tokens) <= SHORTEST:
            return None
        given = np.asarray(tokens, dtype=np.int64)
        best, length = None, 0
        for key in self._starts.get((under, given[:SHORTEST].tobytes()), ()):
            known = self._known[key][0]
            most = min(len(known), len(given) - 1)
            differs = np.flatnonzero(known[:most] != given[:most])
            common = int(differs[0]) if len(differs) else most
            if common > length:
                best, length = key, common
        if best is None or length < SHORTEST:
            return None
        self._known.move_to_end(best)
        return self._known[best][1], length

    def add(self, under: bytes, tokens: Sequence[int], states: Callable[[], Any]) -> None:
        """Keep what `states` makes, (keys, values) of every layer, unless it is known or too short."""
        given = np.asarray(tokens, dtype=np.int64)
        key = under, given.tobytes()
        if len(given) < SHORTEST or key in self._known or self.limit <= 0:
            return
        made = states()
        size = sum(part.nbytes for layer in made for part in layer)
        if size > self.limit:
            return
        self._known[key] = given, made, size
        self._starts.setdefault((under, given[:SHORTEST].tobytes()), []).append(key)
        self.size += size
        while self.size > self.limit:
            old, (tokens_T, _, gone) = self._known.popitem(last=False)
            start = old[0], tokens_T[:SHORTEST].tobytes()
            self._starts[start].remove(old)
            if not self._starts[start]:
                del self._starts[start]
            self.size -= gone
