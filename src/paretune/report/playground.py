"""The playground: a page on which families are tried, mounted in the application of their server. It needs Gradio (extra `playground`).

    app = make_app(models, engine)               # serve.app
    mount(app, {"family": Path("families/family")})

One prompt is answered at up to five preferences, as five rows of one batch of the server's own engine. The page loads nothing from another
host, and everything under its path asks for the server's key, as HTTP's basic authentication has it: any user, the key as password.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse

from paretune.errors import ConfigError, ParetuneError
from paretune.evaluation.elicit import hundredths
from paretune.evaluation.explain import explain
from paretune.policy.card import read_card
from paretune.report.drawing import template
from paretune.report.family import Fitted, front_picture
from paretune.report.looks import COLORS, looks_by_place
from paretune.report.page import colored
from paretune.runs.recipes.measured import read_measured, said_of
from paretune.serve.protocol import Asked, Served, ask, inquire
from paretune.serve.rows import Piece, Row
from paretune.types import Preference, spelled

__all__ = ["PATH", "mount"]

PATH = "/playground"
MOST = 5  # preferences side by side
SETTLED = 0.25  # seconds after which a slider that moved is taken to rest
OFTEN = 0.08  # seconds between two looks at answers that grow
NEEDED = ("config", "info", "theme.css", "favicon.ico", "startup-events", "reset", "cancel", "app_id", "queue/join", "queue/data")
FOLDERS = ("assets/", "static/", "svelte/", "heartbeat/")  # with NEEDED, what the page uses of Gradio: no uploads, files or proxies

# Moving one slider rescales the others, in hundredths that sum to 1. It stays as it is: it may have moved on.
SIMPLEX = """(...given) => {
  const stays = {__type__: "update"};
  const k = %d, now = given.map(Number), rest = 100 - Math.round(100 * now[k]);
  const others = now.map((w, j) => j === k ? 0 : w), sum = others.reduce((a, b) => a + b, 0), count = now.length - 1;
  const exact = now.map((w, j) => j === k ? 0 : sum > 0 ? rest * w / sum : rest / count), whole = exact.map(Math.floor);
  const order = exact.map((v, j) => j).filter((j) => j !== k).sort((a, b) => (exact[b] - whole[b]) - (exact[a] - whole[a]));
  const left = rest - whole.reduce((a, b) => a + b, 0);
  for (let n = 0; n < left; n++) whole[order[n %% count]] += 1;
  return whole.map((v, j) => j === k ? stays : v / 100);
}"""


def mount(app: Starlette, folders: Mapping[str, Path]) -> None:
    """Put the playground under PATH of a server's application. `folders` are those of the families, with what was measured of them."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    server = app.state.server
    with gradio.Blocks(title="Paretune playground", analytics_enabled=False, fill_width=True) as blocks:
        pages = [_Page(server, served, _fitted(folders.get(name))) for name, served in server.models.items()]
        if len(pages) == 1:
            pages[0].build()
        else:
            with gradio.Tabs():
                for page in pages:
                    with gradio.Tab(page.served.name):
                        page.build()
    blocks.queue(api_open=False, max_size=server.engine.queue, default_concurrency_limit=None)
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    css = template("playground.css.j2").render(colors=COLORS)
    plain: dict[str, Any] = {"ssr_mode": False, "run_history": False, "mcp_server": False, "pwa": False, "enable_monitoring": False}
    gradio.mount_gradio_app(app, blocks, PATH, theme=theme, css=css, footer_links=[], max_file_size=1, **plain)  # type: ignore[arg-type]
    mounted: Any = app.router.routes[-1]
    mounted.app = _Gate(mounted.app, server.key, server.limits.body)


def _fitted(folder: Path | None) -> Fitted | None:
    found = None if folder is None else read_measured(folder)
    return Fitted(folder, read_card(folder), found) if folder and found else None


