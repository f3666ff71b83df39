"""A recipe before it is fitted: prompts as the model sees them, and every reward on real responses of the untrained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from paretune.errors import ParetuneError
from paretune.evaluation.metrics import plain
from paretune.policy.rollout import generate, token_ids
from paretune.registry import LEARNERS, METHODS
from paretune.runs.recipes.recipe import Recipe, unused

__all__ = ["Preview", "preview"]

CUT = 0.5  # of the responses: from here on a limit is worth a sentence
ALIKE = 0.9  # of the groups: an objective that is equal in so many teaches nothing; as in `training.loop.watch`


@dataclass(frozen=True)
class Preview:
    """`prompts`: {"seen", "tokens", "responses": [{"text", "cut", "scores"}]}; `scores`: one row per objective and guard."""

    prompts: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    cut: float  # the share of responses that ended at the limit
    remarks: list[str]  # what should be looked at before anything is trained
    errors: list[str]  # of objectives that could not score

    def to_json(self) -> dict[str, Any]:
        return plain({"prompts": self.prompts, "scores": self.scores, "cut": self.cut, "remarks": self.remarks, "errors": self.errors})


def preview(recipe: Recipe, *, prompts: int = 3, samples: int = 8) -> Preview:
    """Sample `samples` responses of the untrained model to each of the first training prompts, and score them."""
    task = recipe.task
    family = METHODS.build("reference").policy(task, LEARNERS.build("pg"), {}, recipe.seed)
    policy, asked = family.policy, list(task.prompts("train"))[:prompts]
    settings: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "seed": recipe.seed}
    drawn = list(generate(policy, asked, gates_NK=None, group=samples, batch=max(1, 64 // samples), **settings))
    texts = [text for rollout in drawn for text in rollout.texts]
    cut_N = ~np.concatenate([rollout.responses.stopped_N.cpu().numpy() for rollout in drawn])
    rows = [prompt for prompt in asked for _ in range(samples)]
    scores: dict[str, np.ndarray] = {}
    found, errors = [], []
    for role, scorers in (("objective", task.scorers), ("guard", task.guarding)):
        for name, objective in scorers:
            try:
                scores[name] = task._score([(name, objective)], rows, texts)[:, 0]
            except ParetuneError as error:
                errors.append(str(error))
                continue
            found.append({"name": name, "role": role, **_summary(scores[name], samples)})
    shown = []
    for place, prompt in enumerate(asked):
        ids, here = token_ids(policy.tokenizer, prompt), range(place * samples, (place + 1) * samples)
        scored = [{name: score_N[n] for name, score_N in scores.items()} for n in here]
        answers = [{"text": texts[n], "cut": bool(cut_N[n]), "scores": one} for n, one in zip(here, scored, strict=True)]
        shown.append({"seen": policy.tokenizer.decode(ids), "tokens": len(ids), "responses": answers})
    cut = float(cut_N.mean())
    remarks = [*_asked(recipe, scores), *unused(recipe), *_remarks(found, cut, texts, task.max_new_tokens)]
    return Preview(shown, found, cut, remarks, errors)


def _asked(recipe: Recipe, scores: dict[str, np.ndarray]) -> list[str]:
    """What the terms ask, and in how many of the responses a gated reward counts; the scores are those without them."""
    terms = recipe.task.terms
    if terms is None:
        return []
    said = terms.sentences(recipe.task.objectives.names)
    for name, when in (terms.when or {}).items():
        if (gate_N := scores.get(when.reward)) is not None and np.isfinite(gate_N).any():
            share = float(when.holds(gate_N[np.isfinite(gate_N)]).mean())
            never = ": nothing can be learned of it before that changes" if share == 0 else ""
            said = [f"{one}: in {share:.0%} of these responses{never}" if one.startswith(f"{name} counts where") else one for one in said]
    return said


def _summary(score_N: np.ndarray, group: int) -> dict[str, Any]:
    known_N = score_N[np.isfinite(score_N)]
    groups = [row for row in score_N.reshape(-1, group) if np.isfinite(row).any()]
    alike = sum(np.nanmax(row) == np.nanmin(row) for row in groups) / len(groups) if groups and group > 1 else None
    facts = {"mean": known_N.mean(), "spread": known_N.std(), "lowest": known_N.min(), "highest": known_N.max()} if len(known_N) else {}
    return {**facts, "alike": alike, "unscored": int(len(score_N) - len(known_N))}


def _remarks(scores: list[dict[str, Any]], cut: float, texts: list[str], limit: int) -> list[str]:
    said = []
    for row in scores:
        name = f"{row['role']} {row['name']!r}"
        if row["unscored"]:
            said.append(f"{name} could not score {row['unscored']} of {len(texts)} responses")
        if "mean" not in row:
            continue
        if row["lowest"] == row["highest"]:
            lost = "nothing can be learned of it" if row["role"] == "objective" else "it shows nothing"
            said.append(f"{name} is constant: every response scores {row['mean']:.3g}, so that {lost}")
        elif row["alike"] is not None and row["alike"] >= ALIKE:
            said.append(f"{name} is equal for all responses to {row['alike']:.0%} of the prompts: little can be learned of it")
    if cut >= CUT:
        said.append(f"{cut:.0%} of the responses are cut off at max_new_tokens={limit}: raise it, or ask for short answers (system:)")
    if empty := sum(not text.strip() for text in texts):
        said.append(f"{empty} of {len(texts)} responses are empty")
    return said
