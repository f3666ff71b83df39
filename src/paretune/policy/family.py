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

from paretune.errors import ConfigError
from paretune.policy.base import Policy, build_mixing
from paretune.policy.lora.bank import LoraBank
from paretune.policy.lora.files import CONFIG_FILE, WEIGHTS_FILE
from paretune.policy.rollout import generate
from paretune.policy.rules import GateRule
from paretune.registry import GATE_RULES, TASKS, describe
from paretune.tasks.base import Task
from paretune.types import Cost, Objectives, Preference, Prompt

__all__ = ["Family"]

FAMILY_FILE, FAMILY_FORMAT = "family.json", 2  # 1 was before version 0.2, whose fields had other names


SAMPLE_ROWS = 64  # rows sampled in one batch


@dataclass
class Family:
    """A policy for every preference: what training leaves, and what is served.

    `rule` turns preferences into gates. `base` says where the reference model is: {"task": description} or {"model": path or hub id,
    "revision": ..., "dtype": ...}. `adapters` are the directories that the bank's adapters were read from, by name; adapters without one
    are written from memory. `meta` is any JSON, for information only (the method's description and card).
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
    search_cost: Cost = field(default_factory=Cost)  # of finding the gates once, before anything is asked; not written to disk

    def __post_init__(self):
        if not self.rule.searches:
            self.gates(np.eye(self.objectives.count))  # a rule for other objectives or adapters fails here, not at the first request

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
        prompts: Sequence[str | Prompt],
        preference: Preference | Mapping[str, float] | Sequence[float] | str,
        *,
        n: int = 1,
        seed: int = 0,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
    ) -> list[list[str]]:
        """`n` responses to each prompt at one preference, such as {"helpful": .7, "brief": .3}.

        Every row draws from a stream named by its prompt and its occurrence, so that neither order nor batching changes what is drawn.
        """
        limit = self.longest(max_new_tokens)
        if isinstance(preference, Preference):
            preference = dict(zip(preference.names, preference.weights, strict=True))
        asked = [Prompt(text=p) if isinstance(p, str) else p for p in prompts]
        rows = [prompt for prompt in asked for _ in range(n)]
        gates = self.gates(Preference.of(self.objectives.names, preference).w_M[None], asked)[0]  # (K,), or (P, K)
        gates_NK = np.repeat(np.broadcast_to(gates, (len(asked), self.policy.K)), n, axis=0)
        drawn = generate(self.policy, rows, gates_NK=gates_NK, max_new_tokens=limit, seed=seed, temperature=temperature, batch=SAMPLE_ROWS)
        answers = [text for rollout in drawn for text in rollout.texts]
        return [answers[i * n : (i + 1) * n] for i in range(len(asked))]

    def save(self, path: str | Path) -> None:
        """Write family.json and adapters/<name>/ in plain PEFT format into the new directory `path`, which appears whole or not at all."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError("a family is saved into a new directory", found=f"{path} exists", remedy="choose another name, or remove it")
        aside = path.resolve().with_name(f".wip-{path.resolve().name}")
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        aside.mkdir(parents=True)
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
            "base": dict(self.base),
            "adapters": folders,
            "experts": self.experts,
            "utility": self.utility,
            "max_new_tokens": self.max_new_tokens,
            "meta": self.meta,
        }
        (aside / FAMILY_FILE).write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device | None = None, trust: bool = False, scoring: bool = True) -> Family:
        """A saved family, with its reference model loaded afresh.

        Code that it names is refused unless the caller says `trust`; that of its objectives may stand there where it is not used for
        `scoring`.
        """
        path = Path(path)
        try:
            card = json.loads((path / FAMILY_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"a family is a directory with {FAMILY_FILE}", found=str(path), remedy="name a directory that `paretune fit` wrote"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{FAMILY_FILE} is JSON", found=f"{path}: {error}", remedy="fit the family again") from error
        if card.get("format") != FAMILY_FORMAT:
            raise ConfigError(
                f"this version reads families of format {FAMILY_FORMAT}",
                found=repr(card.get("format")),
                remedy="load it with the version that wrote it, or fit it anew",
            )
        rule = GATE_RULES.build(card["rule"])
        model, tokenizer = load_base(card["base"], trust=trust, scoring=scoring)
        if device is not None:
            model = model.to(device)
        adapters = {name: path / folder for name, folder in card["adapters"].items()}
        policy = build_mixing(card["mixing"], LoraBank.load(model, adapters), tokenizer)
        policy.load_extra(path)
        objectives = Objectives(**{key: tuple(value) for key, value in card["objectives"].items()})
        said = {name: card.get(name, card["meta"].get(name)) for name in ("experts", "utility", "max_new_tokens")}  # once in meta
        said["experts"] = None if said["experts"] is None else tuple(said["experts"])
        return cls(policy, rule, objectives, card["base"], adapters, card["meta"], **said)


def load_base(base: Mapping[str, Any], *, trust: bool = False, scoring: bool = True) -> tuple[Any, Any]:
    """The reference model (eval mode) and its tokenizer that `base` names; see `Family`."""
    task = task_of(base, trust=trust, scoring=scoring)
    if task is not None:
        return task.load()
    from paretune.tasks.pretrained import load_pretrained

    settings = {key: base[key] for key in ("revision", "dtype") if base.get(key) is not None}
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