class _Gate:
    """Lets through what the page needs of Gradio, to those who have the key."""

    def __init__(self, app: Any, key: bytes | None, most: int):
        self.app, self.key, self.most = app, key, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"content-length")}
            path = scope["path"][len(scope.get("root_path", "")) :].strip("/").removeprefix("gradio_api/")
            if not self._known(headers.get(b"authorization", b"")):
                more = {"www-authenticate": 'Basic realm="any user, the key of the server as password", charset="UTF-8"'}
                await PlainTextResponse("the password is the server's key", 401, headers=more)(scope, receive, send)
            elif path and path not in NEEDED and not path.startswith(FOLDERS):
                await PlainTextResponse("the page does not need this", 404)(scope, receive, send)
            elif scope["method"] == "POST" and not 0 <= int(headers.get(b"content-length", b"-1")) <= self.most:
                await PlainTextResponse("too much at once", 413)(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    def _known(self, given: bytes) -> bool:
        if self.key is None:
            return True
        kind, _, packed = given.partition(b" ")
        password = b""
        with contextlib.suppress(binascii.Error, ValueError):
            password = base64.b64decode(packed.strip(), validate=True).partition(b":")[2]
        return hmac.compare_digest(password, self.key) and kind.lower() == b"basic"


class _Page:
    """What is shown of one family, and what its buttons do."""

    def __init__(self, server: Any, served: Served, fitted: Fitted | None):
        self.server, self.served, self.fitted = server, served, fitted
        self.family, self.names = served.family, served.family.objectives.names
        self.looks = looks_by_place(self.names)

    # What is shown

    def build(self) -> None:
        """Make the components, within a Blocks."""
        import gradio

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        flying = gradio.State(dict)
        with gradio.Row():
            with gradio.Column(scale=3, min_width=300):
                label = "What do you want to ask?" if self.family.chat else "A prompt, as the family was trained on it"
                prompt = gradio.Textbox(label=label, lines=2, max_lines=8, elem_classes="pt-prompt", submit_btn="Answer")
                sliders = [
                    gradio.Slider(0, 1, value=w, step=0.01, label=name, elem_classes="pt-slider", buttons=[])
                    for name, w in zip(self.names, self.served.default.weights, strict=True)
                ]
                known = {
                    said_of(w_M, self.names): list(w_M) for w_M in (*np.eye(len(self.names)), np.full(len(self.names), 1 / len(self.names)))
                }
                beside = gradio.Dropdown(
                    [*known],
                    value=[*known][: min(2, MOST - 1)],
                    multiselect=True,
                    max_choices=MOST - 1,
                    allow_custom_value=True,
                    label="Beside yours",
                    info=f"Up to {MOST - 1} more; others are typed, such as {self._paste([1 / len(self.names)] * len(self.names))}",
                )
                with gradio.Accordion("Sampling", open=False):
                    temperature = gradio.Slider(
                        0, 2, value=0, step=0.1, label="Temperature", info="0 says the most likely token", buttons=[]
                    )
                    longest = gradio.Slider(
                        1, 512, value=self.family.max_new_tokens or 64, step=1, label="Longest answer, tokens", buttons=[]
                    )
                    seed = gradio.Number(0, label="Seed", precision=0)
            with gradio.Column(scale=2, min_width=300):
                front = gradio.HTML(self._front(list(self.served.default.weights)), elem_classes="pt-front")
        with gradio.Tab("Answers"):
            answers = gradio.HTML(self._cards([]), elem_classes="pt-answers")
            with gradio.Row():
                keep = gradio.Button("Keep this preference beside", size="sm")
                why = gradio.Button("Color the tokens", size="sm")
        with gradio.Tab("Ten questions"):
            self._questions(sliders, gradio.on, answers, front, quiet)
        self._known = known
        asked = [flying, prompt, beside, temperature, longest, seed, *sliders]
        self._refresh = dict(
            fn=self._moved, inputs=asked, outputs=[answers, front], concurrency_limit=None, trigger_mode="multiple", **quiet
        )
        gradio.on([prompt.submit], self._answers, asked, answers, concurrency_limit=None, trigger_mode="multiple", **quiet)
        for k, slider in enumerate(sliders):
            slider.input(None, sliders, sliders, js=SIMPLEX % k, queue=False, trigger_mode="multiple", **quiet).then(**self._refresh)
        self._set.click(self._found, [self._session], sliders, **quiet).then(**self._refresh)
        keep.click(self._kept, [beside, *sliders], beside, **quiet)
        why.click(self._why, [flying], answers, concurrency_limit=1, **quiet)

    def _questions(self, sliders: Sequence[Any], on: Any, answers: Any, front: Any, quiet: dict[str, Any]) -> None:
        import gradio

        if self.served.task is None:
            remedy = "Serve it with --recipe, the recipe that it was fitted from."
            gradio.HTML(
                f'<p class="pt-note">Questions are made of responses that are scored, and this family does not say how. {remedy}</p>'
            )
        able = self.served.task is not None
        self._session = session = gradio.State("")
        own = gradio.Textbox(
            label="Prompts of your own, one in each line", lines=2, visible=able, placeholder="Else test prompts of its task"
        )
        begin = gradio.Button("Begin", variant="primary", visible=able)
        shown = gradio.HTML("", elem_classes="pt-question")
        with gradio.Row(elem_classes="pt-choices"):
            chosen = [
                gradio.Button(text, interactive=False, visible=able) for text in ("Left is better", "No difference", "Right is better")
            ]
        known = gradio.HTML("", elem_classes="pt-known")
        paste = gradio.Textbox(label="To paste", interactive=False, visible=False, buttons=["copy"], elem_classes="pt-paste")
        self._set = gradio.Button("Set the sliders to it", visible=False)
        outputs = [session, shown, known, paste, self._set, *chosen]
        begin.click(self._begin, [own], outputs, concurrency_limit=None, **{**quiet, "show_progress": "minimal"})
        for button, place in zip(chosen, (0, -1, 1), strict=True):
            button.click(partial(self._chosen, place), [session], outputs, concurrency_limit=None, **quiet)

    # Answers

    async def _moved(self, flying: dict[str, Any], prompt: str, *given: Any) -> AsyncIterator[tuple[Any, Any]]:
        """After a slider has moved: where it is now, and the answers there, once it rests."""
        import gradio

        turn = flying["turn"] = flying.get("turn", 0) + 1
        weights = list(given[-len(self.names) :])
        await asyncio.sleep(SETTLED)
        if flying["turn"] != turn:
            yield gradio.skip(), gradio.skip()
            return
        yield gradio.skip(), await anyio.to_thread.run_sync(self._front, weights)
        if prompt.strip():
            async for shown in self._answers(flying, prompt, *given):
                yield shown, gradio.skip()

    async def _answers(
        self, flying: dict[str, Any], prompt: str, beside: list[str], temperature: float, longest: int, seed: float, *weights: float
    ) -> AsyncIterator[str]:
        """The answers as they grow; those that were asked for before are dropped."""
        engine = self.server.engine
        turn = flying["turn"] = flying.get("turn", 0) + 1
        engine.cancel(flying.get("rows", []))
        with self._told():
            asked = await anyio.to_thread.run_sync(self._asked, prompt, beside, temperature, longest, seed, weights)
            rows, queue = [each.rows[0] for each in asked], asyncio.Queue[tuple[int, Piece]]()
            for index, row in enumerate(rows):
                row.sink = lambda piece, index=index: queue.put_nowait((index, piece))  # type: ignore[misc]
            flying["rows"], flying["asked"] = rows, asked
            engine.submit(rows)
            for each in asked:
                self.server.metrics.asked(each)
            texts, ends = [""] * len(rows), [""] * len(rows)
            loop, looked = asyncio.get_running_loop(), 0.0
            try:
                yield self._cards([(each, texts[n], "") for n, each in enumerate(asked)])
                while not all(ends):
                    for index, piece in [await queue.get(), *(queue.get_nowait() for _ in range(queue.qsize()))]:
                        if piece.error is not None:
                            raise piece.error
                        texts[index], ends[index] = texts[index] + piece.text, piece.finish or ""
                    if flying["turn"] != turn:
                        return
                    if all(ends) or loop.time() - looked > OFTEN:
                        looked = loop.time()
                        yield self._cards([(each, texts[n], ends[n]) for n, each in enumerate(asked)])
            finally:
                engine.cancel([row for row in rows if not row.ended])

    def _asked(
        self, prompt: str, beside: list[str], temperature: float, longest: int, seed: float, weights: Sequence[float]
    ) -> list[Asked]:
        """A request at each preference, each once, yours first."""
        wanted = [list(weights), *(self._known.get(text) or text for text in beside or ())]
        preferences = {tuple(Preference.of(self.names, each).weights): None for each in wanted}
        kind, said = ("chat", {"messages": [{"role": "user", "content": prompt}]}) if self.family.chat else ("text", {"prompt": prompt})
        settings = {
            "temperature": temperature,
            "max_tokens": int(longest),
            "seed": int(seed or 0),
            "stream": True,
            "model": self.served.name,
        }
        bodies = [{**said, **settings, "preference": list(each)} for each in list(preferences)[:MOST]]
        return [ask(kind, body, self.server.models, self.server.engine) for body in bodies]

    async def _why(self, flying: dict[str, Any]) -> AsyncIterator[str]:
        """The answers with the tokens in the colors of the experts that moved them, one after the other: each holds the engine up."""
        asked: list[Asked] = flying.get("asked", [])
        if not asked or not all(row.ended for row in flying["rows"]):
            with self._told():
                raise ConfigError("there are answers to explain", found="none that has ended", remedy="ask something first")
        turn, made = flying["turn"], []
        for n, each in enumerate(asked):
            row, weights = each.rows[0], each.echoed["preference"]
            with self._told():
                made.append(await asyncio.wrap_future(self.server.engine.call(partial(_explained, self.family, row, weights))))
            if flying["turn"] != turn:
                return
            yield self._cards([(one, made[m] if m <= n else "", "") for m, one in enumerate(asked)])

    def _kept(self, beside: list[str], *weights: float) -> list[str]:
        return [*dict.fromkeys([*(beside or ()), self._paste(weights)])][-(MOST - 1) :]

    # Questions

    async def _begin(self, own: str) -> list[Any]:
        body: dict[str, Any] = {"model": self.served.name}
        body |= {"prompts": lines} if (lines := [line.strip() for line in own.splitlines() if line.strip()]) else {}
        with self._told():
            inquiry = await anyio.to_thread.run_sync(inquire, body, self.server.models, self.server.engine)
            session = await self.server.inquired(inquiry, asyncio.get_running_loop().create_future())
            return await anyio.to_thread.run_sync(self._asking, session)

    async def _chosen(self, place: int, name: str) -> list[Any]:
        with self._told():
            session = self.server.sessions.get(name)
            number = len(session.state()["answers"]) + 1
            await anyio.to_thread.run_sync(session.answer, number, place)
            return await anyio.to_thread.run_sync(self._asking, session)

    def _found(self, name: str) -> list[float]:
        with self._told():
            return list(self.server.sessions.get(name).state()["preference"].values())

    def _asking(self, session: Any) -> list[Any]:
        """What the tab shows of a session."""
        import gradio

        state = session.state()
        more = {"looks": self.looks, "state": state, "most": session.inquiry.questions}
        able, any_ = state["question"] is not None, bool(state["answers"])
        page = template("playground.html.j2")
        return [
            *(session.id, page.render(part="question", **more), page.render(part="known", **more)),
            gradio.update(value=f"--preference {state['paste']}", visible=any_),
            gradio.update(visible=any_, variant="secondary" if able else "primary"),
            *[gradio.update(interactive=able)] * 3,
        ]

    # Pieces

    @contextlib.contextmanager
    def _told(self) -> Any:
        """What a person can meet is told on the page."""
        import gradio

        try:
            yield
        except ParetuneError as error:
            parts = (f"{error.rule}.", f"Found: {error.found}.", f"What to do: {error.remedy}.")
            raise gradio.Error("<br>".join(map(escape, parts)), title="This cannot be done", print_exception=False) from error

    def _cards(self, cards: Sequence[tuple[Asked, Any, str]]) -> str:
        weights = [each.echoed["preference"] for each, _, _ in cards]
        shown = [(w, said, end) for w, (_, said, end) in zip(weights, cards, strict=True)]
        colors = looks_by_place(self.served.gate_names)
        return template("playground.html.j2").render(part="cards", cards=shown, looks=self.looks, experts=colors)

    def _front(self, weights: Sequence[float]) -> str:
        picture = front_picture(self.fitted, np.asarray(weights, dtype=float)) if self.fitted else None
        return template("playground.html.j2").render(part="front", picture=picture, measured=self.fitted is not None, names=self.names)

    def _paste(self, weights: Sequence[float]) -> str:
        return spelled(self.names, hundredths(weights))


def _explained(family: Any, row: Row, weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """On the engine's thread, whose tensors are made for inference: what is differentiated must not be."""
    import torch

    with torch.inference_mode(False), torch.enable_grad():
        (found,) = explain(family, row.prompt, weights, tokens=row.said)
    return colored(found)
