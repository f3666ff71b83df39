"""A policy: one model, one bank of adapters, and the level at which the adapters are combined; and a family of them on disk.

The levels themselves stand in `mixing/`. Every policy answers the same call, with a gate per row of the batch and adapter:

    logits_NTV = policy.forward(ids_NT, attention_mask=mask, gates_NK=gates)

which is `combine(parts(...), gates)`. Parts are expensive; at the logit and hidden levels they do not depend on the gates, so that one
computation of them serves many preferences. A softmax over V of the result is the policy; rows of logits are defined up to a constant.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.lora import LoraBank
from paretune.plain_lora import CONFIG_FILE, WEIGHTS_FILE
from paretune.registry import RULES, TASKS, Registry, describe
from paretune.types import Objectives, Preference, Prompt

__all__ = ["LEVELS", "Family", "Policy", "build_level"]

LEVELS = Registry("mixing level", "paretune.mixing")
FAMILY_FILE, FAMILY_FORMAT = "family.json", 1
SAMPLE_ROWS = 64  # rows sampled in one batch


class Policy(ABC):
    """What samples text and scores tokens. `registered_name` (also `level`) names the class in LEVELS."""

    registered_name: ClassVar[str]
    version: ClassVar[int]
    parts_need_gates: ClassVar[bool] = False
    one_forward: ClassVar[bool] = False  # True: parts are the logits of one forward of the model

    def __init__(self, bank: LoraBank, tokenizer: Any):
        self.bank, self.tokenizer, self.model = bank, tokenizer, bank.base
        self.eos_ids = _eos_ids(self.model, tokenizer)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id = int(self.eos_ids[0] if pad is None else pad)
        self._headless = False

    @property
    def level(self) -> str:
        return self.registered_name

    @property
    def settings(self) -> dict[str, Any]:
        """What the level's constructor was given beside bank and tokenizer: JSON, written into the family's file."""
        return {}

    @property
    def K(self) -> int:
        return self.bank.count

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def copies(self) -> int:
        """Rows of the model's batch (and of the cache) per row of the policy's."""
        return 1

    @property
    def forwards_per_token(self) -> float:
        return float(self.copies)

    def parameters(self) -> list[Tensor]:
        """What a training of this policy trains: the bank's trainable tensors, and what a level has beside them."""
        return self.bank.parameters()

    def commit(self) -> None:  # noqa: B027
        """Write into the bank's adapters what was trained in their place; most levels train the adapters themselves."""

    def save_extra(self, folder: Path) -> None:  # noqa: B027
        """Write into `folder` what the level has learned beside adapters; most have nothing."""

    def load_extra(self, folder: Path) -> None:  # noqa: B027
        """Read it back."""

    @property
    def extra_positions(self) -> int:
        """Tokens that the policy itself puts before each prompt."""
        return 0

    @abstractmethod
    def parts(
        self,
        input_ids_NT: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        gates_NK: Tensor | None = None,
        last_only: int = False,
    ) -> Tensor:
        """What the model must compute. At the parameter level the gates must be given; elsewhere they are not looked at.

        `attention_mask` is (N, cached + T), 1 for real tokens, or a (N or 1, 1, T, cached + T) mask: bool (True may be looked at) or
        additive. `position_ids` default to counting the real tokens; a 4-D mask needs them given. `cache` comes from `new_cache`
        and grows. `last_only` keeps the last position alone (a number: that many of the last).
        """

    @abstractmethod
    def combine(self, parts: Tensor, gates_NK: Tensor | None) -> Tensor:
        """(N, T, V) logits of the mixture: cheap."""

    def forward(
        self,
        input_ids_NT: Tensor,
        *,
        gates_NK: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        last_only: int = False,
    ) -> Tensor:
        """(N, T, V) logits; `gates_NK=None` is the reference at every level (its cache then has N rows)."""
        if gates_NK is None:
            with self.bank.gates(None):
                return self._logits(self._inputs(1, input_ids_NT, attention_mask, position_ids, cache), last_only)
        gates_NK = torch.as_tensor(gates_NK, device=self.device)
        if gates_NK.shape[:-1] not in {input_ids_NT.shape[:1], input_ids_NT.shape} or gates_NK.shape[-1] != self.K:
            raise ConfigError(
                "a policy takes one row of gates per row of the batch, one column per adapter",
                found=f"gates {tuple(gates_NK.shape)} for a batch {tuple(input_ids_NT.shape)} and {self.K} adapters",
                remedy="repeat each prompt's gates for each of its samples",
            )
        parts = self.parts(input_ids_NT, attention_mask, position_ids, cache=cache, gates_NK=gates_NK, last_only=last_only)
        if last_only and gates_NK.dim() == 3:
            gates_NK = gates_NK[:, -int(last_only) :]
        return self.combine(parts, gates_NK)

    def new_cache(self, n_rows: int) -> Any:
        """An empty key-value cache for `n_rows` rows of the policy (it holds `copies * n_rows` rows of the model)."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @property
    def splits_head(self) -> bool:
        """Whether the head is the model's own, the same for all rows: then logits may be made of the states piece by piece."""
        adapted = any(layer.module is self.model.get_output_embeddings() for layer in self.bank.layers)
        return self.one_forward and self.model.base_model is not self.model and not adapted

    @contextlib.contextmanager
    def headless(self) -> Iterator[None]:
        """Within, a forward gives the states that the head is given, (N, T, H), instead of logits; `trunk.run_head` goes on from there."""
        assert self.splits_head
        self._headless = True
        try:
            yield
        finally:
            self._headless = False

    def _inputs(self, copies: int, ids_NT: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> dict[str, Any]:
        """The model's keyword arguments, every row repeated `copies` times, block by block."""
        past = 0 if cache is None else cache.get_seq_length()
        if mask is not None and mask.dim() == 4:
            assert positions is not None, "a 4-D mask does not say the positions"
            if not mask.is_floating_point():  # attention implementations read a bool mask differently; all read an additive one alike
                mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask.bool(), torch.finfo(self.model.dtype).min)
            mask = mask.to(self.model.dtype)
        elif positions is None:
            if mask is None:
                positions = torch.arange(past, past + ids_NT.shape[1], device=ids_NT.device).expand_as(ids_NT)
            else:
                positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        if copies > 1:
            ids_NT = ids_NT.repeat(copies, 1)
            positions = positions.repeat(copies, 1) if positions is not None and positions.shape[0] > 1 else positions
            mask = mask.repeat(copies, *[1] * (mask.dim() - 1)) if mask is not None and mask.shape[0] > 1 else mask
        return {
            "input_ids": ids_NT,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }

    def _logits(self, inputs: dict[str, Any], last_only: int) -> Tensor:
        """The model's own logits; only those of the last `last_only` positions are computed; 0 is all."""
        if self._headless:
            return self.model.base_model(**inputs).last_hidden_state[:, -int(last_only) :]
        return self.model(**inputs, logits_to_keep=int(last_only)).logits


