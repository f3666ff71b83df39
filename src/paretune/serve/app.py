"""The HTTP server of families: the OpenAI API, where the preference is part of the request.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /v1/models/NAME   GET /health   GET /metrics
    POST /v1/preferences   GET, POST and DELETE /v1/preferences/ID

`make_app` is the Starlette application around one engine, and `serve` runs it under uvicorn until SIGTERM or Ctrl-C, then lets what was
begun come to its end. Errors have the API's shape, with the rule, what was found and the remedy beside the message.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paretune.errors import ConfigError, ParetuneError, nearest, shown
from paretune.policy.family import Family, task_of
from paretune.policy.rollout import token_ids
from paretune.serve.engine import Engine
from paretune.serve.protocol import Asked, Inquiry, NotServed, Served, answer_of, ask, chunk, completion, dumps, inquire, model_card
from paretune.serve.questions import Session, Sessions
from paretune.serve.rows import Piece, Row
from paretune.tasks.base import Task
from paretune.types import Preference, Prompt

__all__ = ["Limits", "load_families", "make_app", "serve"]


@dataclass(frozen=True)
class Limits:
    """What a server takes: bytes of a body, seconds to send one, seconds to take one piece of a stream, seconds to drain; preferences that
    are asked for at a time, and seconds after which one that nobody answers is forgotten."""

    body: int = 4 * 2**20
    receive: float = 30.0
    send: float = 30.0
    drain: float = 60.0
    sessions: int = 64
    idle: float = 1800.0


def load_families(
    paths: Sequence[str | Path],
    *,
    default: str | None = None,
    trust: bool = False,
    model: str | None = None,
    device: Any = None,
    tasks: Sequence[Task] = (),
) -> dict[str, Served]:
    """Saved families, each under the name of its folder. Families of one base model share its weights.

    `default` is the preference of requests without one: even weights, if it is not given. `tasks` score the responses of families with
    the same objectives; else that is the family's own task, where it names one that may be used.
    """
    served: dict[str, Served] = {}
    bases: dict[str, Any] = {}
    for path in map(Path, paths):
        name = path.resolve().name
        if name in served or "@" in name:
            remedy = 'rename the folder: a family is asked for by its name, and "@" begins a preference'
            raise ConfigError("families that are served have names of their own, without @", found=repr(name), remedy=remedy)
        family = Family.load(path, trust=trust, scoring=False, model=model, device=device, bases=bases)
        task = next((task for task in tasks if task.objectives.names == family.objectives.names), None)
        if task is None:
            with contextlib.suppress(ConfigError):  # code that nobody trusts: then no questions are asked
                task = task_of(family.base, trust=trust)
        served[name] = Served(name, family, default_preference(family, default), task=task)
        token_ids(family.policy.tokenizer, Prompt(text="a"))  # it settles how it pads and cuts before several threads use it
    return served


def default_preference(family: Family, given: str | None) -> Preference:
    """The preference of requests that have none."""
    names = family.objectives.names
    return Preference.of(names, [1 / len(names)] * len(names) if given is None else given)


class _Metrics:
    """What Prometheus reads; a registry of its own, so that two servers of one process do not meet."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("paretune_requests", "Requests by their status.", ["path", "status"], **made)
        self.first = Histogram("paretune_time_to_first_token_seconds", "From a request to its first token.", ["family"], **made)
        self.whole = Histogram("paretune_response_seconds", "From a request to its last token.", ["family"], **made)
        tenths = [n / 10 for n in range(11)]
        labels = ["family", "objective"]
        self.weights = Histogram("paretune_preference_weight", "Weights of the preferences asked for.", labels, buckets=tenths, **made)
        for name, what, value in (
            ("paretune_queue_rows", "Responses that wait.", lambda: engine.waiting),
            ("paretune_batch_rows", "Responses that are read or decoded.", lambda: engine.running),
            ("paretune_tokens_per_second", "Of responses, lately, while something is decoded.", lambda: engine.speed),
            ("paretune_response_tokens", "Tokens of responses so far.", lambda: engine.drawn),
            ("paretune_prompt_tokens", "Tokens of prompts so far.", lambda: engine.read),
            (
                "paretune_known_prompt_tokens",
                "Tokens of prompts that were not read again.",
                lambda: sum(lane.prefixes.hits for lane in engine.lanes.values()),
            ),
            ("paretune_kept_prompt_bytes", "Memory of kept prompts.", lambda: sum(lane.prefixes.size for lane in engine.lanes.values())),
        ):
            Gauge(name, what, **made).set_function(value)

    def asked(self, asked: Asked) -> None:
        for objective, weight in (asked.echoed["preference"] or {}).items():
            self.weights.labels(asked.served.name, objective).observe(weight)

    def ended(self, row: Row) -> None:
        now = time.monotonic()
        if row.first is not None:
            self.first.labels(row.family).observe(row.first - row.arrived)
            self.whole.labels(row.family).observe(now - row.arrived)


