"""`paretune chat`: a conversation with a family in the terminal, at a preference that can be changed while you talk."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import OnDevice, Trust, app, device_of, examples, say, show_table, tell
from paretune.cli.places import find_family
from paretune.errors import ConfigError, ParetuneError, nearest, printable
from paretune.policy.card import read_card
from paretune.types import spelled

if TYPE_CHECKING:
    from paretune.policy.family import Family

__all__ = ["chat"]

COMMANDS = {
    "/set": "/set polite=.9,brief=.1   another preference",
    "/compare": "/compare   what would be said at each objective alone, and at your preference",
    "/why": "/why   which expert moved each token of the last answer",
    "/new": "/new   forget the conversation",
    "/help": "/help   this list",
    "/quit": "/quit   end; so does the end of the input",
}


@app.command(**examples("paretune chat FAMILY", "paretune chat FAMILY --preference polite=.7,brief=.3 --temperature .7"))
def chat(
    family: Annotated[Path, typer.Argument(help="A directory that `paretune fit` wrote, or its name as `paretune ls families` prints it.")],
    preference: Annotated[str | None, typer.Option(help="Weights that sum to 1: a=.7,b=.3. Default: even weights.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed and the same words give the same answers.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer. Default: as in training.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    system: Annotated[str | None, typer.Option(help="A system message in place of the training's; '' is none.")] = None,
    device: OnDevice = "auto",
    trust: Trust = False,
    model: Annotated[str | None, typer.Option("--model", help="Where the family's reference model is now, if it has moved.")] = None,
) -> None:
    """Talk with a family in the terminal; /set changes the preference, /why explains, /help lists the commands."""
    family = find_family(family)
    read_card(family)
    from paretune.policy.family import Family
    from paretune.types import Preference

    loaded = Family.load(family, trust=trust, scoring=False, model=model, device=device_of(device))
    names = loaded.objectives.names
    start = Preference.of(names, preference if preference is not None else [1 / len(names)] * len(names))
    settings: dict[str, Any] = {"seed": seed, "max_new_tokens": loaded.longest(max_new_tokens)}
    talk = _Talk(loaded, start, settings, temperature, system)
    say(f"{', '.join(names)}; the preference is {talk.shown()}; /help lists the commands")
    while (line := _read()) is not None and line != "/quit":
        try:
            talk.hear(line)
        except ParetuneError as error:  # a conversation goes on
            say(f"error: {error}")


def _read() -> str | None:
    """The next line that says something; None at the end of the input."""
    with contextlib.suppress(EOFError):
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                return None
            if line.strip():
                return line.strip()
    return None


class _Talk:
    """A conversation, and the preference at which the next answer is given."""

    def __init__(self, family: Family, preference: Any, settings: dict[str, Any], temperature: float, system: str | None):
        self.family, self.preference, self.settings = family, preference, settings
        self.temperature, self.system = temperature, system
        self.history: list[dict[str, str]] = []
        self.said: list[int] = []  # the tokens of the last answer

    def shown(self) -> str:
        return spelled(self.preference.names, self.preference.weights)

    def hear(self, line: str) -> None:
        """A command, or something said."""
        if not line.startswith("/"):
            asked = {"role": "user", "content": line}
            answer = self._answer([*self.history, asked], self.preference, aloud=True)
            self.history += [asked, {"role": "assistant", "content": answer[0]}]
            self.said = answer[1]
            return
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise ConfigError("a line with / is a command", found=name, remedy=nearest(name, COMMANDS))
        getattr(self, f"_{name[1:]}")(rest.strip())

    def _set(self, rest: str) -> None:
        from paretune.types import Preference

        self.preference = Preference.of(self.family.objectives.names, rest)
        say(f"the preference is {self.shown()}")

    def _compare(self, rest: str) -> None:
        from paretune.types import Preference

        names, asked = self.family.objectives.names, self._last()
        for each in [*(Preference.of(names, {name: 1.0}) for name in names), self.preference]:
            label = ", ".join(f"{name}={weight:g}" for name, weight in zip(each.names, each.weights, strict=True) if weight)
            tell(f"[{label}] {self._answer(asked, each, aloud=False)[0]}")

    def _why(self, rest: str) -> None:
        from paretune.evaluation.explain import explain
        from paretune.report.page import token_table

        prompt = self._prompt(self._last())
        (found,) = explain(self.family, prompt, self.preference, tokens=self.said)
        show_table(token_table(found), title=f"nats by which each part raised each token above the reference ({found.how})")

    def _new(self, rest: str) -> None:
        self.history = []
        say("forgotten")

    def _help(self, rest: str) -> None:
        for text in COMMANDS.values():
            say(text)

    def _last(self) -> list[dict[str, str]]:
        """The conversation up to the last answer."""
        if not self.history:
            raise ConfigError("there is an answer to look at", found="nothing was said", remedy="say something first")
        return self.history[:-1]

    def _prompt(self, messages: list[dict[str, str]]) -> Any:
        (prompt,) = self.family.prompts([messages], system=self.system)
        return prompt

    def _answer(self, messages: list[dict[str, str]], preference: Any, *, aloud: bool) -> tuple[str, list[int]]:
        """What the family says, and its tokens; `aloud` prints it while it is said."""
        from paretune.policy.rollout import token_ids
        from paretune.policy.sampling import Sampling
        from paretune.serve.engine import Engine
        from paretune.serve.rows import Piece, Row

        prompt, said = self._prompt(messages), list[Piece]()

        def hear(piece: Piece) -> None:
            said.append(piece)
            if aloud and piece.text:
                sys.stdout.write(printable(piece.text))
                sys.stdout.flush()

        gates_K = self.family.gates(preference.w_M[None], [prompt]).reshape(-1)
        tokens = token_ids(self.family.policy.tokenizer, prompt)
        limit, seed = self.settings["max_new_tokens"], self.settings["seed"]
        sampling = Sampling(temperature=self.temperature)
        row = Row("family", prompt, tokens, gates_K, limit=limit, seed=seed, sampling=sampling, stream=True, sink=hear)
        engine = Engine({"family": self.family}, rows=1, queue=1)
        engine.check(row)
        engine.start()
        engine.submit([row])
        try:
            engine.stop()
        except KeyboardInterrupt:  # an answer that is long enough
            engine.stop(drain=False)
        if aloud:
            typer.echo("")
        if said and said[-1].error is not None:
            raise said[-1].error
        return "".join(piece.text for piece in said), row.said
