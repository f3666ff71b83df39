"""`paretune fit`, `sample`, `export` and `explain`: a policy family from your own model, and what it says, exports and answers for."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import (
    DryRun,
    Json,
    Overrides,
    Plugins,
    Preference,
    Trust,
    app,
    check_writable,
    examples,
    on_ray,
    plug,
    print_json,
    say,
    show_table,
    tell,
)
from paretune.cli.places import find_family
from paretune.errors import ConfigError
from paretune.files import check_new
from paretune.hub import check_push
from paretune.hub import push as to_hub
from paretune.policy.card import check_mixture, found_base, read_card
from paretune.progress import clock
from paretune.types import Objectives, last_words
from paretune.types import Preference as Weights

if TYPE_CHECKING:
    from paretune.policy.family import Family
    from paretune.runs.estimate import Estimate
    from paretune.runs.recipes.recipe import Recipe
    from paretune.tasks.base import Task

__all__ = ["Base", "FamilyName", "PromptFile", "Raw", "System", "explain", "export", "fit", "requests_of", "sample", "task_that_scores"]

System = Annotated[str | None, typer.Option(help="A system message in place of the training's; '' is none.")]
FamilyName = Annotated[Path, typer.Argument(help="A directory that `paretune fit` wrote, or its name as `paretune ls families` prints it.")]
PromptFile = Annotated[Path | None, typer.Option("--file", help="Prompts from a file: its column prompt, or messages (conversations).")]
Raw = Annotated[bool, typer.Option("--raw", help="The prompt as it is, without the chat template.")]
Base = Annotated[str | None, typer.Option("--model", help="Where the family's reference model is now, if it has moved.")]


@app.command(
    **examples(
        "paretune fit recipe.yaml",
        "paretune fit recipe.yaml method=bridge learner.samples=6400 --workers 2",
        "paretune fit recipe.yaml --dry-run",
    )
)
@on_ray
def fit(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: model, prompts, objectives, method, learner.")],
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Worker processes; 0 trains in this one.")] = 0,
    executor: Annotated[str, typer.Option(help="local: as --workers says; ray: a Ray cluster.")] = "local",
    samples: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Responses per preference to measure the result with; 0 does not measure.")
    ] = 32,
    dry_run: DryRun = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Fit one method to your model, prompts and objectives; the result is a policy family on disk."""
    from paretune.runs.recipes.recipe import load_recipe, unused

    plug(plugin)
    plan = load_recipe(recipe, overrides or [])
    from paretune.policy.family import Family
    from paretune.runs.recipes.measured import measure, measured_at
    from paretune.runs.suite import fit as fit_family

    folder, key = _family_folder(plan)
    if dry_run:
        _foretell(plan, samples, workers, as_json=as_json)
        return
    if (folder / "family.json").is_file():
        say(f"this family was fitted before: {folder}")
        family = Family.load(folder, trust=plan.task.trust_remote_code)
    else:
        for reason, count in plan.task.prompt_source.left_out.items():
            say(f"prompts left out, {reason}: {count}")
        for sentence in unused(plan):
            say(sentence)
        say(_estimated(plan, samples, workers, rate=False).line())
        check_new(folder, "a family is saved into a new directory")
        who = None if executor == "local" else executor  # then --workers decides
        given: dict[str, Any] = {"root": plan.root, "seed": plan.seed, "workers": workers, "executor": who}
        drawn = samples * (1 + len(measured_at(plan)))
        family = fit_family(plan.task, plan.method, learner=plan.learner, drawn=drawn, **given)
        family.meta["key"] = key
        family.save(folder)
    from paretune.report.family import findings_of, load_fitted, measured_table, prompts_of, write_fitted

    if samples:
        say(f"measuring {len(measured_at(plan))} preferences, {samples} responses each")
        measure(plan, family, folder, samples=samples)
    page, fitted = write_fitted(folder), load_fitted(folder)
    rows = measured_table(fitted) if samples else None
    if as_json:
        measured = rows.to_json() if rows else None
        print_json({"family": str(folder), "objectives": fitted.names, "measured": measured, "report": str(page)})
        return
    if rows:
        for text in family.meta.get("warnings", {}).values():
            say(f"while it trained: {text}")
        show_table(rows, title=f"Mean scores on {prompts_of(fitted)} ({samples} responses per preference)")
        tell("\n".join(findings_of(fitted)))
    example = _even_weights(family.objectives.names)
    tried = f"paretune sample {shlex.quote(str(folder))} --preference {shlex.quote(example)} {_typed_prompt(plan)}"
    typer.echo(f"page: {page}\n{folder}\ntry it: {tried}")


