"""Conformance of mixings: what a class registered in MIXINGS promises, as a check that plug-in authors run.

    from paretune.testing import check_mixing

    def test_my_mixing():
        check_mixing("my-mixing")                       or {"name": "my-mixing", setting: value, ...}

What a mixing says of itself (`vertices_are_experts`, `symmetric`, `mixes_per_row`, ...; see `Policy`) is taken at its word and proved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import ConfigError
from paretune.policy.base import ATTRIBUTIONS, MIXINGS, Policy, build_mixing
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.rules import Constant, Identity
from paretune.seeds import generator
from paretune.tasks.exact.task import ExactTask
from paretune.testing.families import NATS, check_family, fill, quick_task, random_adapters
from paretune.testing.objectives import attempt, require
from paretune.types import canonical_json

__all__ = ["check_mixing"]

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
    found = generator(0, "conformance", "ids").integers(0, policy.model.config.vocab_size, (rows, WIDTH))
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
    ids_NT = _ids(policy)
    with torch.no_grad():
        want = task.load()[0](input_ids=ids_NT).logits.log_softmax(-1)
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
    padding, seen = torch.full((ROWS, 2), policy.pad_id), torch.ones_like(ids_NT)
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
