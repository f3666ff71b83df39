"""Preference elicitation for clients: sessions in which questions are asked and answered, few of them, and none for ever.

inquiry = inquire(body, models, engine)                # serve.protocol
with sessions.room():                                  # before its responses are drawn
    session = sessions.add(Session(inquiry, texts))    # the text of every row
session.answer(1, 0)
session.state()
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from paretune.errors import ConfigError, ParetuneError
from paretune.evaluation.elicit import TIE, Elicitation, hundredths, pool_of
from paretune.serve.protocol import Inquiry
from paretune.types import last_words, spelled

__all__ = ["NoSession", "OutOfTurn", "Session", "Sessions", "TooMany"]

SIGNS = {0: "1", 1: "2", TIE: "="}


class NoSession(ConfigError):
    """No such session, or none any more."""

    status, code = 404, "preference_not_found"


class OutOfTurn(ConfigError):
    """An answer to a question that is not open."""

    status, code = 409, "out_of_turn"


class TooMany(ParetuneError):
    """As many sessions as may be; `retry_after` are seconds until the next one may have expired."""

    status, code, retry_after = 429, "too_many_preferences", 1


class Session:
    """Questions to one preference: the one that is open, and what is known after the answers so far.

    An answer names its question, so that one that is sent twice counts once.
    """

    def __init__(self, inquiry: Inquiry, texts: Sequence[str]):
        self.id, self.created, self.used = secrets.token_hex(12), int(time.time()), time.monotonic()
        self.inquiry, self.names = inquiry, inquiry.served.family.objectives.names
        count = len(inquiry.prompts)
        assert inquiry.served.task is not None
        with inquiry.served.scoring:
            self.pool = pool_of(
                inquiry.served.task, inquiry.prompts, [texts[start : start + count] for start in range(0, len(texts), count)]
            )
        self._asking = Elicitation(self.pool.rewards_NM, self.pool.prompt_N, seed=inquiry.seed)
        self._lock = threading.Lock()
        self._open = self._asking.ask()

    @property
    def done(self) -> bool:
        """Whether it has asked as often as it may, or no more is at stake than it was told to ignore."""
        told = len(self._asking.answers)
        return told > 0 and (told >= self.inquiry.questions or self._asking.regret <= self.inquiry.enough)

    def answer(self, number: int, chosen: int) -> None:
        """Answer the open question by its number, from 1. The last answer may come again; OutOfTurn for any other number."""
        with self._lock:
            answers = self._asking.answers
            if number == len(answers) and answers and answers[-1][1] == chosen:
                return
            if self.done or number != len(answers) + 1:
                found = f"question {number}, where {len(answers)} are answered" + (" and no more is asked" if self.done else "")
                remedy = "ask anew" if self.done else f"answer question {len(answers) + 1}"
                raise OutOfTurn("an answer is to the question that is open", found=found, remedy=remedy)
            self._asking.answer(self._open, chosen)
            if not self.done:
                self._open = self._asking.ask()

    def state(self) -> dict[str, Any]:
        """As JSON: the open question, and the preference with its 95 % intervals and what more questions could still gain."""
        with self._lock:
            found, paste = self._asking.to_json(), hundredths(self._asking.weights.tolist())
            told = [SIGNS[each["chosen"]] for each in found["answers"]]
            question = None
            if not self.done:
                asked, options = self.pool.prompts[self._open.prompt], [self.pool.responses_N[row] for row in self._open.options]
                question = {"number": len(told) + 1, "prompt": last_words(asked.raw), "options": options}
            known = {"preference": paste, "low": found["low"], "high": found["high"]}
            return {
                "id": self.id,
                "object": "preference",
                "created": self.created,
                "model": self.inquiry.served.name,
                "question": question,
                "answers": told,
                "regret": found["regret"],
                "unscored": self._asking.unscored,
                **{name: dict(zip(self.names, values, strict=True)) for name, values in known.items()},
                "paste": spelled(self.names, paste),
            }


class Sessions:
    """At most so many at a time; those that nobody has used for `idle` seconds are gone."""

    def __init__(self, most: int, idle: float):
        self.most, self.idle = most, idle
        self._known: dict[str, Session] = {}
        self._coming = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Keep a place for a session that is being made; TooMany where there is none."""
        with self._lock:
            self._expire()
            if len(self._known) + self._coming >= self.most:
                full = TooMany(
                    f"at most {self.most} preferences are asked for at a time",
                    found=f"{len(self._known) + self._coming}",
                    remedy="ask again later; DELETE one that has ended",
                )
                eldest = min((session.used for session in self._known.values()), default=time.monotonic())
                full.retry_after = int(max(1, min(3600, eldest + self.idle - time.monotonic())))
                raise full
            self._coming += 1
        try:
            yield
        finally:
            with self._lock:
                self._coming -= 1

    def add(self, session: Session) -> Session:
        """Keep a session, within `room`."""
        with self._lock:
            self._known[session.id] = session
        return session

    def get(self, name: str) -> Session:
        """A session by its id; NoSession where there is none, or none any more."""
        with self._lock:
            self._expire()
            if name not in self._known:
                remedy = "POST /v1/preferences begins one"
                raise NoSession("a preference is asked for under an id that is known", found="another id, or an expired one", remedy=remedy)
            self._known[name].used = time.monotonic()
            return self._known[name]

    def drop(self, name: str) -> None:
        """Forget a session."""
        self.get(name)
        with self._lock:
            self._known.pop(name, None)

    def _expire(self) -> None:
        late = time.monotonic() - self.idle
        self._known = {name: session for name, session in self._known.items() if session.used >= late}
