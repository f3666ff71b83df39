"""Conformance of mixings, gate rules and the families made of them, as checks that plug-in authors run.

    from paretune.testing import check_gate_rule, check_mixing

    def test_my_mixing():
        check_mixing("my-mixing")                       or {"name": "my-mixing", setting: value, ...}

    def test_my_rule():
        check_gate_rule("my-rule")                      or {"name": "my-rule", field: value, ...}, or an instance

What a mixing says of itself (`vertices_are_experts`, `symmetric`, `mixes_per_row`, ...; see `Policy`) is taken at its word and proved.
Whatever its mixing and its gate rule, a family samples, is measured, explained, exported, saved and loaded.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.evaluation.evaluate import evaluate
from paretune.evaluation.explain import explain, sensitivity
from paretune.hub import text_config
from paretune.policy.base import ATTRIBUTIONS, MIXINGS, Policy, build_mixing, build_policy
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.returns import ExactReturns
from paretune.policy.rollout import encode
from paretune.policy.rules import Constant, GateRule, Identity
from paretune.registry import GATE_RULES, TASKS
from paretune.seeds import generator
from paretune.serve.export import export, single_weights
from paretune.tasks.base import Task
from paretune.tasks.exact.task import ExactTask
from paretune.testing.objectives import attempt, check_registered, require
from paretune.types import Cost, canonical_json

__all__ = [
    "check_family",
    "check_gate_rule",
    "check_gates",
    "check_mixing",
    "check_samples",
    "exact_logp",
    "quick_task",
    "random_adapters",
    "some_preferences",
]

ROWS, WIDTH = 3, 5


def check_mixing(mixing: str | Mapping[str, Any], *, adapters: int = 3) -> None:
    """A mixing, by name or with its settings, over `adapters` random adapters of a small exact task.

    Its own tensors beside the adapters, if it has any, are filled with noise: what is untrained may be silent and prove nothing. One that
    `trains_only` is not sampled, exported or saved as a family; after `commit`, mixing "parameter" must compute the same.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = quick_task(objective_count=max(2, adapters))
        paths = random_adapters(task, adapters, folder)
        make = partial(attempt, "a mixing is built from a bank, a tokenizer and its settings", "keyword arguments with defaults")
        policy: Policy = make(lambda: _built(task, mixing, paths))
        _check_says(policy, mixing)
        _check_reference(policy, task)
        _check_vertices(policy)
        _check_rows(policy)
        _check_ways(policy)
        if policy.symmetric and policy.K == adapters > 1:
            _check_order(policy, _built(task, mixing, dict(reversed(paths.items()))))
        if policy.trains_only:
            _check_committed(policy)
            return
        rule = Identity() if task.objectives.count == policy.K else Constant(gates_K=(1 / max(1, policy.K),) * policy.K)
        family = Family(policy, rule, task.objectives, task.base(), paths, {}, max_new_tokens=task.max_new_tokens)
        check_family(family, task, folder)


def _built(task: ExactTask, mixing: str | Mapping[str, Any], paths: Mapping[str, Path]) -> Policy:
    model, tokenizer = task.load()
    named = mixing if isinstance(mixing, str) else mixing["name"]
    trained = list(paths) if MIXINGS[named].trains_only else []  # type: ignore[attr-defined]
    policy = build_mixing(mixing, LoraBank.load(model, paths, trainable=trained), tokenizer)
    known = {id(tensor) for k in range(policy.bank.count) for tensor in policy.bank.parameters_of(k)}
    fill([tensor for tensor in policy.parameters() if id(tensor) not in known], 0.3, "own")
    return policy


