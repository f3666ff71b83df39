"""Families of random adapters on a tiny exact task, for tests of the engine and the server."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from paretune.policy.base import build_policy
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rollout import token_ids
from paretune.policy.rules import Identity, PromptedRule
from paretune.policy.sampling import Sampling
from paretune.seeds import generator
from paretune.serve.rows import Row
from paretune.testing.mixings import fill, quick_task, random_adapters
from paretune.types import Objectives, Prompt

TASK = quick_task(alphabet=6, length=4, layers=2)
NAMES = TASK.objectives.names


@cache
def _kept() -> TemporaryDirectory:
    return TemporaryDirectory()


def family_of(mixing="parameter", rule=None, *, adapters: int = 2, max_new_tokens: int = 12, **fields) -> Family:
    """A family at a mixing; a router's own weights are drawn, too, so that it does something."""
    folder = Path(_kept().name) / f"{adapters}"
    paths = {f"adapter-{k}": folder / f"adapter-{k}" for k in range(adapters)}
    if not folder.exists():
        folder.mkdir()
        paths = random_adapters(TASK, adapters, folder, scale=0.4)
    policy = build_policy(TASK, mixing, paths)
    if policy.mixing == "routed":
        fill([tensor for pair in policy._layers for tensor in pair], 0.5, "router")
    return Family(policy, rule or Identity(), TASK.objectives, TASK.base(), paths, max_new_tokens=max_new_tokens, **fields)


def prompted() -> Family:
    mixing = {"name": "prompted", "objectives": 2, "digits": 2}
    return family_of(mixing, PromptedRule(objectives=2, digits=2), adapters=1)


class Letters:
    """A task that scores any text: how often it has an a, and a b; with the prompts of another, or those that are given."""

    def __init__(self, *texts: str, objectives: Objectives = TASK.objectives):
        self.objectives = objectives
        self._prompts = [Prompt(messages=({"role": "user", "content": text},)) for text in texts]

    def prompts(self, split):
        return self._prompts or TASK.prompts(split)

    def score(self, prompts, texts):
        return np.array([[text.count("a"), text.count("b")] for text in texts], dtype=float)


class Heard:
    """What a row was told, and whether it has ended."""

    def __init__(self, family: Family, text: str, w_M, *, name="family", **settings):
        (self.prompt,) = family.prompts([text], raw=True)
        self.w_M, self.pieces, self.over = list(w_M), [], threading.Event()
        gates = family.gates(np.array([w_M]), [self.prompt])
        sampling = Sampling(**settings.pop("sampling", {}))
        tokens = token_ids(family.policy.tokenizer, self.prompt)
        self.row = Row(name, self.prompt, tokens, gates.reshape(-1), sampling=sampling, sink=self._hear, **settings)

    def _hear(self, piece):
        self.pieces.append(piece)
        if piece.finish:
            self.over.set()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self):
        return self.pieces[-1].finish if self.pieces else None

    def offline(self, family: Family) -> str:
        """What `Family.sample` says in its place."""
        row = self.row
        settings = {name: getattr(row.sampling, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
        settings |= {name: getattr(row.sampling, name) for name in ("presence_penalty", "frequency_penalty")}
        given = {"n": row.number + 1, "seed": row.seed, "max_new_tokens": row.limit, "stop": row.stop, **settings}
        return family.sample([self.prompt], self.w_M, **given)[0][row.number]


def requests(family: Family, count: int, *, seed: int = 0, longest: int = 40, **settings) -> list[Heard]:
    """Random prompts (every fourth one begins like the others of its kind), preferences, lengths and settings."""
    rng = generator(seed, "requests")
    letters = TASK.responses[-1][:1] and sorted({letter for prompt in TASK.prompts("train") for letter in prompt.text})
    begin = "".join(rng.choice(letters, 36))
    made = []
    for n in range(count):
        text = "".join(rng.choice(letters, int(rng.integers(1, longest))))
        text = begin + text[:4] if n % 4 == 0 else text
        w_M = rng.dirichlet(np.ones(family.objectives.count)) if n % 3 else np.eye(family.objectives.count)[n % family.objectives.count]
        draws = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 3}, {"repetition_penalty": 1.4}]
        draws += [{"presence_penalty": 0.5, "frequency_penalty": 0.5}]
        asked = {"seed": int(rng.integers(100)), "number": int(rng.integers(2)), "limit": int(rng.integers(1, 16))}
        asked |= {"sampling": draws[int(rng.integers(len(draws)))], "stop": ("ab", "c") if n % 5 == 0 else ()}
        asked |= {"stream": bool(n % 2), "logprobs": 2 if n % 7 == 0 else None}
        made.append(Heard(family, text, w_M, **{**asked, **settings}))
    return made


@cache
def spoken_family() -> Family:
    """A family of the small model of examples/support_desk with random weights: real text, a chat template, hardly ever an end."""
    from paretune.policy.mixing.parameter import ParameterMix
    from paretune.tasks.pretrained import load_pretrained
    from recipe_files import tiny_model

    model, tokenizer = load_pretrained(str(tiny_model()))
    bank = LoraBank.attach(model, names=["polite", "brief"], seed=0, rank=4)
    for k in range(2):
        fill(bank.parameters_of(k), 0.3, "spoken", k)
    objectives = Objectives(("polite", "brief"), (0.0, 0.0), (1.0, 1.0))
    return Family(ParameterMix(bank, tokenizer), Identity(), objectives, {"model": str(tiny_model())}, max_new_tokens=16, chat=True)