@app.command(
    **examples(
        'paretune sample FAMILY --preference polite=.7,brief=.3 "My parcel is late."',
        "paretune sample FAMILY --preference brief=1 --file prompts.jsonl --n 4 --json",
    )
)
def sample(
    family: FamilyName,
    preference: Preference,
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.", metavar="PROMPT...")] = None,
    file: PromptFile = None,
    n: Annotated[int, typer.Option("--n", min=1, max=100_000, help="Responses per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response. Default: as in training.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    system: System = None,
    raw: Raw = False,
    trust: Trust = False,
    model: Base = None,
    as_json: Json = False,
) -> None:
    """Sample responses from a policy family at one preference."""
    family, _ = _asked(family, preference, model)
    asked = requests_of(prompts, file)
    if not asked:
        raise ConfigError("there is a prompt to answer", found="no PROMPT and no --file", remedy='add "your prompt"')
    from paretune.policy.family import Family

    loaded = Family.load(family, trust=trust, model=model)
    settings: dict[str, Any] = {"n": n, "seed": seed, "max_new_tokens": max_new_tokens, "temperature": temperature}
    made = loaded.sample(asked, preference, system=system, raw=raw, **settings)
    if as_json:
        print_json([{"prompt": prompt, "responses": texts} for prompt, texts in zip(asked, made, strict=True)])
        return
    for prompt, texts in zip(asked, made, strict=True):
        if len(asked) > 1:
            tell(f"=== {prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)}")
        for place, text in enumerate(texts, start=1):
            if len(asked) > 1 or n > 1:
                tell(f"--- {place} of {n}")
            tell(text)
            if not text.strip():
                say("an empty response: the model ended it with its first token")


@app.command(
    **examples(
        "paretune export FAMILY --preference polite=.7,brief=.3 --out polite-70",
        "paretune export FAMILY --preference brief=1 --out brief-lora --as adapter",
        "paretune export FAMILY --preference brief=1 --out brief --license mit --push me/brief",
    )
)
def export(
    family: FamilyName,
    preference: Preference,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    kind: Annotated[str, typer.Option("--as", help="merged: a whole model; adapter: one plain LoRA; gguf: all, for llama.cpp.")] = "merged",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as the weights are.")] = None,
    license_: Annotated[str | None, typer.Option("--license", help="On the model card: apache-2.0, mit, other.")] = None,
    push: Annotated[str | None, typer.Option(help="Upload it to the Hugging Face hub, too, as OWNER/NAME.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for all to see. Default: private.")] = False,
    trust: Trust = False,
    model: Base = None,
    as_json: Json = False,
) -> None:
    """Write the policy at one preference as a model or adapter that transformers, PEFT and vLLM load."""
    family, card = _asked(family, preference, model)
    check_new(out, "an export is written into a new folder")
    if kind == "gguf":
        from paretune.serve.gguf import export_gguf

        beside = {"--dtype": dtype, "--license": license_, "--push": push, "--public": public or None}
        if given := [name for name, value in beside.items() if value is not None]:
            raise ConfigError("GGUF adapters are float32 files without a card", found=", ".join(given), remedy="leave it out")
        told = export_gguf(family, out, preference, model=model)
        if as_json:
            print_json(told)
        else:
            tell(f"{out}: {len(told['adapters'])} adapters\n{told['command']}")
        return
    check_mixture(card, Weights.of(card["objectives"]["names"], preference).w_M)
    if push is not None:
        check_push(push)
    elif public:
        raise ConfigError("--public goes with --push", found="no --push", remedy="add --push OWNER/NAME, or leave --public out")
    from paretune.serve.export import KINDS, check_request
    from paretune.serve.export import export as write

    check_request(out, kind, dtype, license_, kinds=(*KINDS, "gguf"))
    from paretune.policy.family import Family

    made = write(Family.load(family, trust=trust, model=model), out, preference, kind=kind, dtype=dtype, results=family, license=license_)
    pushed = {} if push is None else {"pushed": to_hub(made.path, push, private=not public)}
    if as_json:
        print_json({**made.to_json(), **pushed})
        return
    limit = made.to_json()["max_lora_rank"]
    served = f"; vLLM: --max-lora-rank {limit}" if limit else "; too high for vLLM, which wants it merged" if made.rank else ""
    tell(f"{made.path}: {made.kind}, {made.dtype}" + (f", rank {made.rank}" if made.rank else "") + served)
    typer.echo(f"how to load it: {made.path / 'README.md'}")
    if pushed:
        tell(f"{'public' if public else 'private unless it was there before'}: {pushed['pushed']}")


@app.command(
    **examples(
        'paretune explain FAMILY "My parcel is late." --preference polite=.7,brief=.3 --samples 0',
        'paretune explain FAMILY "Where is it?" --preference brief=1 --recipe recipe.yaml --html it.html',
    )
)
def explain(
    family: FamilyName,
    prompt: Annotated[str, typer.Argument(help="One prompt; a conversation is the JSON of its messages.")],
    preference: Preference,
    n: Annotated[int, typer.Option("--n", min=1, max=100_000, help="Sampled responses to explain.")] = 1,
    response: Annotated[str | None, typer.Option(help="Explain this response instead of a sampled one.")] = None,
    seed: Annotated[int, typer.Option(help="As for `paretune sample`: the same responses.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response. Default: as in training.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with colored tokens to this file.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The family's recipe: needed to measure returns of your own model.")] = None,
    split: Annotated[str, typer.Option(help="Prompts on which returns are measured: train or test.")] = "train",
    samples: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Responses per preference to measure returns with; 0 does not measure.")
    ] = 256,
    system: System = None,
    raw: Raw = False,
    trust: Trust = False,
    model: Base = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Which expert moved each token, and how each return answers to each weight."""
    family, _ = _asked(family, preference, model)
    split = _split(split)
    check_writable(html, "--html")
    if not prompt:
        raise ConfigError("there is a prompt to answer", found="an empty one", remedy='add "your prompt"')
    from paretune.evaluation.explain import explain as explain_family
    from paretune.evaluation.explain import sensitivity
    from paretune.policy.family import Family
    from paretune.report.page import sensitivity_table, token_table, write_explanation

    plug(plugin)
    loaded = Family.load(family, trust=trust, scoring=recipe is None, model=model)
    settings: dict[str, Any] = {"n": n, "response": response, "seed": seed, "max_new_tokens": max_new_tokens}
    found = explain_family(loaded, prompt, preference, system=system, raw=raw, **settings)
    task = task_that_scores(loaded, recipe, trust) if samples else None
    slopes = sensitivity(task, loaded, preference, split=split, samples=samples, seed=seed) if task else None
    if html is not None:
        write_explanation(html, found, slopes, family=loaded)
        say(f"wrote {html}")
    if as_json:
        print_json({"explanations": [each.to_json() for each in found], "sensitivity": slopes.to_json() if slopes else None})
        return
    for each in found:
        show_table(
            token_table(each), title=f"{each.response!r}: nats by which each part raised each token above the reference ({each.how})"
        )
    if slopes:
        show_table(sensitivity_table(slopes), title=f"Slope of each return towards each objective, {split} prompts")
    elif samples:
        say("returns were not measured: give --recipe, the file that the family was fitted from")


def _asked(given: Path, preference: str, model: str | None) -> tuple[Path, dict[str, Any]]:
    """The family's folder, and what its file says; ConfigError for what can be found wrong without its model."""
    family = find_family(given)
    card = read_card(family)
    known = Objectives(**{key: tuple(value) for key, value in card["objectives"].items()})
    Weights.of(known.names, preference)
    found_base(card["base"], family, model)
    return family, card


def _family_folder(plan: Recipe) -> tuple[Path, str]:
    """Where a recipe's family lies, and its key: the same recipe names the same family, and a name belongs to one."""
    from paretune.registry import describe
    from paretune.types import key_of

    method = describe(plan.method)
    key = key_of({"task": describe(plan.task), "method": method, "learner": describe(plan.learner), "seed": plan.seed})
    folder = plan.root / "families" / (plan.name or f"{method['name']}-{key[:8]}")
    if plan.name and (folder / "family.json").is_file() and read_card(folder)["meta"].get("key") != key:
        found, remedy = f"{folder}, of another recipe or other settings", "choose another name:, or remove that folder"
        raise ConfigError("a name belongs to one family", found=found, remedy=remedy)
    return folder, key


def _estimated(plan: Recipe, samples: int, workers: int, *, rate: bool) -> Estimate:
    from paretune.runs.estimate import estimate
    from paretune.runs.recipes.measured import measured_at

    return estimate(plan, preferences=len(measured_at(plan)), samples=samples, workers=workers, rate=rate)


def _foretell(plan: Recipe, samples: int, workers: int, *, as_json: bool) -> None:
    """What a fit would do and cost; nothing is trained or kept."""
    from paretune.report.tables import Column, Table

    say("estimating; nothing is trained or kept")
    with contextlib.redirect_stdout(sys.stderr):
        found = _estimated(plan, samples, workers, rate=True)
    if as_json:
        print_json(found.to_json())
        return
    counts = (Column("samples", "samples", "count"), Column("tokens", "tokens, at most", "count"))
    columns = (Column("label", "training", "text"), Column("wave", "wave", "count"), Column("state", "state", "text"), *counts)
    rows = [{**vars(one), "wave": one.wave + 1, "state": "done" if one.done else "planned"} for one in found.trainings]
    show_table(Table("trainings", columns, rows), title=f"Trainings of {plan.method.registered_name}, in {plan.root}")
    rate, seconds = found.rate, [found.train_seconds or 0.0, found.measure_seconds or 0.0]
    tell(f"{found.line()}")
    for sentence in plan.task.terms.sentences(plan.task.objectives.names) if plan.task.terms else ():
        tell(f"terms:     {sentence}")
    by = f"{found.workers} workers" if found.workers > 1 else "one process"
    if rate is None:
        tell("time and memory are unknown: a base that several processes share is not tried out in one")
    else:
        tell(f"training:  about {clock(seconds[0])} in {by}")
        tell(f"measuring: about {clock(seconds[1])} for {found.measured:,} responses" if samples else "measuring: left out")
        tell(f"memory:    about {rate.memory / 2**20:,.0f} MiB per process")
    for name in found.judged:
        tell(f"requests:  up to {found.total('samples') + found.measured:,} of {name}, which asks a service")
    if rate is not None:
        tell(f"estimated from {rate.source}")


def _typed_prompt(plan: Recipe) -> str:
    """A test prompt as a shell takes it; a conversation as its JSON would not be read by a person, so that its last words stand for it."""
    text = last_words(plan.task.prompts("test")[0].raw)
    if len(text) > 200 or not text.replace("\n", "").isprintable():
        return '"your prompt"'
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'" if "\n" in text else shlex.quote(text)


def requests_of(prompts: Sequence[str] | None, file: Path | None) -> list[Any]:
    """What a command was asked: the prompts on its line, then those of its file."""
    from paretune.tasks.prompts import read_requests

    return [*(prompts or ()), *(read_requests(file) if file else ())]


def _even_weights(names: Sequence[str]) -> str:
    """`a=.34,b=.33,c=.33`: nearly even, in hundredths, and exactly 1 in sum, so that it can be typed as it stands."""
    even = 100 // len(names)
    return ",".join(f"{name}={(even if k else 100 - even * (len(names) - 1)) / 100:g}" for k, name in enumerate(names))


def task_that_scores(family: Family, recipe: Path | None, trust: bool) -> Task | None:
    """The task that can score responses: named in the family, or of the recipe."""
    from paretune.policy.family import task_of
    from paretune.runs.recipes.recipe import load_recipe

    if recipe is None:
        return task_of(family.base, trust=trust)
    task: Any = load_recipe(recipe, []).task
    if task.objectives.names != family.objectives.names:
        raise ConfigError(
            "a family is measured by the objectives that it was fitted for",
            found=f"{', '.join(task.objectives.names)} in {recipe.name}, {', '.join(family.objectives.names)} in the family",
            remedy="give the recipe that the family was fitted from",
        )
    return task


def _split(split: str) -> str:
    if split not in ("train", "test"):
        raise ConfigError("--split is train or test", found=repr(split), remedy="train prompts are the default")
    return split