def _check_says(policy: Policy, given: str | Mapping[str, Any]) -> None:
    name = given if isinstance(given, str) else given["name"]
    require(policy.mixing == name, "a mixing knows its name", repr(policy.mixing), '@MIXINGS.register("its-name")')
    rule, remedy = "a mixing's settings build it again", "return what __init__ was given, as plain JSON"
    text = attempt(rule, remedy, lambda: canonical_json(policy.settings))
    again = attempt(rule, remedy, lambda: build_mixing({"name": name, **policy.settings}, policy.bank, policy.tokenizer))
    require(canonical_json(again.settings) == text, rule, f"{again.settings} for {policy.settings}", remedy)
    known = ", ".join(ATTRIBUTIONS)
    require(policy.attribution in ATTRIBUTIONS, f"attribution is one of {known}", repr(policy.attribution), '"shapley" is always right')
    require(policy.forwards_per_token > 0 and policy.copies >= 1, "a mixing says what it costs", f"{policy.copies} copies", "copies >= 1")


def _ids(policy: Policy, rows: int = ROWS) -> Tensor:
    found = generator(0, "conformance", "ids").integers(0, text_config(policy.model.config).vocab_size, (rows, WIDTH))
    return torch.from_numpy(found).to(policy.device)


def _gates(policy: Policy, rows: int = ROWS) -> Tensor:
    """(N, K) weights; the same for all rows where one batch has one gate vector."""
    drawn = generator(0, "conformance", "gates").dirichlet(np.ones(max(1, policy.K)), size=rows)[:, : policy.K]
    drawn = drawn if policy.mixes_per_row else np.tile(drawn[:1], (rows, 1))
    return torch.from_numpy(drawn).float().to(policy.device)


def _run(policy: Policy, ids_NT: Tensor, gates_NK: Tensor | None, **more: Any) -> Tensor:
    """(N, T, V) log-probabilities."""
    rule = "a mixing gives logits for every row of the batch"
    with torch.no_grad():
        logits_NTV = attempt(rule, "see `Policy.forward`", lambda: policy.forward(ids_NT, gates_NK=gates_NK, **more))
    require(bool(torch.isfinite(logits_NTV).all()), rule, "numbers that are not finite", "see `combine`")
    return logits_NTV.float().log_softmax(-1)


def _near(one: Tensor, two: Tensor, rule: str, remedy: str) -> None:
    require(one.shape == two.shape, rule, f"shapes {tuple(one.shape)} and {tuple(two.shape)}", remedy)
    off = float((one - two).abs().max()) if one.numel() else 0.0
    require(off < NATS, rule, f"{off:.3g} nats apart", remedy)


def _check_reference(policy: Policy, task: ExactTask) -> None:
    ids_NT, model = _ids(policy), task.load()[0]
    with torch.no_grad():
        want = model(input_ids=ids_NT.to(model.device)).logits.log_softmax(-1).to(policy.device)
    rule = "without gates a policy is the reference"
    _near(_run(policy, ids_NT, None), want, rule, "leave `forward` as it is")
    if policy.zero_is_reference:
        rule, remedy = "gates that are all 0 are the reference where it says so", "zero_is_reference = False"
        _near(_run(policy, ids_NT, torch.zeros(ROWS, policy.K)), want, rule, remedy)


def _check_vertices(policy: Policy) -> None:
    if not policy.vertices_are_experts:
        return
    rule, remedy = "gates e_k are adapter k alone", "vertices_are_experts = False, if that is meant"
    ids_NT = _ids(policy)
    for k in range(policy.K):
        got = _run(policy, ids_NT, torch.eye(policy.K)[k].repeat(ROWS, 1))
        with torch.no_grad(), policy.bank.gates(torch.eye(policy.bank.count)[k]):
            want = policy.model(input_ids=ids_NT).logits.log_softmax(-1)
        _near(got, want, rule, remedy)


def _check_rows(policy: Policy) -> None:
    ids_NT, gates_NK = _ids(policy), _gates(policy)
    together = _run(policy, ids_NT, gates_NK)
    rule = "a row does not depend on what else is in the batch"
    alone = torch.cat([_run(policy, ids_NT[n : n + 1], gates_NK[n : n + 1]) for n in range(ROWS)])
    _near(together, alone, rule, "mix each row with its own gates, or mixes_per_row = False")
    if policy.mixes_per_row or policy.K < 2:
        return
    try:
        policy.forward(ids_NT, gates_NK=torch.eye(policy.K)[[0, 1, 1]])
    except ConfigError:
        return
    require(False, "a mixing with one gate vector for a batch refuses several", "no error", "raise ConfigError, or mixes_per_row = True")


