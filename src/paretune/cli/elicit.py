"""`paretune elicit`: questions to your preference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretune.cli.common import Json, Plugins, Trust, app, examples, plug, print_json, say, show_table, tell
from paretune.cli.family import Base, FamilyName, PromptFile, Raw, System, requests_of, task_that_scores
from paretune.cli.places import find_family
from paretune.errors import ConfigError
from paretune.policy.card import read_card
from paretune.progress import Heartbeat
from paretune.types import last_words, spelled

if TYPE_CHECKING:
    from paretune.evaluation.elicit import Elicitation, Pool, Question

__all__ = ["elicit"]

ANSWERS = {"1": 0, "a": 0, "2": 1, "b": 1, "=": -1, "0": -1}


@app.command(
    **examples(
        "paretune elicit FAMILY --recipe recipe.yaml",
        "paretune elicit FAMILY --recipe recipe.yaml --file questions.jsonl --questions 20",
    )
)
def elicit(
    family: FamilyName,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts to compare responses to.", metavar="PROMPT...")] = None,
    file: PromptFile = None,
    recipe: Annotated[Path | None, typer.Option(help="The family's recipe: its rewards say what responses differ in.")] = None,
    questions: Annotated[int, typer.Option(min=1, max=200, help="Ask at most so many.")] = 10,
    enough: Annotated[float, typer.Option(min=0.0, max=1.0, help="Stop when no more than this share of the gain is at stake.")] = 0.01,
    each: Annotated[int, typer.Option(min=2, max=200, help="Responses drawn for each prompt, at as many preferences.")] = 24,
    seed: Annotated[int, typer.Option(help="The same seed and answers give the same questions.")] = 0,
    system: System = None,
    raw: Raw = False,
    trust: Trust = False,
    model: Base = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Find your preference by comparing responses: two at a time, which is better?

    Answer 1, 2 or = (no difference), and q to stop. Without a terminal, answers are read from stdin, one per line.
    """
    family = find_family(family)
    read_card(family)
    given = requests_of(prompts, file)
    from paretune.evaluation.elicit import PROMPTS, Elicitation, draw_pool
    from paretune.policy.family import Family

    plug(plugin)
    with Heartbeat("elicit"):
        loaded = Family.load(family, trust=trust, scoring=recipe is None, model=model)
        task = task_that_scores(loaded, recipe, trust)
        if task is None:
            raise ConfigError(
                "responses are scored to choose questions", found="a family without its task", remedy="give --recipe, its recipe"
            )
        asked = loaded.prompts(given, system=system, raw=raw) if given else list(task.prompts("test"))[:PROMPTS]
        pool = draw_pool(task, loaded, asked, each=each, seed=seed)
    asking = Elicitation(pool.rewards_NM, pool.prompt_N, seed=seed)
    if asking.unscored:
        say(f"responses that an objective could not score, left out: {asking.unscored}")
    show = say if as_json else tell
    for number in range(1, questions + 1):
        question = asking.ask()
        show(_shown(pool, question, number, questions))
        chosen = _answer()
        if chosen is None:
            break
        asking.answer(question, chosen)
        if asking.regret <= enough:
            break
    _tell(asking, loaded.objectives.names, as_json=as_json)


def _shown(pool: Pool, question: Question, number: int, of: int) -> str:
    asked = last_words(pool.prompts[question.prompt].raw)
    first, second = (pool.responses_N[row] for row in question.options)
    return f"=== question {number} of at most {of}: {asked}\n--- 1\n{first}\n--- 2\n{second}"


def _answer() -> int | None:
    """What is typed: a place, TIE, or None to stop; asked again until it is one of these."""
    while True:
        print("better: 1, 2, = or q? ", end="", file=sys.stderr, flush=True)
        typed = sys.stdin.readline()
        text = typed.strip().lower()
        if not typed or text == "q":
            return None
        if text in ANSWERS:
            return ANSWERS[text]
        say(f"{text!r} is no answer")


def _tell(asking: Elicitation, names: tuple[str, ...], *, as_json: bool) -> None:
    """The preference, how sure it is, and a line to paste."""
    from paretune.evaluation.elicit import hundredths
    from paretune.report.tables import Column, Table

    found = asking.to_json()
    paste = spelled(names, hundredths(found["weights"]))
    if as_json:
        print_json({"objectives": list(names), "preference": paste, **found})
        return
    rows = [
        {"objective": name, "weight": w, "between": f"{low:.2f} and {high:.2f}"}
        for name, w, low, high in zip(names, found["weights"], found["low"], found["high"], strict=True)
    ]
    columns = (Column("objective", "objective", "text"), Column("weight", "weight"), Column("between", "95 % between", "text"))
    show_table(Table("preference", columns, rows), title=f"After {len(asking.answers)} answers")
    tell(f"more questions could gain you at most {asking.regret:.3f} of what the right preference gains")
    tell(f"--preference {paste}")