def build_level(level: str | Mapping[str, Any], bank: LoraBank, tokenizer: Any) -> Policy:
    """The policy of a level, given as its name or as {"name": ..., setting: value, ...}."""
    settings = {"name": level} if isinstance(level, str) else dict(level)
    return LEVELS[settings.pop("name")](bank, tokenizer, **settings)


def _eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response: those of the generation settings, then the tokenizer's."""
    found: list[int] = []
    for given in (getattr(model.generation_config, "eos_token_id", None), model.config.eos_token_id, tokenizer.eos_token_id):
        for number in given if isinstance(given, (list, tuple)) else [given]:
            if number is not None and int(number) not in found:
                found.append(int(number))
    if not found:
        raise ConfigError(
            "a policy needs to know how a response ends", found="no EOS id in the model or tokenizer", remedy="set tokenizer.eos_token"
        )
    return tuple(found)


@dataclass
class Family:
    """A policy for every preference: what training leaves, and what is served.

    `rule` turns preferences into gates. `base` says where the reference model is: {"task": description} or {"model": path or hub id,
    "revision": ..., "dtype": ...}. `adapters` are the directories that the bank's adapters were read from, by name; adapters without one
    are written from memory. `meta` is any JSON (the method's description and card; "max_new_tokens" is `sample`'s default).
    """

    policy: Policy
    rule: Any
    objectives: Objectives
    base: Mapping[str, Any]
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.gates(np.eye(self.objectives.count))  # a rule for other objectives or adapters fails here, not at the first request

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
        if prompts is not None and hasattr(self.rule, "prompt_gates"):
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
        from paretune.rollout import encode, row_uniforms, sample, texts

        limit = max_new_tokens or self.meta.get("max_new_tokens")
        if not limit:
            raise ConfigError("responses have a longest length", found="no max_new_tokens", remedy="pass max_new_tokens=64, for example")
        if isinstance(preference, Preference):
            preference = dict(zip(preference.names, preference.weights, strict=True))
        asked = [Prompt(text=p) if isinstance(p, str) else p for p in prompts]
        rows = [prompt for prompt in asked for _ in range(n)]
        gates = self.gates(Preference.of(self.objectives.names, preference).w_M[None], asked)[0]  # (K,), or (P, K)
        gates_NK = torch.from_numpy(np.repeat(np.broadcast_to(gates, (len(asked), self.policy.K)), n, axis=0)).float()
        seen: Counter[str] = Counter()
        occurrences = []
        for prompt in rows:
            occurrences.append(seen[prompt.digest])
            seen[prompt.digest] += 1
        answers: list[str] = []
        for start in range(0, len(rows), SAMPLE_ROWS):
            here = rows[start : start + SAMPLE_ROWS]
            ids_NT, mask_NT = encode(self.policy.tokenizer, here, self.policy.device)
            uniforms_NT = row_uniforms(seed, 0, [p.digest for p in here], occurrences[start : start + SAMPLE_ROWS], limit)
            made = sample(
                self.policy,
                ids_NT,
                mask_NT,
                gates_NK=gates_NK[start : start + SAMPLE_ROWS].to(self.policy.device),
                max_new_tokens=limit,
                uniforms_NT=uniforms_NT,
                temperature=temperature,
            )
            answers += texts(self.policy.tokenizer, made)
        return [answers[i * n : (i + 1) * n] for i in range(len(asked))]

    def export(self, path: str | Path, preference: Preference | Mapping[str, float] | Sequence[float] | str, **settings: Any) -> Any:
        """The policy at one preference as files that transformers, PEFT and vLLM load; see `paretune.export.export` for the settings."""
        from paretune.export import export

        return export(self, preference, path, **settings)

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
            "level": {"name": self.policy.level, **self.policy.settings} if self.policy.settings else self.policy.level,
            "rule": describe(self.rule),
            "objectives": asdict(self.objectives),
            "base": dict(self.base),
            "adapters": folders,
            "meta": self.meta,
        }
        (aside / FAMILY_FILE).write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device | None = None) -> Family:
        """A saved family, with its reference model loaded afresh."""
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
                f"this version reads families of format {FAMILY_FORMAT}", found=repr(card.get("format")), remedy="update Paretune"
            )
        rule = RULES.build(card["rule"])
        model, tokenizer = load_base(card["base"])
        if device is not None:
            model = model.to(device)
        adapters = {name: path / folder for name, folder in card["adapters"].items()}
        policy = build_level(card["level"], LoraBank.load(model, adapters), tokenizer)
        policy.load_extra(path)
        objectives = Objectives(**{key: tuple(value) for key, value in card["objectives"].items()})
        return cls(policy, rule, objectives, card["base"], adapters, card["meta"])


def load_base(base: Mapping[str, Any]) -> tuple[Any, Any]:
    """The reference model (eval mode) and its tokenizer that `base` names; see `Family`."""
    if "task" in base:
        return TASKS.build(base["task"]).load()
    from paretune.tasks.pretrained import load_pretrained

    settings = {key: base[key] for key in ("revision", "dtype") if base.get(key) is not None}
    return load_pretrained(base["model"], **settings)


def _folder(k: int, name: str) -> str:
    """The adapter's name as a folder, where it can be one."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return plain if plain == name else f"{k}-{plain}"