def _check_ways(policy: Policy) -> None:
    """The same tokens in one forward, behind padding, token by token with a cache, and from parts that were computed before."""
    ids_NT, gates_NK = _ids(policy), _gates(policy)
    want = _run(policy, ids_NT, gates_NK)
    padding, seen = ids_NT.new_full((ROWS, 2), policy.pad_id), torch.ones_like(ids_NT)
    mask = torch.cat([torch.zeros_like(padding), seen], 1)
    padded = _run(policy, torch.cat([padding, ids_NT], 1), gates_NK, attention_mask=mask, last_only=WIDTH)
    _near(padded, want, "padding on the left changes nothing", "pass attention_mask and position_ids on")
    last = _run(policy, ids_NT, gates_NK, last_only=True)
    _near(last, want[:, -1:], "`last_only` keeps the last positions", "pass last_only on")
    rule, remedy = "a cache changes nothing", "pass the cache on; what depends on the gates calls `claim_cache`"
    cache = attempt(rule, remedy, lambda: policy.new_cache(ROWS))
    steps = [_run(policy, ids_NT[:, :2], gates_NK, cache=cache)]
    steps += [_run(policy, ids_NT[:, t : t + 1], gates_NK, cache=cache) for t in range(2, WIDTH)]
    _near(torch.cat([step[:, -1:] for step in steps], 1), want[:, 1:], rule, remedy)
    if not policy.parts_need_gates:
        with torch.no_grad():
            mixed = policy.combine(policy.parts(ids_NT), gates_NK).float().log_softmax(-1)
        _near(mixed, want, "parts do not look at the gates", "parts_need_gates = True, if they do")


def _check_order(policy: Policy, turned: Policy) -> None:
    ids_NT, gates_NK = _ids(policy), _gates(policy)
    rule, remedy = "adapters in another order, with their gates, are the same policy", "symmetric = False, if that is meant"
    _near(_run(turned, ids_NT, gates_NK.flip(1)), _run(policy, ids_NT, gates_NK), rule, remedy)


def _check_committed(policy: Policy) -> None:
    ids_NT, gates_NK = _ids(policy), _gates(policy)
    want = _run(policy, ids_NT, gates_NK)
    policy.commit()
    plain = build_mixing("parameter", policy.bank, policy.tokenizer)
    _near(_run(plain, ids_NT, gates_NK), want, "what was trained is written into the adapters", "see `Policy.commit`")


PAIRS, STEP = 40, 1e-7  # preferences that are looked at twice, and how far apart


def check_gate_rule(
    rule: GateRule | str | Mapping[str, Any],
    *,
    objectives: int = 2,
    mixing: str | Mapping[str, Any] = "parameter",
    adapters: int | None = None,
) -> None:
    """A gate rule (an instance, a name, or {"name": ..., fields}) for this many objectives, in a family of random adapters.

    `mixing` is where its gates are used, and `adapters` how many there are, if not one per gate.
    """
    rule = GATE_RULES.build(rule) if isinstance(rule, (str, Mapping)) else rule
    if not rule.searches:
        check_registered(rule, GATE_RULES, GateRule)
    task = quick_task(objective_count=objectives)
    w_WM = some_preferences(task)
    remedy = "gates(w_WM) gives one row per preference"
    count = attempt("a gate rule gives gates to every preference", remedy, lambda: np.shape(rule.gates(w_WM))[1])
    _check_steps(rule, objectives)
    cost = attempt("a gate rule says what its searches cost", "cost(w_WM) gives a Cost", lambda: rule.cost(w_WM))
    require(isinstance(cost, Cost), "a gate rule says what its searches cost", repr(cost), "cost(w_WM) gives a Cost")
    frozen = rule.frozen()
    check_registered(frozen, GATE_RULES, GateRule)
    same = np.array_equal(frozen.gates(w_WM), rule.gates(w_WM))
    require(same, "what is written to disk has the gates that were asked for", "other gates", "see `frozen`")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = random_adapters(task, count if adapters is None else adapters, folder)
        policy = build_policy(task, mixing, paths)
        family = Family(policy, rule, task.objectives, task.base(), paths, {}, max_new_tokens=task.max_new_tokens)
        check_gates(family, list(task.prompts("test")), w_WM)
        check_family(family, task, folder)


