"""Conformance of families: whatever its mixing and its gate rule, a family samples, is measured, explained, exported, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.evaluation.evaluate import evaluate
from paretune.evaluation.explain import explain, sensitivity
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.returns import ExactReturns
from paretune.policy.rollout import encode
from paretune.registry import TASKS
from paretune.seeds import generator
from paretune.serve.export import export, single_weights
from paretune.tasks.base import Task
from paretune.tasks.exact.task import ExactTask
from paretune.testing.objectives import attempt, require

__all__ = ["check_family", "check_gates", "check_samples", "exact_logp", "quick_task", "random_adapters", "some_preferences"]

NATS = 1e-3  # by which log-probabilities of one token may differ that are computed in two ways, in float32
PATH = 0.02  # nats that the quadrature of an explanation may miss in a token
SAMPLES, SIGMAS = 256, 5.0  # of the sampled evaluation; its seed is fixed, so that it never fails by chance


def quick_task(**dials: Any) -> ExactTask:
    """The exact task that the suites run on: 85 responses to each of 4 + 4 prompts."""
    return TASKS.build({"name": "exact-v1", "alphabet": 4, "length": 3, "prompt_count": 4, "width": 32, "layers": 1, **dials})


def random_adapters(task: Task, count: int, folder: Path, *, rank: int = 4, scale: float = 0.2) -> dict[str, Path]:
    """`count` adapters of a task's model, far from each other and from the reference, written into `folder`."""
    names = [f"adapter-{k}" for k in range(count)]
    bank = LoraBank.attach(task.load()[0], names=names, seed=0, rank=rank)
    for k, name in enumerate(names):
        fill(bank.parameters_of(k), scale, "adapter", k)
        bank.save(name, folder / name)
    return {name: folder / name for name in names}


def fill(tensors: Sequence[Tensor], scale: float, *names: Any) -> None:
    """Overwrite with seeded noise."""
    rng = generator(0, "conformance", *names)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.from_numpy(rng.normal(0, scale, tuple(tensor.shape))))


def some_preferences(task: Task, *, ties: bool = True) -> np.ndarray:
    """(W, M): the vertices, two others, and the center unless `ties` are out: two nearest policies have no symmetric answer."""
    m = task.objectives.count
    return np.concatenate([np.eye(m), generator(0, "conformance").dirichlet(np.ones(m), size=2), np.full((int(ties), m), 1 / m)])


def exact_logp(task: ExactTask, family: Family, split: str, gates: np.ndarray) -> np.ndarray:
    """(P, R) log-probabilities of every response."""
    return ExactReturns(task, family.policy, split).logp_PR(gates)


def check_family(family: Family, task: ExactTask, folder: Path, *, path: float = PATH) -> None:
    """All that is done with a family, on an exact task; `path` is what its explanations may miss, in nats."""
    w_WM = some_preferences(task)
    check_gates(family, list(task.prompts("test"))[:3], w_WM)
    check_samples(family, task, w_WM)
    _check_measured(family, task, w_WM)
    _check_explained(family, task, w_WM, path)
    _check_exported(family, task, w_WM, folder)
    _check_saved(family, task, w_WM, folder / "saved")


