"""Adapters that share their factors: what is computed, what is trained, and that plain LoRAs come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles import small_task
from paretune.errors import ConfigError
from paretune.policy.base import build_mixing
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import TiedMix
from paretune.policy.rules import TiedRule
from paretune.registry import LEARNERS, METHODS
from paretune.testing.methods import quick_learner, train_plan


@pytest.fixture(scope="module")
def task():
    return small_task(rho=-0.8)


def tied_policy(task, *, ranks=(4, 3, 3), own=1, shaken=True):
    model, tokenizer = task.load()
    bank = LoraBank(model)
    for i, rank in enumerate(ranks):
        bank.add(f"part-{i}", seed=3, rank=rank, alpha=2 * rank)
    policy = build_mixing({"name": "tied", "own": own, "seed": 5}, bank, tokenizer)
    assert isinstance(policy, TiedMix)
    if shaken:  # B is 0 at first
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in policy.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return policy


def test_it_is_the_bilinear_formula(task):
    """Against dense weights: W + 2 B_0 A_0 + 2 B (w_1 C_1 + w_2 C_2) A, with the scaling alpha / rank = 2."""
    policy, w_M = tied_policy(task), (0.3, 0.7)
    ids = torch.tensor([[1, 2, 3, 4]])
    found = policy.forward(ids, gates_NK=torch.tensor([[1.0, *w_M]]))
    dense, _ = task.load()
    for layer, _, a_rI, b_Or, cores in policy._parts:
        core = sum(w * core for w, core in zip(w_M, cores, strict=True))
        change = 2 * (layer.b[0] @ layer.a[0]) + 2 * (b_Or @ core @ a_rI)
        with torch.no_grad():
            dense.get_submodule(layer.name).weight += change
    torch.testing.assert_close(found, dense(ids).logits, atol=1e-5, rtol=1e-5)


def test_gradients_reach_everything_that_is_trained_and_nothing_else(task):
    policy = tied_policy(task)
    policy.forward(torch.tensor([[1, 2, 3]]), gates_NK=torch.tensor([[1.0, 0.4, 0.6]])).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in policy.parameters())
    layers, (size, rank, own) = len(policy.bank.layers), (0, 3, 4)
    size = sum(layer.a[0].shape[1] + layer.b[0].shape[0] for layer in policy.bank.layers)
    assert sum(tensor.numel() for tensor in policy.parameters()) == size * (own + rank) + layers * 2 * rank**2


def test_committed_adapters_are_the_same_policy_as_plain_loras(task, tmp_path):
    policy, gates = tied_policy(task), torch.tensor([[1.0, 0.3, 0.7], [1.0, 1.0, 0.0]])
    ids = torch.tensor([[1, 2, 3, 4], [2, 2, 1, 3]])
    before = policy.forward(ids, gates_NK=gates)
    for _ in range(2):  # again changes nothing
        policy.commit()
    for name in policy.bank.names:
        policy.bank.save(name, tmp_path / name)
    model, tokenizer = task.load()
    plain = build_mixing("parameter", LoraBank.load(model, {name: tmp_path / name for name in policy.bank.names}), tokenizer)
    torch.testing.assert_close(plain.forward(ids, gates_NK=gates), before, atol=1e-5, rtol=1e-5)


def test_a_fresh_policy_is_the_reference(task):
    policy, ids = tied_policy(task, shaken=False), torch.tensor([[1, 2, 3]])
    mixed = policy.forward(ids, gates_NK=torch.tensor([[1.0, 0.5, 0.5]]))
    assert torch.equal(mixed, policy.forward(ids, gates_NK=None))


def test_a_trained_family_shares_its_factors(task, tmp_path):
    method, learner = METHODS.build({"name": "conditioned", "structure": "pblora"}), quick_learner(steps=12)
    (spec,) = method.plan(task, learner, {}, 0)
    assert spec.rule["name"] == "tied"
    done = train_plan(method, task, learner, tmp_path / "a", seed=0)
    family = method.policy(task, learner, done, 0)
    for layer in family.policy.bank.layers:
        _, first, second = layer.a
        assert torch.equal(first, second)
        both = torch.cat(layer.b[1:], dim=1)
        assert torch.linalg.matrix_rank(both, tol=1e-5) <= layer.ranks[1] < both.shape[1]
        assert not torch.equal(layer.b[1], layer.b[2]), "each objective has its own core"
    gates = family.gates(np.array([[0.25, 0.75]]))
    assert gates.tolist() == [[1.0, 0.25, 0.75]] == TiedRule().gates(np.array([[0.25, 0.75]])).tolist()


def test_killed_and_resumed_is_bitwise_the_same(task, tmp_path):
    learner = LEARNERS.build({"name": "exact", "steps": 6, "checkpoint_every": 2, "log_every": 1})
    (spec,) = METHODS.build({"name": "conditioned", "structure": "pblora"}).plan(task, learner, {}, 0)

    def kill(record):
        if record["step"] == 5:
            raise KeyboardInterrupt

    learner.train(spec, task, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learner.train(spec, task, tmp_path / "cut", progress=kill)
    learner.train(spec, task, tmp_path / "cut")
    for i in range(3):
        whole, cut = ((tmp_path / name / f"adapter-{i}" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
        assert whole == cut


def test_what_cannot_share_is_refused(task):
    with pytest.raises(ConfigError, match="share factors have one rank"):
        tied_policy(task, ranks=(4, 3, 2))
    with pytest.raises(ConfigError, match="at least two adapters share"):
        tied_policy(task, ranks=(4, 3))