class _Server:
    """The handlers, and what they share."""

    def __init__(self, models: Mapping[str, Served], engine: Engine, key: str | None, limits: Limits):
        self.models, self.engine, self.limits = dict(models), engine, limits
        self.key = None if key is None else key.encode()
        self.metrics = _Metrics(engine)
        self.sessions = Sessions(limits.sessions, limits.idle)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def post(told: list[tuple[Row, Piece]]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
                loop.call_soon_threadsafe(deliver, told)

        def deliver(told: list[tuple[Row, Piece]]) -> None:
            for row, piece in told:
                row.sink(piece)
                if piece.finish:
                    self.metrics.ended(row)

        self.engine.post = post
        self.engine.start()
        yield
        await anyio.to_thread.run_sync(lambda: self.engine.stop(drain=False))

    async def chat(self, request: Request) -> Response:
        return await self._answer("chat", request)

    async def text(self, request: Request) -> Response:
        return await self._answer("text", request)

    async def all_models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [model_card(served) for served in self.models.values()]})

    async def one_model(self, request: Request) -> Response:
        self._authorize(request)
        name = request.path_params["name"]
        if name not in self.models:
            raise NotServed("a request names a model that is served", found=shown(name), remedy=nearest(shown(name)[1:-1], self.models))
        return JSONResponse(model_card(self.models[name]))

    async def health(self, request: Request) -> Response:
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped", "models": list(self.models)}, 200 if alive else 503)

    async def measured(self, request: Request) -> Response:
        self._authorize(request)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def _authorize(self, request: Request) -> None:
        if self.key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if not (hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.key) and kind.lower() == "bearer"):
            raise _Refused(401, "invalid_api_key", "a request has the server's key", "another key, or none", "Authorization: Bearer KEY")

    async def _answer(self, kind: str, request: Request) -> Response:
        self._authorize(request)
        body = await self._body(request)
        asked = await anyio.to_thread.run_sync(ask, kind, body, self.models, self.engine)
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        for index, row in enumerate(asked.rows):
            row.sink = _into(queue, index)
        self.engine.submit(asked.rows)
        self.metrics.asked(asked)
        gone = asyncio.ensure_future(_disconnected(request))
        kept = False
        try:
            if not asked.stream:
                return await self._whole(asked, queue, gone)
            first = await _next(queue, gone)
            _raise_error(first[1])
            kept = True
            return EventSourceResponse(
                self._events(asked, queue, first), sep="\n", send_timeout=self.limits.send, ping=15, headers={"x-request-id": asked.id}
            )
        finally:
            gone.cancel()
            if not kept:
                self.engine.cancel([row for row in asked.rows if not row.ended])

    async def begin(self, request: Request) -> Response:
        """Draw and score what questions are made of, and ask the first."""
        self._authorize(request)
        body = await self._body(request)
        inquiry = await anyio.to_thread.run_sync(inquire, body, self.models, self.engine)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            session = await self.inquired(inquiry, gone)
        finally:
            gone.cancel()
        return await _state(session, 201)

    async def inquired(self, inquiry: Inquiry, gone: asyncio.Future[None]) -> Session:
        """A session with its first question; the rows are dropped where nobody waits for them any more."""
        with self.sessions.room():
            queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
            for index, row in enumerate(inquiry.rows):
                row.sink = _into(queue, index)
            self.engine.submit(inquiry.rows)
            try:
                pieces = await _ends(len(inquiry.rows), queue, gone)
            finally:
                self.engine.cancel([row for row in inquiry.rows if not row.ended])
            return self.sessions.add(await anyio.to_thread.run_sync(Session, inquiry, [piece.text for piece in pieces]))

    async def answered(self, request: Request) -> Response:
        """The state of a session: as it is, or after one more answer."""
        self._authorize(request)
        session = self.sessions.get(request.path_params["id"])
        if request.method == "POST":
            number, chosen = answer_of(await self._body(request))
            await anyio.to_thread.run_sync(session.answer, number, chosen)
        return await _state(session, 200)

    async def forgotten(self, request: Request) -> Response:
        self._authorize(request)
        name = request.path_params["id"]
        self.sessions.drop(name)
        return JSONResponse({"id": name, "object": "preference.deleted", "deleted": True})

    async def _whole(self, asked: Asked, queue: asyncio.Queue[tuple[int, Piece]], gone: asyncio.Future[None]) -> Response:
        pieces = await _ends(len(asked.rows), queue, gone)
        finishes = [piece.finish or "" for piece in pieces]
        made = await anyio.to_thread.run_sync(
            completion, asked, [piece.text for piece in pieces], [piece.spoken for piece in pieces], finishes
        )
        return Response(dumps(made), media_type="application/json", headers={"x-request-id": asked.id})

    async def _events(
        self, asked: Asked, queue: asyncio.Queue[tuple[int, Piece]], first: tuple[int, Piece]
    ) -> AsyncIterator[dict[str, str]]:
        """The pieces of a stream as they come; rows that nobody listens to any more are cancelled."""
        try:
            for index in range(len(asked.rows)):
                if asked.kind == "chat" or index == 0:
                    yield {"data": dumps(chunk(asked, index, opens=True))}
            left, (index, piece) = len(asked.rows), first
            while True:
                if piece.error is not None or piece.finish == "cancelled":
                    yield {"data": dumps(_error_body(piece.error or _stopped())[1])}
                    return
                if piece.text or piece.spoken:
                    yield {"data": dumps(chunk(asked, index, piece.text, piece.spoken))}
                if piece.finish:
                    yield {"data": dumps(chunk(asked, index, finish=piece.finish))}
                    left -= 1
                if not left:
                    break
                index, piece = await queue.get()
            if asked.usage:
                yield {"data": dumps(chunk(asked, None))}
            yield {"data": "[DONE]"}
        finally:
            self.engine.cancel([row for row in asked.rows if not row.ended])

    async def _body(self, request: Request) -> Any:
        """The body as JSON, of bounded size and in bounded time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise _Refused(415, None, "a body is JSON", f"content-type {kind or 'none'}", "send content-type: application/json")
        most, data = self.limits.body, bytearray()
        large = _Refused(413, None, f"a body has at most {most} bytes", "a larger one", "send less at once")
        with contextlib.suppress(ValueError):
            if int(request.headers.get("content-length", 0)) > most:
                raise large
        try:
            async with asyncio.timeout(self.limits.receive):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise large
        except TimeoutError:
            found, remedy = f"{len(data)} bytes in {self.limits.receive:g} s", "send it faster"
            raise _Refused(408, None, "a body comes in time", found, remedy) from None
        try:
            return json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _Refused(400, None, "a body is JSON in UTF-8", shown(str(error)), "write it with a JSON library") from None


class _Told(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._ready()


class _Refused(ConfigError):
    """An error of the protocol itself, with its status."""

    def __init__(self, status: int, code: str | None, rule: str, found: str, remedy: str):
        super().__init__(rule, found=found, remedy=remedy)
        self.status, self.code = status, code


def _stopped() -> ParetuneError:
    return ParetuneError("a response comes to its end", found="the server stops", remedy="ask again later")


def _into(queue: asyncio.Queue[tuple[int, Piece]], index: int) -> Callable[[Piece], None]:
    return lambda piece: queue.put_nowait((index, piece))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next(queue: asyncio.Queue[tuple[int, Piece]], gone: asyncio.Future[None]) -> tuple[int, Piece]:
    """What comes next; ClientDisconnect where nobody waits for it any more."""
    coming = asyncio.ensure_future(queue.get())
    try:
        both: set[asyncio.Future[Any]] = {coming, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if coming.done():
            return coming.result()
        raise ClientDisconnect
    finally:
        coming.cancel()


async def _ends(count: int, queue: asyncio.Queue[tuple[int, Piece]], gone: asyncio.Future[None]) -> list[Piece]:
    """The last piece of every row, in their order."""
    ends: dict[int, Piece] = {}
    while len(ends) < count:
        index, piece = await _next(queue, gone)
        _raise_error(piece)
        ends[index] = piece
    return [ends[index] for index in range(count)]


async def _state(session: Session, status: int) -> Response:
    state = await anyio.to_thread.run_sync(session.state)
    return Response(dumps(state), status, media_type="application/json")


def _raise_error(piece: Piece) -> None:
    if piece.error is not None or piece.finish == "cancelled":
        raise piece.error or _stopped()


def _error_body(error: ParetuneError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """The status, the body in OpenAI's shape, and headers. An error of the protocol says its `status` and `code`."""
    wrong = isinstance(error, ConfigError)
    too_long = "context_length_exceeded" if wrong and "positions" in error.rule else None
    status, code = getattr(error, "status", 400 if wrong else 500), getattr(error, "code", too_long)
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    if status == 429:
        headers["retry-after"] = str(getattr(error, "retry_after", 1))
    param = str(error.place[0]) if error.place else None
    parts = {"rule": error.rule, "found": error.found, "remedy": error.remedy}
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": code, **parts}}, headers


