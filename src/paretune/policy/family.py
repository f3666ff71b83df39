"""A family of policies: a policy for every preference, sampled, saved and loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune.errors import ConfigError, html_table, shown
from paretune.files import changed, check_new, disk_errors, hashes_of, new_folder, seal_problems, sealed
from paretune.hub import is_local
from paretune.policy.base import Policy, build_mixing
from paretune.policy.card import FAMILY_FILE, FAMILY_FORMAT, found_base, read_card
from paretune.policy.lora.bank import LoraBank
from paretune.policy.lora.files import CONFIG_FILE, WEIGHTS_FILE
from paretune.policy.rollout import generate, texts
from paretune.policy.rules import GateRule
from paretune.policy.sampling import Sampling, stop_at, stop_ids
from paretune.policy.self_test import check_model
from paretune.registry import GATE_RULES, TASKS, checked, describe
from paretune.tasks.base import Task, sharing_weights
from paretune.tasks.prompts import as_prompt
from paretune.types import Amount, Cost, Count, Objectives, Preference, Prompt, canonical_json

__all__ = ["Family"]

SAMPLE_ROWS = 64  # rows sampled in one batch


@dataclass(repr=False)
class Family:
    """A policy for every preference: what training leaves, and what is served.

    `rule` turns preferences into gates. `base` says where the reference model is: {"task": description} or {"model": path or hub id,
    "revision": ..., "dtype": ..., "quantize": ...}. `adapters` are the directories that the bank's adapters were read from, by name; those
    without one are written from memory. `meta` is any JSON, for information only (the method's description and card).
    """

    policy: Policy
    rule: GateRule
    objectives: Objectives
    base: Mapping[str, Any]
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    experts: tuple[int, ...] | None = None  # the adapter that is the expert of each objective, where there are such
    utility: Mapping[str, Any] | None = None  # the description of what was climbed, where it is not w . J: see `evaluation.utility`
    max_new_tokens: int | None = None  # the longest response of `sample`, where a request does not say
    chat: bool = False  # it was trained on conversations: a text is what a user says in one
    system: str | None = None  # the system message with which every conversation of the training began
    search_cost: Cost = field(default_factory=Cost)  # of finding the gates once, before anything is asked; not written to disk

    def __post_init__(self):
        if not self.rule.searches:
            self.gates(np.eye(self.objectives.count))  # a rule for other objectives or adapters fails here, not at the first request

    def _facts(self) -> dict[str, str]:
        total, base = self.meta.get("ledger", {}).get("total", {}), self.base.get("model") or self.base.get("task", {}).get("name")
        trained = f"{total['samples']:,} samples, {total['tokens']:,} tokens, {total['seconds']:.0f} s" if total else ""
        return {
            "method": str(self.meta.get("method", {}).get("name", "unknown")),
            "objectives": ", ".join(self.objectives.names),
            "adapters": f"{self.policy.bank.count}: {', '.join(self.policy.bank.names)}" if self.policy.bank.count else "none",
            "mixing": self.policy.mixing,
            "reference model": str(base),
            **({"trained on": trained} if trained else {}),
        }

    def __repr__(self) -> str:
        return f"<Family: {'; '.join(f'{name} {value}' for name, value in self._facts().items())}>"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return html_table("A family of policies", (), self._facts().items())

    @property
    def gate_names(self) -> tuple[str, ...]:
        """What the gates belong to: the adapters, or the objectives where a preference is text."""
        bank = self.policy.bank
        return bank.names if bank.count == self.policy.K else self.objectives.names

    @property
    def stepwise(self) -> bool:
        """Whether preferences that are near each other are the same policy, so that a slope means nothing."""
        return self.rule.stepwise or self.policy.stepwise

    def cost(self, w_WM: np.ndarray) -> Cost:
        """What finding the gates of these preferences cost: once for all of them, and for each."""
        return self.search_cost.then(self.rule.cost(w_WM))

    def gates(self, w_WM: np.ndarray, prompts: Sequence[Prompt] | None = None) -> np.ndarray:
        """(W, K) float64 gates of W preferences; (W, P, K) for `prompts`, where the rule looks at the prompt."""
        w_WM = np.asarray(w_WM, dtype=np.float64)
        if w_WM.ndim != 2 or w_WM.shape[1] != self.objectives.count:
            raise ConfigError(
                "preferences come as rows with one weight per objective",
                found=f"shape {w_WM.shape} for the objectives {', '.join(self.objectives.names)}",
                remedy="pass an array of shape (preferences, objectives)",
            )
        shape: tuple[int, ...] = (len(w_WM), self.policy.K)
        if prompts is not None and self.rule.per_prompt:
            gates, shape = self.rule.prompt_gates(w_WM, prompts), (len(w_WM), len(prompts), self.policy.K)
        else:
            gates = self.rule.gates(w_WM)
        if gates.shape != shape:
            raise ConfigError(
                "a rule gives one gate per adapter",
                found=f"rule {self.rule.registered_name!r} gives {gates.shape[1:]} for {self.policy.K} adapters",
                remedy="use a rule that was made for these adapters",
            )
        return gates

    def longest(self, asked: int | None) -> int:
        """The longest response in tokens: what is asked for, or the family's own."""
        limit = asked or self.max_new_tokens
        if not limit:
            raise ConfigError("responses have a longest length", found="no max_new_tokens", remedy="pass max_new_tokens=64, for example")
        return limit

    def sample(
        self,
        prompts: str | Prompt | Sequence[Any],
        preference: Preference | Mapping[str, float] | Sequence[float] | str,
        *,
        n: int = 1,
        seed: int = 0,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        system: str | None = None,
        raw: bool = False,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> list[list[str]]:
        """`n` responses to each prompt at one preference, such as {"helpful": .7, "brief": .3}.

        Prompts are texts or conversations, [{"role": "user", "content": "..."}, ...]; see `prompts` for `system` and `raw`. Every row
        draws from a stream named by its prompt and its occurrence, so that neither order nor batching changes what is drawn. A text ends
        before `stop`, or the first of several that is in it, a special token among them. `sampling` are other fields of
        `policy.sampling.Sampling`, such as top_p.
        """
        n, seed = checked("n", Count, n), checked("seed", int, seed)
        limit = self.longest(checked("max_new_tokens", Count | None, max_new_tokens))
        temperature = checked("temperature", Amount, temperature)
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, Sequence) or not all(isinstance(one, str) and one for one in stops):
            raise ConfigError("stop is a text or several, none of them empty", found=shown(stop), remedy='for example stop=["User:"]')
        if isinstance(preference, Preference):
            preference = dict(zip(preference.names, preference.weights, strict=True))
        asked = self.prompts(prompts, system=system, raw=raw)
        gates = self.gates(Preference.of(self.objectives.names, preference).w_M[None], asked)[0]  # (K,), or (P, K)
        gates_NK = np.repeat(np.broadcast_to(gates, (len(asked), self.policy.K)), n, axis=0)
        group = n if n <= SAMPLE_ROWS else 1  # each prompt is read once for all its responses
        read = asked if group == n else [prompt for prompt in asked for _ in range(n)]
        settings: dict[str, Any] = {"max_new_tokens": limit, "seed": seed, "sampling": Sampling.of(temperature=temperature, **sampling)}
        drawn = generate(self.policy, read, gates_NK=gates_NK, group=group, batch=SAMPLE_ROWS // group, **settings)
        ends = stop_ids(self.policy.tokenizer, stops)
        said = (texts(self.policy.tokenizer, rollout.responses, ends=ends) if ends else rollout.texts for rollout in drawn)
        answers = [text[: stop_at(text, stops)] for part in said for text in part]
        return [answers[i * n : (i + 1) * n] for i in range(len(asked))]

    def prompts(self, given: str | Prompt | Sequence[Any], *, system: str | None = None, raw: bool = False) -> list[Prompt]:
        """Texts and conversations, or one of them, as the prompts that the family was trained on.

        Where that was `chat`, a text becomes what a user says. A conversation goes through the tokenizer's chat template; one without a
        system message gets the training's, or `system` ("" is none). `raw` leaves texts as they are. A `Prompt` is used as it is.
        """
        if raw and system is not None:
            raise ConfigError("a raw prompt is used as it is", found="raw, and a system message", remedy="leave one of them out")
        several: Any = given
        alone = not isinstance(given, Sequence) or isinstance(given, str | bytes)
        if alone or (len(several) > 0 and all(isinstance(part, Mapping) for part in several)):
            several = [given]
        return [self._prompt(f"prompt {place}", one, system, raw) for place, one in enumerate(several, start=1)]

    def _prompt(self, where: str, given: Any, system: str | None, raw: bool) -> Prompt:
        if isinstance(given, Prompt):
            if system is None:
                return given
            given = given.raw
        if raw:
            if not isinstance(given, str):
                raise ConfigError("a raw prompt is a text", found=f"a {type(given).__name__} in {where}", remedy="leave raw out")
            return Prompt(text=given)
        plain = as_prompt(where, given, chat=self.chat)
        if plain.messages is None:
            if system is not None:
                found = f"a text in {where}, for a family that was trained on plain texts"
                remedy = 'give the prompt as messages, [{"role": "user", "content": "..."}], or leave the system message out'
                raise ConfigError("a system message goes before a conversation", found=found, remedy=remedy)
            return plain
        if system is None and plain.messages[0]["role"] != "system":
            system = self.system
        return as_prompt(where, plain.messages, chat=self.chat, system=system) if system else plain

    def save(self, path: str | Path) -> None:
        """Write family.json and adapters/<name>/ in plain PEFT format into the new directory `path`, which appears whole or not at all."""
        path = Path(path)
        check_new(path, "a family is saved into a new directory")
        with disk_errors(path, "a family"), new_folder(path) as aside:
            self._write(aside, path.resolve())

    def _write(self, aside: Path, path: Path) -> None:
        folders = {}
        for k, name in enumerate(self.policy.bank.names):
            folders[name] = f"adapters/{_folder(k, name)}"
            folder = aside / folders[name]
            if name in self.adapters:
                folder.mkdir(parents=True)
                for file in (CONFIG_FILE, WEIGHTS_FILE):
                    shutil.copyfile(Path(self.adapters[name]) / file, folder / file)
            else:
                self.policy.bank.save(name, folder)
        self.policy.save_extra(aside)
        card = {
            "format": FAMILY_FORMAT,
            "mixing": {"name": self.policy.mixing, **self.policy.settings} if self.policy.settings else self.policy.mixing,
            "rule": describe(self.rule.frozen()),
            "objectives": asdict(self.objectives),
            "base": _movable(self.base, path),
            "adapters": folders,
            "experts": self.experts,
            "utility": self.utility,
            "max_new_tokens": self.max_new_tokens,
            "chat": self.chat,
            "system": self.system,
            "meta": self.meta,
            "files": hashes_of(aside, (file for file in aside.rglob("*") if file.is_file())),
        }
        card = sealed(json.loads(json.dumps(card, allow_nan=False)))
        (aside / FAMILY_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        model: str | Path | None = None,
        trust: bool = False,
        scoring: bool = True,
        self_test: bool = True,
        bases: dict[str, Any] | None = None,
    ) -> Family:
        """A saved family, with its reference model loaded afresh and, unless `self_test` is false, tried out: see `policy.self_test`.

        `model` says where the reference model is now, if it has moved. Code that the family names is refused unless the caller says
        `trust`; that of its objectives may stand there where it is not used for `scoring`. Families that are loaded with the same dict
        as `bases` share the weights of a reference model that they have in common.
        """
        path = Path(path)
        card = read_card(path)
        rule = GATE_RULES.build(card["rule"])
        _refuse(path, changed(path, card.get("files", {})))
        base = found_base(card["base"], path, model)
        known = {} if bases is None or base.get("quantize") else bases  # quantized weights are no plain tensors
        name = canonical_json(base)
        if name not in known:
            loaded, tokenizer = load_base(base, trust=trust, scoring=scoring)
            known[name] = loaded if device is None else loaded.to(device), tokenizer
        loaded, tokenizer = known[name]
        if known is bases:
            loaded = sharing_weights(loaded)
        adapters = {name: path / folder for name, folder in card["adapters"].items()}
        policy = build_mixing(card["mixing"], LoraBank.load(loaded, adapters), tokenizer)
        policy.load_extra(path)
        if self_test:
            check_model(policy)
        objectives = Objectives(**{key: tuple(value) for key, value in card["objectives"].items()})
        said = {name: card.get(name, card["meta"].get(name)) for name in ("experts", "utility", "max_new_tokens")}  # once in meta
        said |= {"chat": bool(card.get("chat", False)), "system": card.get("system")}  # older files do not say
        said["experts"] = None if said["experts"] is None else tuple(said["experts"])
        family = cls(policy, rule, objectives, base, adapters, card["meta"], **said)
        if "files" in card or "sha256" in card:  # not of an earlier version
            _refuse(path, seal_problems(FAMILY_FILE, card))  # last: what can be said more clearly was said
        return family


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise ConfigError(
            "a family is read as it was saved",
            found=f"{path / problems[0]}",
            remedy="copy it again, or fit it again; what you changed by hand counts once files and sha256 are out of family.json",
        )


def _movable(base: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """How the family in `path` finds its base: a folder by its place from there, too, so that both can move together."""
    if "model" not in base or not is_local(base["model"]):
        return dict(base)
    model = Path(base["model"]).expanduser().resolve()
    return {**base, "model": str(model), "beside": os.path.relpath(model, path)}


def load_base(base: Mapping[str, Any], *, trust: bool = False, scoring: bool = True) -> tuple[Any, Any]:
    """The reference model (eval mode) and its tokenizer that `base` names; see `Family`."""
    task = task_of(base, trust=trust, scoring=scoring)
    if task is not None:
        return task.load()
    from paretune.tasks.pretrained import load_pretrained

    settings = {key: base[key] for key in ("revision", "dtype", "quantize") if base.get(key) is not None}
    return load_pretrained(base["model"], trust_remote_code=trust, **settings)


def task_of(base: Mapping[str, Any], *, trust: bool = False, scoring: bool = True) -> Task | None:
    """The task that `base` names, or None. ConfigError where it would run code or call a service, unless the caller says `trust`."""
    task: Task | None = TASKS.build(base["task"]) if "task" in base else None
    if task is not None and not trust and (named := task.trusts(scoring=scoring)):
        raise ConfigError(
            "a family runs no code and calls no service, unless you say so",
            found=f"its task names {', '.join(named)}",
            remedy="read that first; then give --trust (in Python trust=True); `paretune explain --recipe` scores by your own recipe",
        )
    return task


def _folder(k: int, name: str) -> str:
    """The adapter's name as a folder, where it can be one."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return plain if plain == name else f"{k}-{plain}"