def check_gates(family: Family, prompts: list[Any], w_WM: np.ndarray) -> None:
    """Gates are finite, of the right shape, and each preference's and prompt's own."""
    rule = "a family has gates for every preference, each by itself"
    remedy = "the rule's gates(w_WM) returns a finite (W, K) array, row by row"
    gates_WK = attempt(rule, remedy, lambda: family.gates(w_WM))
    shape = (len(w_WM), family.policy.K)
    require(gates_WK.shape == shape and np.isfinite(gates_WK).all(), rule, f"shape {gates_WK.shape} for {shape}, or not finite", remedy)
    backwards = attempt(rule, remedy, lambda: family.gates(w_WM[::-1]))[::-1]
    alone = np.concatenate([attempt(rule, remedy, partial(family.gates, w[None])) for w in w_WM])
    require(np.array_equal(backwards, gates_WK) and np.array_equal(alone, gates_WK), rule, "gates depend on the other rows", remedy)
    if family.rule.per_prompt:
        gates_WPK = attempt(rule, remedy, lambda: family.gates(w_WM, prompts))
        backwards = attempt(rule, remedy, lambda: family.gates(w_WM[::-1], prompts[::-1]))[::-1, ::-1]
        alone = np.stack([np.concatenate([family.gates(w[None], [prompt])[0] for prompt in prompts]) for w in w_WM])
        same = np.array_equal(backwards, gates_WPK) and np.array_equal(alone, gates_WPK)
        require(same and np.isfinite(gates_WPK).all(), rule, "a prompt's gates depend on the other rows, or are not finite", remedy)


def check_samples(family: Family, task: Task, w_WM: np.ndarray) -> None:
    """`Family.sample` answers the same way for the same seed, whatever else is in the batch."""
    prompts = list(task.prompts("test"))[:3]
    rule, remedy = "a family answers every prompt at every preference, the same way for the same seed", "draw only from the seed"
    for w_M in w_WM:

        def ask(given: list[Any], w_M: np.ndarray = w_M) -> list[list[str]]:
            request = partial(family.sample, given, w_M.tolist(), n=2, seed=0, max_new_tokens=task.max_new_tokens)
            return attempt(rule, remedy, request)

        first = ask(prompts)
        require([len(row) for row in first] == [2] * len(prompts), rule, f"{[len(r) for r in first]} answers", "n answers per prompt")
        require(first == ask(prompts), rule, f"two different answers at w = {w_M.round(3).tolist()}", remedy)
        require(ask(prompts[::-1]) == first[::-1], rule, "the order of the prompts changed the answers", remedy)


def _check_measured(family: Family, task: ExactTask, w_WM: np.ndarray) -> None:
    """Probabilities of all responses sum to 1; what is sampled has the exact probabilities, and the exact rewards on the whole."""
    rule, remedy = "sampling, scoring and enumerating agree", "parts and combine give the same with a cache, padding or a packed tree"
    measure = partial(evaluate, task, family, w_WM=w_WM, splits=["train"], samples=SAMPLES)
    exact, drawn = (attempt(rule, remedy, partial(measure, exact=how)) for how in (True, False))
    prompts = task.prompts("train")
    gates_W = family.gates(w_WM, prompts)
    logp_WPR = np.stack([exact_logp(task, family, "train", gates) for gates in gates_W])
    off = float(np.abs(np.exp(logp_WPR).sum(2) - 1).max())
    require(off < 1e-5, "the policy is a distribution over responses", f"probabilities sum to 1 +- {off:.2g}", "give logits, not values")
    ratio_WPR, curve = logp_WPR - task.reference_logp_PR("train"), drawn.curves["train"]
    shown = drawn.metrics["splits"]["train"]["generations"]
    for number, texts in zip(shown["preferences"], shown["texts"], strict=True):
        for s, text in enumerate(texts):
            known = float(ratio_WPR[number, curve.prompt_S[s], task.responses.index(text)])
            found = float(curve.kl_WS[number, s])
            require(abs(known - found) < NATS * task.max_new_tokens, rule, f"{text!r} has {found:.4f} nats, enumerated {known:.4f}", remedy)
    want_WM = exact.curves["train"].rewards_WSM.mean(1)
    error_WM = curve.rewards_WSM.std(1) / np.sqrt(SAMPLES) + 1e-6
    worst = float((np.abs(curve.rewards_WSM.mean(1) - want_WM) / error_WM).max())
    require(worst < SIGMAS, rule, f"sampled rewards are {worst:.1f} standard errors from the exact ones", remedy)