def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        known = {404: ("a path that is served", "docs/serving.md lists them"), 405: ("a method that the path has", "POST, or GET")}
        rule, remedy = known.get(error.status_code, ("a request that can be answered", "see docs/serving.md"))
        error = _Refused(error.status_code, None, f"a request has {rule}", f"{request.method} {request.url.path}"[:200], remedy)
    if not isinstance(error, ParetuneError):
        error = ParetuneError("a request is answered", found=type(error).__name__, remedy="look at the server's log")
    status, body, headers = _error_body(error)
    return Response(dumps(body), status, media_type="application/json", headers=headers)


def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


class _Counted:
    """Counts requests by their path and status."""

    def __init__(self, app: Any, metrics: _Metrics, paths: frozenset[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


def make_app(models: Mapping[str, Served], engine: Engine, *, key: str | None = None, limits: Limits | None = None) -> Starlette:
    """The application. The engine runs from its start to its end."""
    server = _Server(models, engine, key, limits or Limits())
    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.text, methods=["POST"]),
        Route("/v1/models", server.all_models, methods=["GET"]),
        Route("/v1/models/{name:path}", server.one_model, methods=["GET"]),
        Route("/v1/preferences", server.begin, methods=["POST"]),
        Route("/v1/preferences/{id}", server.answered, methods=["GET", "POST"]),
        Route("/v1/preferences/{id}", server.forgotten, methods=["DELETE"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.measured, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {ClientDisconnect: _on_gone, ParetuneError: _on_error, HTTPException: _on_error, Exception: _on_error}
    app = Starlette(routes=routes, lifespan=server.lifespan, exception_handlers=handlers)
    app.state.server = server
    app.add_middleware(_Counted, metrics=server.metrics, paths=frozenset(route.path for route in routes))
    return app


def serve(
    models: Mapping[str, Served],
    engine: Engine,
    *,
    host: str,
    port: int,
    key: str | None = None,
    limits: Limits | None = None,
    ready: Callable[[str], None] = lambda url: None,
    more: Callable[[Starlette], None] = lambda app: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let what was begun come to its end. `ready` is called with the address, and `more` may mount
    other pages in the application."""
    limits = limits or Limits()
    app = make_app(models, engine, key=key, limits=limits)
    more(app)
    AppStatus.disable_automatic_graceful_drain()  # streams go on to their end: the server waits for them
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=int(limits.drain), timeout_keep_alive=30, server_header=False
    )
    with _listening(host, port) as listening:
        family = "[{}]" if ":" in host else "{}"
        server = _Told(config, lambda: ready(f"http://{family.format(host)}:{listening.getsockname()[1]}"))
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises what it has caught again, when all is done
        try:
            server.run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    except OSError as error:
        remedy = "choose another --port (0 is any that is free), or --host"
        raise ConfigError("a server listens at an address that is free", found=f"{host}:{port}: {error.strerror}", remedy=remedy) from error
