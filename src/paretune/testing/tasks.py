"""Conformance of tasks: what every task must keep, as a check that plug-in authors run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from paretune.registry import TASKS
from paretune.seeds import generator
from paretune.tasks.base import Task
from paretune.testing.objectives import TEXTS, attempt, check_registered, require
from paretune.types import Preference, Prompt

__all__ = ["check_task"]

SPLITS = ("train", "test")
ROUNDING = 1e-3  # of an objective's range, by which a model may score a completion otherwise in another batch


# Tasks


def check_task(task: Task | str | Mapping[str, Any]) -> None:
    """Description, prompts, scores, reference model and, for exact tasks, the front of a task (an instance or its description)."""
    task = TASKS.build(task) if isinstance(task, (str, Mapping)) else task
    check_registered(task, TASKS, Task)
    m = task.objectives.count
    low_M, high_M = np.array(task.objectives.low), np.array(task.objectives.high)
    ranged = np.isfinite(low_M).all() and np.isfinite(high_M).all() and (low_M < high_M).all()
    require(bool(ranged), "every objective has a finite range, low below high", f"{low_M} to {high_M}", "declare the worst and the best")
    require(m >= 2, "a task has at least two objectives", f"{m}", "with one objective there is nothing to trade")
    require(task.beta > 0, "beta is positive: KL costs return", f"{task.beta}", "beta=0.1, for example")
    require(task.max_new_tokens >= 1, "a response may have a token", f"{task.max_new_tokens}", "max_new_tokens=64, for example")
    _check_judged(task, m)
    prompts = _check_prompts(task)
    _check_scores(task, prompts, high_M - low_M)
    _check_model(task)
    if task.is_exact:
        _check_exact(task)


def _check_judged(task: Task, m: int) -> None:
    w_WM = task.judged()
    for w_M in w_WM:
        attempt("judged preferences are preferences", "rows on the simplex", partial(Preference.of, task.objectives.names, w_M.tolist()))
    require(np.array_equal(w_WM, task.judged()), "judged preferences are fixed", "two calls differ", "no randomness without a fixed seed")


def _check_prompts(task: Task) -> list[Prompt]:
    found: dict[str, list[Prompt]] = {}
    for split in SPLITS:
        rule = f"prompts({split!r}) gives the same prompts every time"
        found[split] = list(attempt(rule, "both splits exist", partial(task.prompts, split)))
        require(bool(found[split]), f"the split {split!r} has prompts", "none", "keep some prompts for testing")
        same = [p.digest for p in task.prompts(split)] == [p.digest for p in found[split]]
        require(same, rule, "another order, or other prompts", "sort, and draw only from the task's seed")
    shared = {p.digest for p in found["train"]} & {p.digest for p in found["test"]}
    require(not shared, "test prompts are not training prompts", f"{len(shared)} in both splits", "split once, by prompt")
    return found["train"][:3] + found["test"][:3]


def _check_scores(task: Task, prompts: list[Prompt], range_M: np.ndarray) -> None:
    m = len(range_M)
    texts = [TEXTS[i % len(TEXTS)] for i in range(len(prompts))]
    if task.is_exact:
        responses: list[str] = task.responses  # type: ignore[attr-defined]
        texts = [responses[i * len(responses) // len(prompts)] for i in range(len(prompts))]
    rule, remedy = "score() gives an (N, M) float array, NaN where it cannot score", "build on paretune.objectives.base.score_all"
    scores_NM = attempt(rule, remedy, lambda: task.score(prompts, texts))
    shaped = isinstance(scores_NM, np.ndarray) and scores_NM.shape == (len(prompts), m) and scores_NM.dtype == np.float64
    require(shaped, rule, f"{type(scores_NM).__name__} {np.shape(scores_NM)}", remedy)
    require(not np.isinf(scores_NM).any(), rule, "an infinity", remedy)
    empty = attempt(rule, remedy, lambda: task.score([], []))
    require(np.shape(empty) == (0, m), rule, f"shape {np.shape(empty)} for no completions", remedy)
    again = task.score(prompts[::-1], texts[::-1])[::-1]
    rule, remedy = "a score depends on its own prompt and completion only", "no state, no comparison within the batch"
    require(np.array_equal(again, scores_NM, equal_nan=True), rule, "another order of the batch gave other scores", remedy)
    alone_NM = np.concatenate([task.score([prompt], [text]) for prompt, text in zip(prompts, texts, strict=True)])
    same = np.isclose(alone_NM, scores_NM, rtol=0, atol=ROUNDING * range_M, equal_nan=True).all()
    require(bool(same), rule, "a completion scored alone got another score", remedy)


def _check_model(task: Task) -> None:
    import torch

    rule = "load() gives a fresh copy of the reference in eval mode, and its tokenizer"
    (model, tokenizer), (other, _) = (attempt(rule, "load from disk each time", task.load) for _ in range(2))
    require(not model.training, rule, "training mode", "return model.eval()")
    require(not hasattr(model, "peft_config"), rule, "a model with adapters", "merge them, or load the base model")
    mine, theirs = next(model.parameters()), next(other.parameters())
    require(bool(torch.equal(mine, theirs)), rule, "two copies with different weights", "seed the initialization")
    require(mine.data_ptr() != theirs.data_ptr(), rule, "two calls share their weights", "a method may change the model that it was given")
    require(tokenizer.eos_token_id is not None or getattr(model.config, "eos_token_id", None) is not None, "responses can end",
            "no EOS id in tokenizer or model", "set tokenizer.eos_token")  # fmt: skip


def _check_exact(task: Any) -> None:
    """Probabilities, optima and front agree with their definitions; random policies stay below the front."""
    for split in SPLITS:
        reference_PR, rewards_PRM = task.reference_logp_PR(split), task.rewards_PRM(split)
        sums = np.exp(reference_PR).sum(1)
        require(np.allclose(sums, 1, atol=1e-5), "the reference is a distribution over the responses", f"sums {sums}", "see tasks.exact")
        texts, prompts = task.responses, task.prompts(split)
        scored = task.score([prompts[0]] * len(texts), texts)
        require(np.allclose(scored, rewards_PRM[0]), "score() and rewards_PRM() agree", f"{split}: they differ", "one table for both")
        start_M = task.J_M(reference_PR, split)
        kl = float(np.abs(task.returns(reference_PR, split)[1]).max())
        require(kl < 1e-9, "the reference is no nats from itself", f"{kl}", "KL against reference_logp_PR")
        w_WM = np.concatenate([np.eye(task.objectives.count), task.judged()[:3]])
        front_WM = task.front(split, w_WM).points_KM
        above = (front_WM > task.reference_point(split)).all(1) | (np.abs(w_WM).max(1) == 1)
        require(bool(above.all()), "the reference point lies below the front", f"{task.reference_point(split)}", "nadir minus a margin")
        for w_M, point_M in zip(w_WM, front_WM, strict=True):
            own_M = task.J_M(task.optimum_logp_PR(w_M, split), split)
            require(
                np.allclose(own_M, point_M, rtol=0, atol=1e-8), "the front holds the optima", f"{own_M} and {point_M}", "one from the other"
            )
            require(w_M @ own_M >= w_M @ start_M - 1e-9, "the optimum is no worse than the reference", f"at {w_M}", "check beta's sign")
        rng = generator(0, "conformance", split)
        for number in range(40):
            noise_PR = rng.normal(0, rng.choice([0.1, 1.0, 3.0]), reference_PR.shape)
            start_PR = task.optimum_logp_PR(w_WM[number % len(w_WM)], split) if number % 2 else reference_PR
            logp_PR = start_PR + noise_PR
            logp_PR -= np.logaddexp.reduce(logp_PR, axis=1, keepdims=True)
            excess_W = w_WM @ task.J_M(logp_PR, split) - (w_WM * front_WM).sum(1)
            require(
                excess_W.max() <= 1e-9, "no policy exceeds the front", f"a random one does, by {excess_W.max():.3g}", "see J_M and front"
            )