def _check_explained(family: Family, task: ExactTask, w_WM: np.ndarray, path: float) -> None:
    rule = "an explanation's parts sum to the log-ratio of every token"
    remedy = 'attribution = "shapley" is right for every mixing'
    prompt = task.prompts("test")[0]
    for w_M in w_WM:
        preference = w_M.tolist()
        (found,) = attempt(rule, remedy, partial(explain, family, prompt, preference, seed=0))
        said = family.sample([prompt], preference, seed=0)[0][0]
        require(found.response == said, "what is explained is what was sampled", f"{found.response!r} for {said!r}", "the same gates")
        parts_T = found.contribution_TK.sum(1) + found.normalizer_T + found.remainder_T
        off, missed = float(np.abs(parts_T - found.ratio_T).max()), float(np.abs(found.remainder_T).max())
        require(off < 1e-9 and missed < path, rule, f"{missed:.3g} nats are missed by {found.how!r}", remedy)
    if len(w_WM) > task.objectives.count:
        slopes = attempt("returns have slopes", "see `sensitivity`", partial(sensitivity, task, family, w_WM[-1].tolist()))
        require(bool(np.isfinite(slopes.slope_MM).all()), "returns have slopes", "slopes that are no numbers", "finite gates")


def _check_exported(family: Family, task: ExactTask, w_WM: np.ndarray, folder: Path) -> None:
    """What is exported computes what the family does, as transformers and PEFT load it; what cannot be is refused in three parts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rule, remedy = "an export computes what the family computes", "see `Policy.single_weights`"
    prompt = task.prompts("test")[0]
    ids_1T, _ = encode(family.policy.tokenizer, [prompt], family.policy.device)
    for number, w_M in enumerate(w_WM):
        try:
            weights = single_weights(family, w_M)
        except ConfigError as error:
            require(bool(error.found and error.remedy), "what is refused is explained", str(error), "give a reason")
            continue
        want = _logp(family.policy.forward, ids_1T, gates_NK=torch.from_numpy(family.gates(w_M[None])).float())
        for kind in ("merged", "adapter") if weights.how in ("delta", "factor") else ("merged",):
            out = folder / f"export-{number}-{kind}"
            made = attempt(rule, remedy, partial(export, family, out, w_M.tolist(), kind=kind))
            model = AutoModelForCausalLM.from_pretrained(out) if kind == "merged" else PeftModel.from_pretrained(task.load()[0], str(out))
            ids = torch.cat([torch.tensor([made.prefix], dtype=torch.long), ids_1T], 1)
            got = _logp(lambda ids, model=model: model.eval()(input_ids=ids).logits, ids)[:, len(made.prefix) :]
            off = float((got - want).abs().max())
            require(off < NATS, rule, f"{kind} at w = {w_M.round(3).tolist()}: {off:.3g} nats off", remedy)


def _logp(forward: Any, *given: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return forward(*given, **more).log_softmax(-1)


def _check_saved(family: Family, task: ExactTask, w_WM: np.ndarray, path: Path) -> None:
    rule, remedy = "a saved family is the same family", "`settings`, `save_extra` and the rule's fields describe everything"
    prompts, told = task.prompts("test"), copy.deepcopy(family.meta)
    gates_W = family.gates(w_WM, prompts)
    attempt(rule, remedy, partial(family.save, path))
    loaded = attempt(rule, remedy, partial(Family.load, path))
    require(np.array_equal(loaded.gates(w_WM, prompts), gates_W), rule, "other gates at the same preferences", remedy)
    said = [(f.policy.mixing, f.policy.settings, f.experts, f.utility, f.max_new_tokens) for f in (family, loaded)]
    require(said[0] == said[1] and loaded.meta == told, rule, f"{said[1]} for {said[0]}", remedy)
    for gates in gates_W:
        same = np.array_equal(exact_logp(task, loaded, "test", gates), exact_logp(task, family, "test", gates))
        require(same, rule, "other probabilities at the same gates", remedy)
