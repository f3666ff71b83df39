"""Routers: constants are plain gates, layers below and between have their own, caches and gradients are right, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from paretune.errors import ConfigError
from paretune.policy.lora.bank import LoraBank
from paretune.policy.lora.decoder import routed
from paretune.seeds import forked_torch
from tiny_models import dense_soup, gap, gpt2, llama, some_gates, some_ids, write_adapters


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_adapters(llama, tmp_path_factory.mktemp("experts"), [{}, {}, {}])


class Small(nn.Module):
    """softmax(U tanh(V [h, w])): gates that depend on the token and on the preference."""

    def __init__(self, seed: int, *, width: int = 32, objectives: int = 2, adapters: int = 3):
        super().__init__()
        with forked_torch(seed):
            self.inner, self.outer = nn.Linear(width + objectives, 5), nn.Linear(5, adapters)
            for p in self.parameters():
                nn.init.normal_(p, 0, 1)

    def forward(self, h_NTH: Tensor, w_NM: Tensor) -> Tensor:
        w_NTM = w_NM[:, None].expand(-1, h_NTH.shape[1], -1)
        return self.outer(torch.tanh(self.inner(torch.cat([h_NTH, w_NTM], -1)))).softmax(-1)


def constant(gates_NK):
    return lambda h_NTH, w_NM: gates_NK[:, None].expand(-1, h_NTH.shape[1], -1)


@torch.no_grad()
def run(bank, routers, ids_NT, w_NM=None, **more):
    w_NM = torch.ones(len(ids_NT), 2) / 2 if w_NM is None else w_NM
    with routed(bank, routers, w_NM):
        return bank.base(input_ids=ids_NT, **more).logits


@torch.no_grad()
def under_gates(bank, gates, ids_NT):
    with bank.gates(gates):
        return bank.base(input_ids=ids_NT).logits


def test_a_constant_router_is_plain_gates(paths):
    bank, ids_NT, gates_NK = LoraBank.load(llama(), paths), some_ids(), some_gates(4, 3)
    assert gap(run(bank, {0: constant(gates_NK)}, ids_NT), under_gates(bank, gates_NK, ids_NT)) < 1e-6
    tokens_NTK = some_gates(4, 7, 3, seed=4)
    assert gap(run(bank, {0: lambda h, w: tokens_NTK}, ids_NT), under_gates(bank, tokens_NTK, ids_NT)) < 1e-6
    with torch.inference_mode():
        assert gap(run(bank, {0: constant(gates_NK)}, ids_NT).clone(), under_gates(bank, gates_NK, ids_NT)) < 1e-6


def test_below_the_first_router_no_adapter_acts_and_each_layer_may_have_its_own(tmp_path, paths):
    """Against dense weights: every layer's soup written in at that layer's gates."""
    ids_NT, low_K, high_K = some_ids(), torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.7, -0.1, 0.6])
    bank = LoraBank.load(llama(), paths)
    for first_K in (torch.zeros(3), low_K):
        dense = dense_soup(llama, paths, first_K)
        dense.model.layers[1] = dense_soup(llama, paths, high_K).model.layers[1]
        with torch.no_grad():
            want = dense(input_ids=ids_NT).logits
        routers = {1: constant(high_K.repeat(4, 1))}
        if first_K is low_K:
            routers[0] = constant(low_K.repeat(4, 1))
        assert gap(run(bank, routers, ids_NT), want) < 1e-5
        assert gap(run(bank, {0: constant(high_K.repeat(4, 1))}, ids_NT), want) > 1e-3


def test_a_router_reads_the_input_of_its_layer_and_the_preference(paths):
    bank, ids_NT, w_NM, seen = LoraBank.load(llama(), paths), some_ids(), some_gates(4, 2), {}

    def spy(at, gates_NK):
        def router(h_NTH, given_NM):
            seen[at] = h_NTH.clone()
            assert given_NM is w_NM
            return constant(gates_NK)(h_NTH, given_NM)

        return router

    gates_NK = some_gates(4, 3)
    run(bank, {at: spy(at, gates_NK) for at in (0, 1)}, ids_NT, w_NM)
    with torch.no_grad(), bank.gates(gates_NK):
        states = bank.base(input_ids=ids_NT, output_hidden_states=True).hidden_states
    for at in (0, 1):
        assert torch.allclose(seen[at], states[at], atol=1e-5)


def test_preferences_and_tokens_matter_and_rows_do_not_depend_on_the_batch(paths):
    bank, ids_NT, w_NM, routers = LoraBank.load(llama(), paths), some_ids(), some_gates(4, 2), {0: Small(1), 1: Small(2)}
    whole = run(bank, routers, ids_NT, w_NM)
    assert gap(whole[[2, 0]], run(bank, routers, ids_NT[[2, 0]], w_NM[[2, 0]])) < 1e-5
    assert gap(whole, run(bank, routers, ids_NT, w_NM.flip(1) + 0.3)) > 1e-3
    with torch.no_grad(), routed(bank, routers, w_NM):  # two forwards in one context: nothing is left of the first
        bank.base(input_ids=ids_NT.flip(0))
        assert gap(bank.base(input_ids=ids_NT).logits, whole) < 1e-6


def test_cached_decoding_equals_one_pass(paths):
    bank, ids_NT, w_NM, routers = LoraBank.load(llama(), paths), some_ids(4, 9), some_gates(4, 2), {0: Small(1), 1: Small(2)}
    whole = run(bank, routers, ids_NT, w_NM)
    cache = DynamicCache(config=bank.base.config)
    steps = [run(bank, routers, ids_NT[:, a:b], w_NM, past_key_values=cache, use_cache=True) for a, b in ((0, 5), (5, 6), (6, 7), (7, 9))]
    assert gap(torch.cat(steps, 1), whole) < 1e-5


def test_gradients_are_finite_differences(paths):
    """Double precision; of router weights, adapter weights and the preference, along random directions."""
    model = llama(torch.float64)
    bank = LoraBank.load(model, paths, trainable=["e1"])
    bank.model.double()
    routers, ids_NT = {0: Small(1).double(), 1: Small(2).double()}, some_ids(2, 5)
    w_NM = some_gates(2, 2).double().requires_grad_()
    variables = [w_NM, *routers[0].parameters(), *routers[1].parameters(), *bank.parameters()]

    def value():
        with routed(bank, routers, w_NM):
            return bank.base(input_ids=ids_NT).logits.log_softmax(-1)[..., 3].sum()

    gradients = torch.autograd.grad(value(), variables)
    assert all(float(g.abs().max()) > 1e-6 for g in gradients)
    for seed, (variable, gradient) in enumerate(zip(variables, gradients, strict=True)):
        direction = torch.randn(variable.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        direction /= direction.norm()
        ends = []
        for step in (1e-3, -2e-3):  # norms are float32 even here, which limits how small a step can be
            with torch.no_grad():
                variable.add_(step * direction)
                ends.append(float(value()))
        with torch.no_grad():
            variable.add_(1e-3 * direction)
        slope = float((gradient * direction).sum())
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, abs=5e-3 * float(gradient.norm()))


def test_gradient_checkpointing_recomputes_each_layer_under_its_own_gates(paths):
    found = []
    for checkpointing in (False, True):
        bank, routers = LoraBank.load(llama(num_hidden_layers=2), paths, trainable=["e1"]), {0: Small(1), 1: Small(2)}
        if checkpointing:
            bank.base.gradient_checkpointing_enable({"use_reentrant": False})
            bank.base.train()
        with routed(bank, routers, some_gates(4, 2)):
            bank.base(input_ids=some_ids(), use_cache=False).logits.log_softmax(-1)[..., 3].sum().backward()
        found.append([p.grad for p in (*routers[0].parameters(), *routers[1].parameters(), *bank.parameters())])
    assert all(torch.allclose(a, b, atol=1e-5 + 1e-4 * float(a.abs().max())) for a, b in zip(*found, strict=True))


def refused(*parts: str):
    return pytest.raises(ConfigError, match=".*".join(f"(?s:.*){re.escape(part)}" for part in parts))


def test_what_is_refused(tmp_path, paths):
    bank, ids_NT = LoraBank.load(llama(), paths), some_ids()
    for routers, found in (({}, "routers at []"), ({2: Small(1)}, "routers at [2] for a model of 2 layers"), ({-1: Small(1)}, "at [-1]")):
        with refused("each router stands at a decoder layer", found, "number them from 0"):
            run(bank, routers, ids_NT)
    with refused("a router gives every token a gate per adapter", "gates (4, 3) for hidden states (4, 7, 32) and 3 adapters"):
        run(bank, {0: lambda h, w: torch.ones(4, 3)}, ids_NT)
    assert not bank.stack[0]._forward_pre_hooks, "hooks go with their context"
    with pytest.raises(ConfigError, match="a model with a LoraBank runs under gates"):
        bank.base(input_ids=ids_NT)
    model = llama()
    model.model.spare = nn.ModuleList([nn.Identity(), nn.Identity()])  # which of two lists of layers is it?
    with refused("routers need to know the decoder layer of every adapter", "no list of layers that is the decoder's in LlamaForCausalLM"):
        run(LoraBank.attach(model, names=[], seed=0), {0: Small(1)}, ids_NT)
    model = llama()
    model.model.adapter = nn.Linear(32, 32)
    outside = LoraBank.attach(model, names=["a"], targets=["adapter", "q_proj"], seed=0)
    with refused("routers need to know the decoder layer of every adapter", "model.adapter is in none"):
        run(outside, {0: Small(1)}, ids_NT)


def test_other_models_and_the_head(tmp_path, paths):
    """GPT-2's layers, and adapters of the head, which come after the last router."""
    experts = write_adapters(gpt2, tmp_path / "gpt2", [{"fan_in_fan_out": True}] * 2)
    bank, ids_NT, gates_NK = LoraBank.load(gpt2(), experts), some_ids(), some_gates(4, 2)
    assert gap(run(bank, {0: constant(gates_NK)}, ids_NT), under_gates(bank, gates_NK, ids_NT)) < 1e-6
    experts = write_adapters(llama, tmp_path / "head", [{"target_modules": ["q_proj", "lm_head"]}] * 2)
    bank = LoraBank.load(llama(), experts)
    assert gap(run(bank, {1: constant(gates_NK), 0: constant(gates_NK)}, ids_NT), under_gates(bank, gates_NK, ids_NT)) < 1e-6