def _check_steps(rule: GateRule, objectives: int) -> None:
    """Gates of near preferences are equal, but for a few pairs across a border, if and only if the rule is `stepwise`."""
    if rule.searches:
        return
    rng = generator(0, "conformance", "steps")
    w_WM = rng.dirichlet(np.full(objectives, 2.0), size=PAIRS)
    near_WM = (1 - STEP) * w_WM + STEP * np.roll(w_WM, 1, axis=0)
    equal = int((rule.gates(w_WM) == rule.gates(near_WM)).all(1).sum())
    found = f"{equal} of {PAIRS} pairs of near preferences have equal gates, and stepwise = {rule.stepwise}"
    want = equal >= 0.9 * PAIRS if rule.stepwise else equal <= 0.1 * PAIRS
    require(want, "a rule says whether its gates move in steps", found, f"stepwise = {not rule.stepwise}")


NATS = 1e-3  # by which log-probabilities of one token may differ that are computed in two ways, in float32
PATH = 0.02  # nats that the quadrature of an explanation may miss in a token
SAMPLES, SIGMAS = 256, 5.0  # of the sampled evaluation; its seed is fixed, so that it never fails by chance


def quick_task(**dials: Any) -> ExactTask:
    """The exact task that the suites run on: 85 responses to each of 4 + 4 prompts."""
    return TASKS.build({"name": "exact-v1", "alphabet": 4, "length": 3, "prompt_count": 4, "width": 32, "layers": 1, **dials})


def random_adapters(task: Task, count: int, folder: Path, *, rank: int = 4, scale: float = 0.2) -> dict[str, Path]:
    """`count` adapters of a task's model, far from each other and from the reference, written into `folder`."""
    names = [f"adapter-{k}" for k in range(count)]
    bank = LoraBank.attach(task.load()[0], names=names, seed=0, rank=rank, alpha=32)
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
            ids = torch.cat([torch.tensor([made.prefix], dtype=torch.long), ids_1T.cpu()], 1)
            got = _logp(lambda ids, model=model: model.eval()(input_ids=ids).logits, ids)[:, len(made.prefix) :]
            off = float((got - want.cpu()).abs().max())
            require(off < NATS, rule, f"{kind} at w = {w_M.round(3).tolist()}: {off:.3g} nats off", remedy)


def _logp(forward: Any, *given: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return forward(*given, **more).log_softmax(-1)


def _check_saved(family: Family, task: ExactTask, w_WM: np.ndarray, path: Path) -> None:
    rule, remedy = "a saved family is the same family", "`settings`, `save_extra` and the rule's fields describe everything"
    prompts, told = task.prompts("test"), copy.deepcopy(family.meta)
    gates_W = family.gates(w_WM, prompts)
    attempt(rule, remedy, partial(family.save, path))
    loaded = attempt(rule, remedy, partial(Family.load, path, device=family.policy.device))
    require(np.array_equal(loaded.gates(w_WM, prompts), gates_W), rule, "other gates at the same preferences", remedy)
    said = [(f.policy.mixing, f.policy.settings, f.experts, f.utility, f.max_new_tokens) for f in (family, loaded)]
    require(said[0] == said[1] and loaded.meta == told, rule, f"{said[1]} for {said[0]}", remedy)
    for gates in gates_W:
        same = np.array_equal(exact_logp(task, loaded, "test", gates), exact_logp(task, family, "test", gates))
        require(same, rule, "other probabilities at the same gates", remedy)
