"""`paretune init`, `preview` and `schema`: a recipe from a model and a file of prompts, what it will do, and its JSON schema."""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import Json, Overrides, Plugins, app, check_writable, examples, plug, print_json, say, show_table, tell
from paretune.errors import ConfigError
from paretune.files import disk_errors, write_text

if TYPE_CHECKING:
    from paretune.runs.recipes.preview import Preview

__all__ = ["init", "preview", "schema"]


@app.command(**examples("paretune init ./my-model prompts.jsonl", "paretune init owner/model train.csv --out mine.yaml"))
def init(
    model: Annotated[str, typer.Argument(help="A folder with a model, a GGUF file, or a name on the hub.")],
    prompts: Annotated[Path, typer.Argument(help="A file of prompts: .jsonl, .json, .csv or .parquet.")],
    out: Annotated[Path, typer.Option(help="The recipe to write; a file that is there is kept.")] = Path("recipe.yaml"),
    as_json: Json = False,
) -> None:
    """Write a recipe, with comments, for a model and a file of prompts: the column, chat or not, splits, the limit, objectives."""
    check_writable(out, "--out")
    if out.exists():
        raise ConfigError("a recipe that is there is not replaced", found=f"{out} exists", remedy="give another --out, or remove it")
    from paretune.runs.recipes.recipe import load_recipe
    from paretune.runs.recipes.start import propose

    with contextlib.redirect_stdout(sys.stderr):
        proposed = propose(model, prompts, out)
    with disk_errors(out, "a recipe"):
        write_text(out, proposed.text)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            load_recipe(out)
    except ConfigError:
        out.unlink()
        raise
    if as_json:
        print_json({"recipe": str(out), "found": proposed.remarks})
        return
    for remark in proposed.remarks:
        say(remark)
    tell(f"{out}\nlook at it: paretune preview {out}")


