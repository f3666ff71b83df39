"""family.json: read and checked without loading a model, or the libraries that a model needs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, StrictInt, ValidationError

from paretune.errors import ConfigError, shown
from paretune.hub import is_local

__all__ = ["CATALOG", "FAMILY_FILE", "FAMILY_FORMAT", "check_mixture", "found_base", "no_single", "read_card"]

FAMILY_FILE, FAMILY_FORMAT = "family.json", 2  # 1 was before version 0.2, whose fields had other names
CATALOG = "results/catalog.json"  # in the package, made by tools/docs.py: what ships, so that nobody imports torch to read it


class _Objectives(BaseModel):
    names: list[str]
    low: list[float]
    high: list[float]


class _Named(BaseModel):
    name: str


class _OfTask(BaseModel):
    task: _Named


class _OfModel(BaseModel):
    model: str


class _Card(BaseModel):
    format: StrictInt
    mixing: str | _Named
    rule: _Named
    objectives: _Objectives
    base: _OfTask | _OfModel
    adapters: dict[str, str]
    experts: Annotated[list[StrictInt], Field(min_length=1)] | None = None
    utility: _Named | None = None
    max_new_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    meta: dict[str, Any]


def read_card(path: Path) -> dict[str, Any]:
    """What a family's file says; ConfigError where `path` is no family, or one of another format or shape."""
    file = path / FAMILY_FILE
    if not file.is_file():
        remedy = "name a directory that `paretune fit` wrote"
        raise ConfigError(f"a family is a directory with {FAMILY_FILE}", found=str(path), remedy=remedy)
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{FAMILY_FILE} is JSON", found=f"{path}: {error}", remedy="fit the family again") from error
    known = card.get("format") if isinstance(card, dict) else None
    if known != FAMILY_FORMAT or isinstance(known, bool):
        raise ConfigError(
            f"this version reads families of format {FAMILY_FORMAT}",
            found=shown(known if isinstance(card, dict) else card),
            remedy="load it with the version that wrote it, or fit it anew",
        )
    try:
        _Card.model_validate(card)
    except ValidationError as error:
        first = error.errors()[0]
        where, found = ".".join(map(str, first["loc"])), shown(first.get("input"))
        raise ConfigError(f"{FAMILY_FILE}: {where}: {first['msg']}", found=f"{found} in {file}", remedy="fit the family again") from None
    return card


def found_base(base: Mapping[str, Any], path: Path, given: str | Path | None) -> dict[str, Any]:
    """Where the base of the family in `path` is now: `given`, else beside the family as before, else where it was."""
    plain = {name: value for name, value in base.items() if name != "beside"}
    if given is not None and "model" not in base:
        raise ConfigError("a base that moves is a model", found=f"{path}: the base is a task", remedy="leave --model (model=) out")
    beside = path.resolve() / base.get("beside", base.get("model", ""))
    if given is not None:
        if is_local(str(given)) and not Path(given).expanduser().exists():
            remedy = "give the folder of the model that the family was fitted from"
            raise ConfigError("a family finds its reference model", found=f"nothing at {given}", remedy=remedy)
        plain["model"] = str(given)
    elif "beside" in base and beside.exists():
        plain["model"] = os.path.normpath(beside)
    elif "model" in base and is_local(base["model"]) and not Path(base["model"]).expanduser().exists():
        raise ConfigError(
            "a family finds its reference model",
            found=f"nothing at {base['model']}",
            remedy="say where it is now: --model FOLDER on the command line, Family.load(path, model=FOLDER) in Python",
        )
    return plain


def check_mixture(card: Mapping[str, Any], w_M: np.ndarray) -> None:
    """ConfigError where a family's card alone says that no one set of weights is its policy at a preference.

    So it is where a rule looks at the prompt, and where several gates are open in a mixing that only has single weights where one expert
    stands alone. Elsewhere `serve.export.single_weights` decides, which asks the policy itself.
    """
    from paretune.policy import contextual, rules  # noqa: F401 - without torch, where GATE_RULES would import the whole room
    from paretune.registry import GATE_RULES

    rule = GATE_RULES.build(card["rule"])
    if rule.per_prompt:
        raise no_single(f"rule {rule.registered_name!r} sets the gates anew for every prompt", vertex=False)
    mixing = card["mixing"] if isinstance(card["mixing"], str) else card["mixing"]["name"]
    many = json.loads((files("paretune") / CATALOG).read_text(encoding="utf-8"))["mixtures"].get(mixing)
    if many is None or rule.searches or not card["adapters"]:
        return
    if np.count_nonzero(np.abs(rule.gates(np.asarray(w_M)[None])[0]) > 1e-9) > 1:
        raise no_single(f"mixing {mixing!r}: {many}", vertex=True)


def no_single(found: str, *, vertex: bool) -> ConfigError:
    """Why there is nothing to export. `vertex`: a preference at which one expert is alone could be."""
    first = "a preference that one expert alone answers can be exported; for others, " if vertex else ""
    soup = "; the same experts averaged (mixing: parameter) can, too, for what such a soup is worth" if vertex else ""
    remedy = f'{first}method "distilled" trains one student for all preferences and "bridge" an adapter between the experts, which can be'
    return ConfigError(
        "an export is one set of weights", found=found, remedy=f"{remedy} exported{soup}; `paretune sample` uses this family as it is"
    )
