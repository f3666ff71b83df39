"""Continuous batching: one thread decodes rows of several families, which join and leave between tokens.

    engine = Engine({"family": family})
    engine.start()
    engine.submit([Row("family", prompt, tokens, gates_K, limit=64, sink=print)])
    engine.stop()

A family has a lane: its rows that wait, the prompts that are being read, and the rows that are decoded in one batch, each under gates of
its own. Rows of a mixing that has one gate vector for a whole batch are decoded one vector after the other. Where the cache is not that
of plain attention, a batch is read at once and goes to its end before the next. Between two tokens a lane reads the prompts of some rows
that came, and one piece of a long prompt, so that a long prompt holds nobody up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError, ParetuneError, TrainingError, raised_by
from paretune.policy.family import Family
from paretune.policy.rollout import Decoding, Reading, check_length
from paretune.serve.rows import Piece, Prefixes, Row, Spoken, Text

__all__ = ["Engine", "QueueFull"]

SMALLEST = 16  # tokens of a piece of a long prompt while others wait for their next token
LONG_AT_ONCE = 2  # prompts that are read in pieces at a time, in one lane
DEAD_SHARE = 8  # rows that have ended stay in the batch until they are one in so many, or others join: leaving copies the cache


class QueueFull(ParetuneError):
    """More rows wait than may; `retry_after` are seconds after which it may look better."""

    status, code, retry_after = 429, "queue_full", 1


class Engine:
    """Decodes the rows that are submitted, of all `families`, by name. `post` brings told pieces to those who wait, once per step.

    `rows` are decoded at a time, and `queue` may wait. Prompts longer than `chunk` tokens are read in pieces of that many, or of fewer
    where others are decoded: a piece takes about half as long as a token of theirs. `prefix_bytes` bounds the prompts that are kept for
    others which begin alike.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        *,
        rows: int = 64,
        queue: int = 256,
        chunk: int = 128,
        prefix_bytes: int = 2**28,
        post: Callable[[list[tuple[Row, Piece]]], None] | None = None,
    ):
        self.families, self.most, self.queue, self.chunk = dict(families), rows, queue, chunk
        self.post = post or _hand_over
        self.lanes = {name: _Lane(self, family, prefix_bytes // len(families)) for name, family in self.families.items()}
        self.drawn = self.read = self.steps = 0  # tokens of responses, tokens of prompts, forwards that drew
        self.speed = 0.0  # tokens of responses per second, lately
        self.owed = 0  # tokens that all rows may draw yet
        self.outbox: list[tuple[Row, Piece]] = []
        self._lock = threading.Condition()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._arrived: list[Row] = []
        self._ending = self._dropping = False
        self._thread = threading.Thread(target=self._run, name="paretune-engine", daemon=True)

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    def stop(self, *, drain: bool = True) -> None:
        """Take no more rows and return when those that are there have ended: at their own end, or cancelled now unless `drain`."""
        with self._lock:
            self._ending, self._dropping = True, self._dropping or not drain
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether rows are decoded and taken."""
        return self._thread.is_alive() and not self._ending

    @property
    def waiting(self) -> int:
        """Rows that wait for a place."""
        return len(self._arrived) + sum(len(lane.waiting) for lane in self.lanes.values())

    @property
    def running(self) -> int:
        """Rows that are read or decoded."""
        return sum(lane.busy for lane in self.lanes.values())

    def check(self, row: Row) -> None:
        """ConfigError where a row does not fit its model."""
        policy = self.families[row.family].policy
        check_length(policy, policy.extra_positions + len(row.tokens) + row.limit, row.sampling.temperature)

    def submit(self, rows: Sequence[Row]) -> None:
        """Have all of these decoded, or raise QueueFull and none. Each row's sink is told, on whatever thread `post` chooses."""
        with self._lock:
            if not self.alive:
                raise _stopped("rows go to an engine that runs")
            if self.waiting + len(rows) > self.queue:
                full = QueueFull(
                    "a server has a bounded queue",
                    found=f"{self.waiting} responses wait and {len(rows)} are asked for, where {self.queue} may wait",
                    remedy="ask again later, or serve with a higher --max-queue",
                )
                full.retry_after = int(min(60, max(1, self.owed / self.speed if self.speed else 1)))
                raise full
            self._arrived += rows
            self._lock.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Drop these rows before the next token."""
        with self._lock:
            for row in rows:
                row.cancelled = True
            self._lock.notify()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function on the engine's thread between two tokens: what else uses the model must not run beside it. A future that is
        cancelled before its turn is left out."""
        future: Future[Any] = Future()
        with self._lock:
            if not self.alive:
                raise _stopped("a function runs on an engine that runs")
            self._calls.append((function, future))
            self._lock.notify()
        return future

    def tell(self, row: Row, piece: Piece) -> None:
        """One more piece; the last one ends the row."""
        if not row.ended:
            row.ended = piece.finish is not None
            self.outbox.append((row, piece))

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as held:
                held.enter_context(torch.inference_mode())
                for family in self.families.values():
                    held.enter_context(family.policy.bank.unchanged())
                while self._collect():
                    for lane in self.lanes.values():
                        lane.turn()
                    self._post()
        finally:
            with self._lock:
                self._ending = True
            ended = _broken("the engine's thread has ended")
            for row in [*self._arrived, *(row for lane in self.lanes.values() for row in lane.all())]:
                self.tell(row, Piece(finish="error", error=ended))
            for _, future in self._calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(ended)
            self._post()

    def _collect(self) -> bool:
        """Wait for something to do; whether there is."""
        with self._lock:
            while not (self._arrived or self._calls or self._ending or self.waiting or self.running):
                self._lock.wait()
            arrived, self._arrived = self._arrived, []
            calls = list(self._calls)
            self._calls.clear()
            for row in arrived:
                self.lanes[row.family].waiting.append(row)
            everyone = [row for lane in self.lanes.values() for row in lane.all()]
            self.owed = sum(row.limit - len(row.said) for row in everyone)
            for row in everyone if self._dropping else ():
                row.cancelled = True
        for function, future in calls:
            if not future.set_running_or_notify_cancel():  # who asked has gone; a result for nobody would be an error of this thread
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
        return bool(self.waiting or self.running or calls or not self._ending)

    def _post(self) -> None:
        told, self.outbox = self.outbox, []
        if told:
            self.post(told)


class _Lane:
    """The rows of one family."""

    def __init__(self, engine: Engine, family: Family, prefix_bytes: int):
        self.engine, self.policy = engine, family.policy
        self.tokenizer = family.policy.tokenizer
        self.joins = family.policy.has_plain_cache
        self.eos = frozenset(family.policy.eos_ids)
        self.waiting: deque[Row] = deque()
        self.reading: list[tuple[Reading, list[Row], list[int]]] = []  # with the rows, and of which prompt each is a response
        self.rows: list[Row] = []  # those of the batch, in its order; some may have ended
        self.prefixes = Prefixes(prefix_bytes if self.joins else 0)
        self.vector: bytes | None = None  # of all rows, where the mixing has one for a batch
        self._texts: dict[Row, Text] = {}
        self.seconds = 0.0  # of a token of the batch, lately
        self.reads = 0.0  # tokens of a long prompt per second, lately
        self._new_batch()

    @property
    def busy(self) -> int:
        """Rows that have a place."""
        return sum(not row.ended for row in self.rows) + sum(len(rows) for _, rows, _ in self.reading)

    def all(self) -> list[Row]:
        """Every row that has not ended."""
        return [row for row in (*self.waiting, *(row for _, rows, _ in self.reading for row in rows), *self.rows) if not row.ended]

    def turn(self) -> None:
        """Drop who has gone, read some prompts, and draw a token for every row."""
        self._drop()
        if self.waiting:
            self._admit()
        if self.reading:
            self._read_on()
        if self.rows:
            try:
                self._step()
            except Exception as error:  # of the model, or of memory: these rows are lost, and others are not
                self._fail(self.rows, error)
                self._new_batch()

    def _new_batch(self) -> None:
        self.rows, self._texts = [], {}
        self.decoding = Decoding(self.policy)

    def _drop(self) -> None:
        if any(row.cancelled for row in self.all()):
            for row in self.all():
                if row.cancelled:
                    self.engine.tell(row, Piece(finish="cancelled"))
            self.waiting = deque(row for row in self.waiting if not row.ended)
            for _, rows, places in self.reading:
                kept = [n for n, row in enumerate(rows) if not row.ended]
                rows[:], places[:] = [rows[n] for n in kept], [places[n] for n in kept]
            self.reading = [reading for reading in self.reading if reading[1]]
        if self.rows and all(row.ended for row in self.rows) and not (self.joins and self.reading):
            self._new_batch()

    def _candidates(self) -> list[Row]:
        """The rows that may get a place now, the first one first."""
        going = bool(self.rows or self.reading)
        if going and not self.joins:
            return []
        if self.policy.mixes_per_row:
            return list(self.waiting)
        others = any(row.vector != self.vector for row in self.waiting)
        if going and others:
            return []  # their turn is next
        if not going:
            self.vector = self.waiting[0].vector
        return [row for row in self.waiting if row.vector == self.vector]

    def _admit(self) -> None:
        """Give places to rows that wait: short prompts are read now, together; long ones begin to be read in pieces."""
        free, chunk = self.engine.most - self.engine.running, self.engine.chunk
        room = chunk if self.rows else 4 * chunk  # tokens of short prompts, padded
        taken: list[Row] = []
        batches: dict[bool, dict[tuple[bytes, tuple[int, ...], int], tuple[list[Row], Any]]] = {
            False: {},
            True: {},
        }  # by prompt; known or not
        widest = 0
        for row in self._candidates():
            if len(taken) >= free:
                break
            prompt = row.vector, tuple(row.tokens), 0 if self.joins else id(row)  # each prompt once, where its cache can be repeated
            same = next((r for r in self.reading if r[1] and (r[1][0].vector, tuple(r[1][0].tokens), 0) == prompt), None)
            group = next((batch[prompt] for batch in batches.values() if prompt in batch), None)
            if same or group:
                (same[1] if same else group[0]).append(row)  # type: ignore[index]
                if same:
                    same[2].append(0)
                taken.append(row)
                continue
            known = self.prefixes.find(self._under(row), row.tokens)
            rest = len(row.tokens) - (known[1] if known else 0)
            if self.joins and rest > chunk:
                if len(self.reading) < LONG_AT_ONCE:
                    taken.append(row)
                    try:
                        self._begin([row], [known] if known else None)
                    except Exception as error:
                        self._fail([row], error)
                continue
            wide = max(widest, rest)
            if self.joins and widest and wide * (1 + sum(map(len, batches.values()))) > room:
                break
            widest = wide
            batches[known is not None][prompt] = [row], known
            taken.append(row)
        gone = set(map(id, taken))
        self.waiting = deque(row for row in self.waiting if id(row) not in gone)
        for batch in filter(None, batches.values()):
            self._read_now(list(batch.values()))

    def _under(self, row: Row) -> bytes:
        return row.vector if self.policy.parts_need_gates else b""

    def _begin(self, rows: list[Row], known: list[Any] | None, places: list[int] | None = None, prompts: list[Row] | None = None) -> None:
        """Start a reading; `prompts` are rows with its prompts, by default all."""
        prompts = prompts or rows
        gates_PK = torch.from_numpy(np.stack([row.gates_K for row in prompts])).float()
        reading = Reading(self.policy, [row.tokens for row in prompts], gates_PK, known)
        self.prefixes.hits += sum(length for _, length in known or ())
        self.reading.append((reading, rows, places or list(range(len(rows)))))

    def _read_now(self, groups: list[tuple[list[Row], Any]]) -> None:
        """Read short prompts, each once, and seat their rows. Where that fails, each is tried alone, so that one spoils no other."""
        try:
            rows = [row for group, _ in groups for row in group]
            places = [place for place, (group, _) in enumerate(groups) for _ in group]
            known = None if groups[0][1] is None else [known for _, known in groups]
            self._begin(rows, known, places, [group[0] for group, _ in groups])
            entry = self.reading.pop()
            entry[0].advance()
            self._seat(*entry)
        except Exception as error:
            there = set(map(id, self.rows))  # a row in two places would draw two tokens at a time
            for group, known in groups:
                left = [row for row in group if id(row) not in there]
                if len(groups) == 1:
                    self._fail(left, error)
                elif left:
                    self._read_now([(left, known)])

    def _read_on(self) -> None:
        """One more piece of the prompt that is read in pieces for longest."""
        reading, rows, places = self.reading[0]
        going = any(not row.ended for row in self.rows)
        piece = int(min(self.engine.chunk, max(SMALLEST, self.seconds * self.reads / 2))) if going else self.engine.chunk
        began, before = time.monotonic(), reading.at
        try:
            reading.advance(piece)
            speed = (reading.at - before) / max(time.monotonic() - began, 1e-6)
            self.reads += (0.2 if self.reads else 1.0) * (speed - self.reads)
            if reading.done:
                del self.reading[0]
                self._seat(reading, rows, places)
        except Exception as error:
            self.reading = [entry for entry in self.reading if entry[0] is not reading]
            self._fail(rows, error)

    def _seat(self, reading: Reading, rows: list[Row], places: list[int]) -> None:
        """Rows whose prompts are read join the batch, once the model has seen its last tokens."""
        try:
            self.decoding.advance()
        except Exception as error:  # half of its cache may be written: nothing can be drawn from it any more
            self._fail(self.rows, error)
            self._new_batch()
        firsts = {place: row for row, place in reversed(list(zip(rows, places, strict=True)))}
        for place, row in firsts.items():
            self.prefixes.add(self._under(row), row.tokens, lambda place=place: reading.kept(place))  # type: ignore[misc]
        self.engine.read += sum(len(row.tokens) for row in firsts.values())
        uniforms = [row.uniforms_1T() for row in rows]
        width = max(row.shape[1] for row in uniforms)
        uniforms_NT = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]))) for row in uniforms])
        samplings = [row.sampling for row in rows]
        free = [n for n, row in enumerate(self.rows) if row.ended][: len(rows)] if self.joins else []
        some = len(free)
        if some:
            self.decoding.replace(free, reading, places[:some], uniforms_NT=uniforms_NT[:some], samplings=samplings[:some])
            for slot, row in zip(free, rows, strict=False):
                self._texts.pop(self.rows[slot], None)
                self.rows[slot] = row
        if some < len(rows):
            self.decoding.take(reading, places[some:], uniforms_NT=uniforms_NT[some:], samplings=samplings[some:])
            self.rows += rows[some:]

    def _clear(self) -> None:
        """Let rows that have ended leave the batch."""
        if self.joins and any(row.ended for row in self.rows):
            self.decoding.leave(torch.tensor([row.ended for row in self.rows]))
            self.rows = [row for row in self.rows if not row.ended]
            self._texts = {row: text for row, text in self._texts.items() if not row.ended}

    def _step(self) -> None:
        engine, began = self.engine, time.monotonic()
        dead = sum(row.ended for row in self.rows)
        if dead * DEAD_SHARE >= len(self.rows) and not (self.waiting or self.reading):
            self._clear()
        logits_NV = self.decoding.logits()
        sound_N = logits_NV.amax(1).isfinite().tolist()
        told = self._log_probabilities(logits_NV)
        tokens_N1, _ = self.decoding.step()
        tokens, drawn = tokens_N1[:, 0].tolist(), 0
        if told is not None:
            self._keep(told, tokens)
        for row, token, sound in zip(self.rows, tokens, sound_N, strict=True):
            if row.ended:
                continue
            if not sound:
                found, remedy = "NaN or infinity at these gates", "give gates nearer to those of a preference"
                self._fail([row], ConfigError("the model's predictions are numbers", found=found, remedy=remedy))
                continue
            drawn += 1
            row.said.append(token)
            row.first = row.first or time.monotonic()
            self._hear(row, token)
        if self.joins and (ended := [n for n, row in enumerate(self.rows) if row.ended]):
            self.decoding.rest(ended)
        engine.drawn, engine.steps = engine.drawn + drawn, engine.steps + 1
        seconds = max(time.monotonic() - began, 1e-6)
        engine.speed += 0.1 * (drawn / seconds - engine.speed)
        self.seconds += (0.1 if self.seconds else 1.0) * (seconds - self.seconds)

    def _hear(self, row: Row, token: int) -> None:
        """What a row tells after one more token."""
        text = self._texts.get(row)
        if text is None:
            text = self._texts[row] = Text(self.tokenizer, row.stop)
        finish: str | None
        if token in self.eos or token in text.ends:
            new, finish = text.end(row.said[:-1]), "stop"
        else:
            new = text.add(token) if row.stream or row.stop else ""
            finish = "stop" if text.stopped else "length" if len(row.said) >= row.limit else None
            if finish:
                new += text.end(row.said)
                finish = "stop" if text.stopped else finish
        if finish or (new and row.stream):
            spoken, row.spoken = tuple(row.spoken), []
            self.engine.tell(row, Piece(new if row.stream else text.whole, spoken, finish))

    def _log_probabilities(self, logits_NV: Tensor) -> tuple[list[int], Tensor] | None:
        """The rows that ask for log-probabilities, and those of all tokens in their place."""
        asked = [n for n, row in enumerate(self.rows) if row.logprobs is not None and not row.ended]
        return (asked, logits_NV[asked].log_softmax(1)) if asked else None

    def _keep(self, told: tuple[list[int], Tensor], tokens: list[int]) -> None:
        for n, logp_V in zip(*told, strict=True):
            row, top = self.rows[n], cast(tuple[tuple[int, float], ...], ())
            if row.logprobs:
                best = logp_V.topk(min(row.logprobs, len(logp_V)))
                top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            row.spoken.append(Spoken(tokens[n], float(logp_V[tokens[n]]), top))

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        known = error if isinstance(error, ParetuneError) else _broken(raised_by(error))
        for row in rows:
            self.engine.tell(row, Piece(finish="error", error=known))


def _broken(found: str) -> ParetuneError:
    return TrainingError("the model answers", found=found, remedy="ask again; if it comes again, look at the server's log")


def _stopped(rule: str) -> ParetuneError:
    return TrainingError(rule, found="one that has stopped", remedy="start the server again")


def _hand_over(told: list[tuple[Row, Piece]]) -> None:
    for row, piece in told:
        row.sink(piece)