@app.command(**examples("paretune preview recipe.yaml", "paretune preview recipe.yaml prompts.system='Be brief.' --prompts 1 --n 4"))
def preview(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: model, prompts, objectives, method, learner.")],
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=1, max=1000, help="Training prompts to show, the first ones.")] = 3,
    n: Annotated[int, typer.Option("--n", min=2, max=1000, help="Responses of the untrained model to each.")] = 8,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show what a recipe means: all its mistakes, prompts as the model sees them, and each reward on real responses."""
    from paretune.runs.config import load

    plug(plugin)
    load(recipe, overrides or [], short={"prompts": "path"})  # refused here, before anything large is imported
    from paretune.runs.recipes.recipe import load_recipe, mistakes

    if wrong := mistakes(recipe, overrides or []):
        for error in wrong[:-1]:
            say(f"error: {error}\n")
        if len(wrong) > 1:
            say(f"{len(wrong)} mistakes in {recipe}, the last of them:")
        raise wrong[-1]
    from paretune.runs.recipes.preview import preview as look

    with contextlib.redirect_stdout(sys.stderr):
        found = look(load_recipe(recipe, overrides or []), prompts=prompts, samples=n)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found, n)
    for text in found.errors:
        say(f"error: {text}")
    if found.errors:
        raise typer.Exit(2)


def _print(found: Preview, n: int) -> None:
    from paretune.report.tables import Column, Table

    for place, prompt in enumerate(found.prompts, start=1):
        tell(f"=== prompt {place}, {prompt['tokens']} tokens, as the model sees it")
        tell(textwrap.indent(prompt["seen"], "    "))
        for number, answer in enumerate(prompt["responses"], start=1):
            scores = ", ".join(f"{name} {value:.3g}" for name, value in answer["scores"].items())
            tell(f"--- {number} of {n}: {scores}{', cut off at the limit' if answer['cut'] else ''}")
            tell(textwrap.indent(answer["text"], "    "))
    numbers = tuple(Column(key, key) for key in ("mean", "spread", "lowest", "highest"))
    counted = (Column("alike", "prompts with equal scores", "share"), Column("unscored", "unscored", "count"))
    columns = (Column("name", "reward", "text"), Column("role", "role", "text"), *numbers, *counted)
    count = len(found.prompts) * n
    show_table(Table("scores", columns, found.scores), title=f"{count} responses of the untrained model; {found.cut:.0%} were cut off")
    for remark in found.remarks:
        tell(f"• {remark}")


@app.command(**examples("paretune schema --out recipe.schema.json", "paretune schema > recipe.schema.json"))
def schema(
    out: Annotated[Path | None, typer.Option(help="Write it into this file instead of to stdout.")] = None,
    plugin: Plugins = None,
) -> None:
    """Print the JSON schema of recipes, with which an editor completes and checks them: every key, method, learner, objective."""
    plug(plugin)
    check_writable(out, "--out")
    made = recipe_schema()
    if out is None:
        print_json(made)
        return
    with disk_errors(out, "a schema"):
        write_text(out, json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    tell(f"{out}\nfirst line of a recipe beside it: # yaml-language-server: $schema={out.name}")


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe, from the classes that read it; what is said of a field is the comment beside it."""
    from paretune.registry import LEARNERS, METHODS, OBJECTIVES
    from paretune.runs.recipes.recipe import FOLDER_NAME, NEEDED, TASK_KEYS
    from paretune.tasks.prompts import PromptSource
    from paretune.tasks.recipe import RecipeTask

    task = _of_class(RecipeTask)
    defs = {name: {**one, "additionalProperties": False} for name, one in task.pop("$defs", {}).items()}  # of fields that are classes
    for kind, registry in (("method", METHODS), ("learner", LEARNERS)):
        defs |= {f"{kind}-{name}": _named(_of_class(registry[name]), "name", name) for name in registry}
    own = {"type": "string", "pattern": r"^.+\.py:\w+$", "description": "a function in a file of your own: rewards.py:function"}
    defs |= {f"objective-{name}": _named(_of_class(OBJECTIVES[name]), "use", name) for name in OBJECTIVES if name != "function"}
    defs["objective-own"] = _named(_of_class(OBJECTIVES["function"]), "use", own)
    for kind, default in (("method", "experts"), ("learner", "pg")):
        defs[f"{kind}-{default}"]["required"].remove("name")
    for name, one in defs.items():
        if name.startswith("objective-"):
            one["properties"]["name"] = {"type": "string", "description": "what it is called; without it, what it uses"}
            if getattr(OBJECTIVES[str(one["properties"]["use"].get("const", "function"))], "of_reference", False):
                one["required"].remove("model")  # the recipe's
    scored = {"type": "array", "items": {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in defs if name.startswith("objective-")]}}
    prompts = {"anyOf": [{"type": "string", "description": "a file"}, _of_class(PromptSource)]}
    weights = {"type": "array", "items": {"type": ["array", "object"]}, "minItems": 1}
    properties = {key: task["properties"][field] for key, field in TASK_KEYS.items()}
    properties |= {"prompts": prompts, "objectives": {**scored, "minItems": 2}, "guards": scored}
    properties |= {kind: _one_of(kind, registry, defs) for kind, registry in (("method", METHODS), ("learner", LEARNERS))}
    properties |= {
        "name": {"type": "string", "pattern": f"^{FOLDER_NAME}$", "description": "what the family's folder is called"},
        "seed": {"type": "integer", "default": 0},
        "output": {"type": "string", "description": "the run directory; default: runs, beside the recipe"},
        "preferences": {"anyOf": [{"type": "integer", "minimum": 2}, weights], "description": "where the result is measured"},
        "tune": {"type": "object", "description": "for `paretune tune`: {learner.lr: [1e-4, 1e-2, log]}"},
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Paretune recipe", "type": "object"}
    return {**head, "properties": properties, "required": list(NEEDED), "additionalProperties": False, "$defs": defs}


def _of_class(cls: Any) -> dict[str, Any]:
    """The schema of a class, its fields described, and no others allowed."""
    from pydantic import TypeAdapter

    from paretune.cli.catalog import fields_of

    made = TypeAdapter(cls).json_schema()
    said = {field["name"]: field["about"] for field in fields_of(cls)}
    for name, one in made.get("properties", {}).items():
        one.pop("title", None)
        if said.get(name):
            one["description"] = said[name]
    made["description"] = made.get("description", "").split("\n\n")[0]
    return {"properties": {}, **made, "additionalProperties": False}


def _named(made: dict[str, Any], key: str, name: Any) -> dict[str, Any]:
    value = {"const": name, "type": "string"} if isinstance(name, str) else name
    return {**made, "properties": {key: value, **made["properties"]}, "required": list(dict.fromkeys([key, *made.get("required", ())]))}


def _one_of(kind: str, registry: Any, defs: dict[str, Any]) -> dict[str, Any]:
    """A name, or a name with settings."""
    return {"anyOf": [{"enum": list(registry)}, *({"$ref": f"#/$defs/{name}"} for name in defs if name.startswith(f"{kind}-"))]}
