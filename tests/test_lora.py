"""Gated LoRA against PEFT's own forward, PEFT's `cat` and dense weights; and every guard with its text."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from paretune.errors import ConfigError
from paretune.policy.lora.bank import LoraBank, soup_state
from paretune.seeds import forked_torch
from tiny_models import dense_soup, gap, gpt2, llama, peft_logits, some_gates, some_ids, write_adapters

UNEQUAL = [
    {"r": 4, "lora_alpha": 8},
    {"r": 3, "lora_alpha": 12, "use_rslora": True},
    {"r": 5, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Three experts of one shape on the tiny Llama."""
    return write_adapters(llama, tmp_path_factory.mktemp("experts"), [{}, {}, {}])


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Other ranks, scalings (one rank-stabilised) and targets."""
    return write_adapters(llama, tmp_path_factory.mktemp("unequal"), UNEQUAL, seed=1)


def run(bank: LoraBank, ids_NT, gates=None):
    with torch.no_grad(), bank.gates(gates):
        return bank.base(input_ids=ids_NT).logits


def test_per_row_gates_are_the_dense_soup(paths, unequal):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3) * 2 - 0.5  # off the simplex and negative too
    for experts in (paths, unequal):
        bank = LoraBank.load(llama(), experts)
        logits_NTV = run(bank, ids_NT, gates_NK)
        for n in range(4):
            with torch.no_grad():
                dense = dense_soup(llama, experts, gates_NK[n])(input_ids=ids_NT[n : n + 1]).logits
            assert gap(logits_NTV[n : n + 1], dense) < 1e-5
        with torch.no_grad():
            assert gap(run(bank, ids_NT), llama()(input_ids=ids_NT).logits) == 0
        assert gap(logits_NTV, run(bank, ids_NT)) > 0.1


def test_conv1d_layers_are_supported(tmp_path):
    experts = write_adapters(gpt2, tmp_path, [{"fan_in_fan_out": True}, {"r": 2, "fan_in_fan_out": True}])
    ids_NT, gates_NK = some_ids(), some_gates(4, 2)
    bank = LoraBank.load(gpt2(), experts)
    logits_NTV = run(bank, ids_NT, gates_NK)
    for n in range(4):
        merged = gpt2()
        assert not merged.load_state_dict(soup_state(bank, gates_NK[n]), strict=False).unexpected_keys
        with torch.no_grad():
            here = ids_NT[n : n + 1]
            assert gap(logits_NTV[n : n + 1], dense_soup(gpt2, experts, gates_NK[n])(input_ids=here).logits) < 1e-5
            assert gap(logits_NTV[n : n + 1], merged(input_ids=here).logits) < 1e-5
    bank.export(gates_NK[0], tmp_path / "soup")
    assert gap(logits_NTV[:1], peft_logits(gpt2, tmp_path / "soup", ids_NT[:1])) < 1e-5


def test_peft_cat_agrees_and_linear_and_factor_do_not(paths):
    ids_NT, gates_K = some_ids(), torch.tensor([0.5, 0.3, 0.2])
    bank = LoraBank.load(llama(), paths)
    ours = run(bank, ids_NT, gates_K)
    with bank.factor(gates_K), torch.no_grad():
        factor = bank.base(input_ids=ids_NT).logits
    peft = PeftModel.from_pretrained(llama(), str(paths["e0"]), adapter_name="e0").eval()
    for name in ("e1", "e2"):
        peft.load_adapter(str(paths[name]), adapter_name=name)
    mixed = {}
    for how in ("cat", "linear"):
        peft.add_weighted_adapter(["e0", "e1", "e2"], gates_K.tolist(), adapter_name=how, combination_type=how)
        peft.set_adapter(how)
        with torch.no_grad():
            mixed[how] = peft(input_ids=ids_NT).logits
    assert gap(ours, mixed["cat"]) < 1e-5
    size = gap(ours, run(bank, ids_NT))
    assert gap(ours, mixed["linear"]) > 0.1 * size
    assert gap(ours, factor) > 0.1 * size
    merged = llama()
    merged.load_state_dict(soup_state(bank, gates_K, how="factor"), strict=False)
    with torch.no_grad():
        assert gap(factor, merged(input_ids=ids_NT).logits) < 1e-5


def test_zero_gates_are_the_reference_bit_for_bit(paths):
    bank, ids_NT = LoraBank.load(llama(), paths), some_ids()
    with torch.no_grad():
        reference = llama()(input_ids=ids_NT).logits
    assert torch.equal(run(bank, ids_NT, np.zeros((4, 3))), reference)
    with bank.gates(torch.zeros(4, 3)):  # with a graph: another path through the code
        assert torch.equal(bank.base(input_ids=ids_NT).logits, reference)
    with bank.gates(some_gates(4, 3)), bank.model.disable_adapter():
        assert torch.equal(bank.base(input_ids=ids_NT).logits, reference)


def test_a_row_does_not_depend_on_its_batch(paths):
    bank, ids_NT, gates_NK = LoraBank.load(llama(), paths), some_ids(6), some_gates(6, 3)
    whole = run(bank, ids_NT, gates_NK)
    order = [5, 1, 3]
    assert gap(whole[order], run(bank, ids_NT[order], gates_NK[order])) < 1e-5
    assert gap(whole[order], run(bank, ids_NT[order], gates_NK[[1, 3, 5]])) > 1e-3  # the gates do matter, row by row


def test_the_forms_of_gates_agree_and_tokens_have_their_own(paths):
    bank, ids_NT, gates_NK = LoraBank.load(llama(), paths), some_ids(), some_gates(4, 3)
    rows = run(bank, ids_NT, gates_NK)
    assert torch.equal(rows, run(bank, ids_NT, gates_NK.numpy()))
    assert gap(rows, run(bank, ids_NT, gates_NK[:, None].expand(4, 7, 3))) < 1e-6
    own = gates_NK.clone()
    run(bank, ids_NT, own)
    own.zero_()  # the caller's tensor is the caller's
    assert gap(run(bank, ids_NT, own), run(bank, ids_NT)) < 1e-6
    assert gap(run(bank, ids_NT, gates_NK[0]), run(bank, ids_NT, gates_NK[:1].expand(4, 3))) < 1e-6
    later = gates_NK[:, None].repeat(1, 7, 1)
    later[:, 4:] = later[:, 4:].flip(-1)
    changed = run(bank, ids_NT, later)
    assert gap(rows[:, :4], changed[:, :4]) < 1e-6  # causal: earlier tokens do not see later gates
    assert gap(rows[:, 4:], changed[:, 4:]) > 1e-3
    layer = bank.base.model.layers[0].mlp.down_proj
    x_NTI, gates_NTK = torch.randn(4, 7, 48, generator=torch.Generator().manual_seed(1)), some_gates(4, 7, 3, seed=2)
    with torch.no_grad(), bank.gates(gates_NTK):
        got = layer(x_NTI)
    want = layer.base_layer(x_NTI).detach()
    for k, label in enumerate(layer.lora_A):
        with torch.no_grad():
            want = want + gates_NTK[:, :, k : k + 1] * layer.scaling[label] * layer.lora_B[label](layer.lora_A[label](x_NTI))
    assert torch.allclose(got, want, atol=1e-5)


def test_siblings_share_one_product_and_nothing_else(unequal):
    """Query, key and value are given one tensor; whatever is called in whatever order, each gets what it computes alone."""
    bank, gates = LoraBank.load(llama(), unequal), [some_gates(4, 3, seed=s) for s in (1, 2)]
    attention = bank.base.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    group = [layer for layer in bank.layers if layer.module in layers]
    assert all(layer.siblings == tuple(group) for layer in group)
    assert [len(layer.members) for layer in group] == [3, 2, 2]
    x, other = (torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(s)) for s in (1, 2))

    def alone(layer, x, gates_NK):
        y = layer.base_layer(x)
        for k, label in enumerate(["k000", "k001", "k002"]):
            if label in layer.lora_A:
                y = y + gates_NK[:, None, k : k + 1] * layer.scaling[label] * layer.lora_B[label](layer.lora_A[label](x))
        return y

    with torch.no_grad():
        for order in ([0, 1, 2], [2, 0, 1], [0, 0, 1, 1, 2, 0]):
            with bank.gates(gates[0]):
                for i in order:
                    assert torch.allclose(layers[i](x), alone(layers[i], x, gates[0]), atol=1e-5)
        with bank.gates(gates[0]):
            layers[0](x)
            assert torch.allclose(layers[1](other), alone(layers[1], other, gates[0]), atol=1e-5)  # equal in shape, not the same tensor
            layers[0](x)
            with bank.gates(gates[1]):
                assert torch.allclose(layers[1](x), alone(layers[1], x, gates[1]), atol=1e-5)
            assert torch.allclose(layers[2](x), alone(layers[2], x, gates[0]), atol=1e-5)
        with bank.gates(gates[1]):
            layers[0](x)
        bank.parameters_of(0)[1].mul_(3)  # between two contexts
        with bank.gates(gates[1]):
            for layer in layers:
                assert torch.allclose(layer(x), alone(layer, x, gates[1]), atol=1e-5)
    products = []
    with torch.no_grad(), bank.gates(gates[0]):
        mode = bank._switch.mode
        mode.hidden = lambda layers, x, a_IR, own=mode.hidden: products.append(len(layers)) or own(layers, x, a_IR)
        bank.base(input_ids=some_ids())
    assert products == [3, 1, 2, 1] * 2


def test_where_one_sibling_trains_each_computes_alone(paths):
    bank, ids_NT, ones = LoraBank.load(llama(), paths), some_ids(), torch.ones(4, 3)
    before = run(bank, ids_NT, ones)
    key = bank.base.model.layers[0].self_attn.k_proj.lora_A["k000"].weight
    key.requires_grad_(True)
    assert gap(before, run(bank, ids_NT, ones)) < 1e-6
    with torch.no_grad(), bank.gates(ones):
        key.data.mul_(3)  # as a fused optimizer writes: no version tells
        assert gap(before, bank.base(input_ids=ids_NT).logits) > 1e-4


def test_unchanged_looks_at_parameters_once(paths, monkeypatch):
    bank, ids_NT, ones = LoraBank.load(llama(), paths), some_ids(), torch.ones(4, 3)
    before, looks = run(bank, ids_NT, ones), []
    stamped = bank._stamped
    monkeypatch.setattr(bank, "_stamped", lambda: looks.append(1) or stamped())
    with bank.unchanged():
        for _ in range(3):
            assert gap(before, run(bank, ids_NT, ones)) == 0
        assert len(looks) == 1
    run(bank, ids_NT, ones)
    assert len(looks) == 2
    with torch.no_grad():
        bank.parameters_of(1)[1].mul_(2)
    assert gap(before, run(bank, ids_NT, ones)) > 1e-3
    with torch.no_grad():
        bank.parameters_of(1)[1].div_(2)
    with bank.unchanged():  # a change before it is seen
        assert gap(before, run(bank, ids_NT, ones)) < 1e-6


def test_blocks_run_each_adapter_alone(unequal):
    bank, ids_NT = LoraBank.load(llama(), unequal), some_ids()
    with torch.no_grad(), bank.blocks():
        stacked = bank.base(input_ids=ids_NT.repeat(3, 1)).logits
    for k, path in enumerate(unequal.values()):
        assert gap(stacked[4 * k : 4 * k + 4], peft_logits(llama, path, ids_NT)) < 1e-5
    with bank.blocks():  # with a graph
        assert gap(bank.base(input_ids=ids_NT.repeat(3, 1)).logits, stacked) < 1e-6


def test_one_adapter_has_the_gradients_of_peft(paths):
    ids_NT = some_ids()
    bank = LoraBank.load(llama(), {"x": paths["e1"]}, trainable=["x"])
    peft = PeftModel.from_pretrained(llama(), str(paths["e1"]), is_trainable=True).eval()
    with bank.gates(torch.ones(4, 1)):
        bank.base(input_ids=ids_NT).logits.log_softmax(-1)[..., 3].sum().backward()
    peft(input_ids=ids_NT).logits.log_softmax(-1)[..., 3].sum().backward()
    theirs = [p.grad for p in peft.parameters() if p.requires_grad]
    ours = [p.grad for p in bank.parameters()]
    assert len(ours) == len(theirs) == 28
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


def test_gradients_of_adapters_and_gates_are_those_of_dense_weights(unequal):
    """Double precision, per-row gates: autograd through W + sum_k g_k s_k B_k A_k, written out row by row, is the oracle."""
    model = llama(torch.float64)
    bank = LoraBank.load(model, unequal, trainable=["e0", "e2"])
    bank.model.double()
    ids_NT, gates_NK = some_ids(2), some_gates(2, 3).double().requires_grad_()
    with bank.gates(gates_NK):
        bank.base(input_ids=ids_NT).logits.log_softmax(-1)[..., 3].sum().backward()
    ours = [gates_NK.grad.clone(), *[p.grad.clone() for p in bank.parameters()]]
    dense_NK = gates_NK.detach().clone().requires_grad_()
    for p in bank.parameters():
        p.grad = None
    total = torch.zeros((), dtype=torch.float64)
    fresh = llama(torch.float64)
    for n in range(2):
        weights = dict(fresh.named_parameters())
        for layer in bank._layers:
            name = f"{layer.name}.weight"
            for k, a, b, scale in zip(layer.members, layer.a, layer.b, layer.scalings, strict=True):
                weights[name] = weights[name] + dense_NK[n, k] * scale * (b @ a)
        logits = torch.func.functional_call(fresh, weights, kwargs={"input_ids": ids_NT[n : n + 1]}).logits
        total = total + logits.log_softmax(-1)[..., 3].sum()
    total.backward()
    for a, b in zip(ours, [dense_NK.grad, *[p.grad for p in bank.parameters()]], strict=True):
        assert float(b.abs().max()) > 1e-6
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))  # norms and scalings are float32 even here
    assert all(p.grad is None for p in bank.parameters_of(1))


def test_inference_mode_leaves_nothing_that_breaks_training(paths):
    """Sampling under inference_mode with the same gates as the training step that follows."""
    bank, ids_NT, gates_NK = LoraBank.load(llama(), paths, trainable=["e0"]), some_ids(), some_gates(4, 3)
    with torch.inference_mode(), bank.gates(gates_NK):
        sampled = bank.base(input_ids=ids_NT).logits
    with bank.gates(gates_NK):
        scored = bank.base(input_ids=ids_NT).logits
        scored.sum().backward()
    assert gap(sampled.clone(), scored) < 1e-6
    with torch.inference_mode(), bank.factor(torch.ones(3)):
        bank.base(input_ids=ids_NT)
    with bank.factor(torch.ones(3)):
        bank.base(input_ids=ids_NT).logits.sum().backward()
    with torch.inference_mode(), bank.gates(torch.ones(4, 3)):
        bank.base(input_ids=ids_NT)
    gates_NK.requires_grad_()
    frozen = LoraBank.load(llama(), paths)
    with torch.inference_mode(), frozen.gates(gates_NK):
        frozen.base(input_ids=ids_NT)
    with frozen.gates(gates_NK):
        for _ in range(2):  # twice through one context: each its own graph
            frozen.base(input_ids=ids_NT).logits.logsumexp(-1).sum().backward()
    assert float(gates_NK.grad.abs().max()) > 0


@pytest.mark.parametrize("fused", [False, True])
def test_changed_parameters_are_seen(paths, fused):
    """`fused=True` writes into parameters without raising their versions."""
    bank, ids_NT, ones = LoraBank.load(llama(), paths, trainable=["e0"]), some_ids(), torch.ones(4, 3)
    with torch.no_grad(), bank.gates(ones):  # one context, as in a learner that samples and steps
        before = bank.base(input_ids=ids_NT).logits
        optimizer = torch.optim.Adam(bank.parameters(), lr=0.1, fused=fused)
        with torch.enable_grad():
            bank.base(input_ids=ids_NT).logits[..., 3].sum().backward()
        optimizer.step()
        after = bank.base(input_ids=ids_NT).logits
    assert gap(before, after) > 1e-2
    with torch.enable_grad(), bank.gates(ones):
        assert gap(after, bank.base(input_ids=ids_NT).logits) < 1e-6
    with torch.no_grad():
        bank.parameters_of(1)[1].mul_(2)  # a frozen one, between two contexts
    assert gap(after, run(bank, ids_NT, ones)) > 1e-3
    with torch.no_grad(), bank.factor(torch.ones(3)):
        one = bank.base(input_ids=ids_NT).logits
        bank.parameters()[1].mul_(2)
        assert gap(one, bank.base(input_ids=ids_NT).logits) > 1e-3


def test_frozen_adapters_that_change_or_thaw_are_seen(paths):
    bank, ids_NT, ones = LoraBank.load(llama(), paths), some_ids(), torch.ones(4, 3)
    before = run(bank, ids_NT, ones)
    with torch.no_grad():
        bank.parameters_of(1)[1].mul_(2)
    after = run(bank, ids_NT, ones)
    assert gap(before, after) > 1e-3
    bank.parameters_of(2)[0].data = torch.zeros_like(bank.parameters_of(2)[0])  # as moving a model to a device does
    assert gap(after, run(bank, ids_NT, ones)) > 1e-5
    bank.parameters_of(0)[1].requires_grad_(True)
    with bank.gates(ones):
        bank.base(input_ids=ids_NT).logits[..., 3].sum().backward()
    assert float(bank.parameters_of(0)[1].grad.abs().max()) > 0


def test_gradient_checkpointing_inside_one_context(paths):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3)
    gradients = []
    for checkpointing in (False, True):
        bank = LoraBank.load(llama(), paths, trainable=["e1"])
        if checkpointing:
            bank.base.gradient_checkpointing_enable({"use_reentrant": False})
            bank.base.train()
        with bank.gates(gates_NK):
            bank.base(input_ids=ids_NT, use_cache=False).logits[..., 3].sum().backward()
        gradients.append([p.grad for p in bank.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
    with bank.gates(gates_NK):
        loss = bank.base(input_ids=ids_NT, use_cache=False).logits.sum()
    with pytest.raises(ConfigError, match="a model with a LoraBank runs under gates"):
        loss.backward()


def test_bfloat16_agrees_with_peft(tmp_path):
    def make():
        return llama(torch.bfloat16)

    experts = write_adapters(make, tmp_path, [{}])
    ids_NT = some_ids()
    ours = run(LoraBank.load(make(), experts), ids_NT, torch.ones(4, 1))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, peft_logits(make, experts["e0"], ids_NT))


def test_initialization_is_by_seed_and_name_and_leaves_the_global_state_alone():
    state = torch.random.get_rng_state()
    one = LoraBank.attach(llama(), names=["a", "lora.A"], rank=2, seed=7)
    other = LoraBank.attach(llama(), names=["lora.A"], rank=2, seed=7)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one.parameters_of(1)[0], other.parameters_of(0)[0])
    assert not torch.equal(one.parameters_of(0)[0], one.parameters_of(1)[0])
    assert not torch.equal(LoraBank.attach(llama(), names=["a"], rank=2, seed=8).parameters_of(0)[0], one.parameters_of(0)[0])
    assert not any(bool(b.any()) for b in one.parameters()[1::2])
    names = [name for name, p in one.base.named_parameters() if p.requires_grad]
    assert len(names) == 56
    assert all("lora_" in name for name in names)
    assert all("lm_head" not in name for name in names)


def test_only_the_chosen_adapters_train():
    bank = LoraBank.attach(llama(), names=["a", "b"], rank=2, seed=0, trainable=["b"])
    assert len(bank.parameters()) == 28
    assert {id(p) for p in bank.parameters()} == {id(p) for p in bank.parameters_of(1)}
    bank.add("c", rank=2, seed=0)  # PEFT changes what is trainable when adapters come; the bank puts it right
    assert {id(p) for p in bank.parameters()} == {id(p) for k in (1, 2) for p in bank.parameters_of(k)}
    bank.add("d", rank=2, seed=0, trainable=False)
    assert len(bank.parameters()) == 56


def test_saved_adapters_are_plain_peft_and_the_same_bytes_every_time(paths, tmp_path):
    ids_NT = some_ids()
    bank = LoraBank.load(llama(), paths)
    for attempt in ("one", "two"):
        bank.save("e1", tmp_path / attempt)
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    targets = json.loads(files["adapter_config.json"])["target_modules"]
    assert targets == sorted(targets)  # PEFT keeps a set, whose order changes from process to process
    with torch.no_grad():
        want = run(bank, ids_NT, [0.0, 1.0, 0.0])
    assert gap(peft_logits(llama, tmp_path / "one", ids_NT), want) < 1e-5
    again = LoraBank.load(llama(), {"x": tmp_path / "one"})
    assert all(torch.equal(a, b) for a, b in zip(again.parameters_of(0), bank.parameters_of(1), strict=True))


def test_an_export_is_one_plain_lora_of_the_sum_of_the_ranks(unequal, tmp_path):
    ids_NT, weights_K = some_ids(), [0.6, 0.0, 0.4]
    bank = LoraBank.load(llama(), unequal)
    bank.export(weights_K, tmp_path / "soup")
    exported = LoraConfig.from_pretrained(str(tmp_path / "soup"))
    assert (exported.r, exported.lora_alpha) == (9, 9)  # 4 + 5: a weight of 0 adds no rank
    assert gap(peft_logits(llama, tmp_path / "soup", ids_NT), run(bank, ids_NT, weights_K)) < 1e-5
    merged = llama()
    assert not merged.load_state_dict(soup_state(bank, weights_K), strict=False).unexpected_keys
    with torch.no_grad():
        assert gap(merged(input_ids=ids_NT).logits, run(bank, ids_NT, weights_K)) < 1e-5


def test_an_empty_bank_is_the_reference():
    bank, ids_NT = LoraBank.attach(llama(), names=[], seed=0), some_ids()
    with torch.no_grad():
        want = llama()(input_ids=ids_NT).logits
    assert torch.equal(run(bank, ids_NT), want)
    assert torch.equal(run(bank, ids_NT, torch.zeros(4, 0)), want)
    assert bank.parameters() == []


def test_a_detached_bank_gives_peft_its_forward_back(paths):
    ids_NT = some_ids()
    bank = LoraBank.load(llama(), {"x": paths["e2"]})
    bank.detach()
    with torch.no_grad():
        assert gap(bank.model(input_ids=ids_NT).logits, peft_logits(llama, paths["e2"], ids_NT)) == 0


def refused(*parts: str):
    """ConfigError whose text holds every part (rule, found, remedy)."""
    return pytest.raises(ConfigError, match=".*".join(f"(?s:.*){re.escape(part)}" for part in parts))


def test_wrong_gates_are_refused(paths):
    bank, ids_NT = LoraBank.load(llama(), paths), some_ids()
    with refused("gates have one column per adapter: (K,) or (N, K) or (N, T, K)", "shape (4, 2) for 3 adapters (e0, e1, e2)"):
        run(bank, ids_NT, torch.ones(4, 2))
    with refused("gates are finite numbers", "NaN or infinity"):
        run(bank, ids_NT, torch.full((4, 3), float("nan")))
    with refused("gates and batch have the same rows (and tokens)", "gates for 2 rows, layer input of shape (4, 7, 32)", "of shape (K,)"):
        run(bank, ids_NT, torch.ones(2, 3))
    with refused("gates and batch have the same rows (and tokens)", "gates for (4, 6) (rows, tokens), layer input of shape (4, 7, 32)"):
        run(bank, ids_NT, torch.ones(4, 6, 3))
    with refused("gates have one column per adapter: (K,)", "shape (4, 3)"), bank.factor(torch.ones(4, 3)):
        pass
    with refused("gates and batch have the same rows (and tokens)", "gates for 4 rows, layer input of shape (1, 28, 32)"):
        run(bank, ids_NT.view(1, -1), torch.ones(4, 3))  # packing


def test_generate_cannot_expand_a_batch_behind_the_gates(paths):
    bank = LoraBank.load(llama(), paths)
    for expanding in ({"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}):
        with (
            refused("gates and batch have the same rows (and tokens)", "gates for 2 rows, layer input of shape (4, "),
            bank.gates(torch.ones(2, 3)),
        ):
            bank.base.generate(some_ids(2), max_new_tokens=2, **expanding)


def test_a_forward_outside_of_any_context_is_refused(paths):
    bank = LoraBank.load(llama(), paths)
    with refused("a model with a LoraBank runs under gates", "outside of any context", "None is the reference"):
        bank.base(input_ids=some_ids())
    with torch.no_grad(), bank.gates(None):
        with bank.gates(torch.ones(3)):
            inner = bank.base(input_ids=some_ids()).logits
        outer = bank.base(input_ids=some_ids()).logits
    assert gap(inner, outer) > 0.1
    assert torch.equal(outer, run(bank, some_ids()))
    with pytest.raises(ConfigError, match="runs under gates"):  # contexts end
        bank.model(input_ids=some_ids())


def test_merged_layers_and_adapter_names_are_refused(paths):
    bank, ids_NT = LoraBank.load(llama(), paths), some_ids()
    with refused("in a LoraBank the gates choose the adapters"), bank.gates(torch.ones(4, 3)):
        bank.base.model.layers[0].mlp.up_proj(torch.zeros(4, 1, 32), adapter_names=["k000"] * 4)
    bank.model.merge_adapter(["k001"])
    for gates in (torch.ones(4, 3), None):
        with refused("gates apply to unmerged adapters", "q_proj has merged k001", "unmerge_adapter()"):
            run(bank, ids_NT, gates)
    bank.model.unmerge_adapter()
    run(bank, ids_NT, torch.ones(4, 3))


def test_adapter_dropout_is_refused_in_training_only(tmp_path):
    experts = write_adapters(llama, tmp_path, [{"lora_dropout": 0.5}])
    bank, ids_NT = LoraBank.load(llama(), experts), some_ids()
    assert gap(run(bank, ids_NT, [1.0]), peft_logits(llama, experts["e0"], ids_NT)) < 1e-5
    bank.base.train()
    with refused("adapters under gates have no dropout while training", "q_proj has lora_dropout > 0 in train mode", "lora_dropout=0"):
        run(bank, ids_NT, [1.0])


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"use_dora": True}, "e0: use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "e0: modules_to_save=['lm_head']"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "e0: lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "e0: init_lora_weights='pissa'"),
        ({"bias": "lora_only"}, "e0: bias='lora_only'"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "model.embed_tokens: Embedding"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(tmp_path, settings, found):
    def make():
        return llama(attention_bias=True)

    experts = write_adapters(make, tmp_path, [settings])
    with refused("gates work on", found):
        LoraBank.load(make(), experts)


def test_other_loading_mistakes(paths, tmp_path):
    with refused("an adapter directory holds adapter_config.json and adapter_model.safetensors", "no adapter_config.json in"):
        LoraBank.load(llama(), {"x": tmp_path})
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_bytes((paths["e0"] / "adapter_config.json").read_bytes())
    torch.save({}, pickled / "adapter_model.bin")
    with refused("an adapter directory holds", "no adapter_model.safetensors in", "pickled weights are never loaded"):
        LoraBank.load(llama(), {"x": pickled})
    with refused("an adapter's weights fit the base model", "unexpected tensors", "the model that it was trained on"):
        LoraBank.load(llama(num_hidden_layers=1), paths)
    with refused("an adapter's weights fit the base model", "size mismatch"):
        LoraBank.load(llama(intermediate_size=64), paths)
    broken = tmp_path / "broken"
    broken.mkdir()
    whole = {file: (paths["e0"] / file).read_bytes() for file in ("adapter_config.json", "adapter_model.safetensors")}
    for cut in whole:
        for file, content in whole.items():
            (broken / file).write_bytes(content[:-10] if file == cut else content)
        with refused("an adapter's files can be read", "broken", "copy or train it again"):
            LoraBank.load(llama(), {"x": broken})
    with refused("what is trained is one of the adapters", "'e9'", "did you mean 'e"):
        LoraBank.load(llama(), paths, trainable=["e9"])
    with refused("an export has an adapter at least", "the reference alone"):
        LoraBank.attach(llama(), names=[], seed=0).export([], tmp_path / "none")
    with refused("adapter names are distinct and not empty", "'a'"):
        LoraBank.attach(llama(), names=["a", "a"], seed=0)
    with refused("a bank wraps a model without adapters", "PeftModel with default"), forked_torch(0):
        LoraBank.attach(get_peft_model(llama(), LoraConfig(target_modules="all-linear")), names=["a"], seed=0)
    with refused("an adapter is known by its name", "'e4'", "did you mean 'e"):
        LoraBank.load(llama(), paths).save("e4", tmp_path / "x")
    with refused('a soup is "delta" or "factor"', "'linear'"):
        soup_state(LoraBank.load(llama(), paths), torch.ones(3), how="linear")


def test_factor_averaging_needs_one_shape(unequal):
    bank = LoraBank.load(llama(), unequal)
    with refused("factor averaging needs adapters of one shape", "ranks [4, 3]"), bank.factor(torch.ones(3)):
        bank.base.model.layers[0].mlp.up_proj(torch.zeros(1, 1, 32))
    with refused("stacked mixing needs one equal block of rows per adapter", "4 rows for 3 adapters"), bank.blocks():
        bank.base(input_ids=some_ids())


def test_frozen_adapters_are_in_memory_once(paths, tmp_path):
    """Their factors are parts of the matrices that forwards use; saved, they are what they were."""
    bank, ids_NT = LoraBank.load(llama(), paths), some_ids()
    run(bank, ids_NT, torch.ones(4, 3))
    for layer in bank.layers:
        wide, b_RO = layer._kept["siblings"][1][0] if "siblings" in layer._kept else layer.a_IR(), layer.b_RO()
        assert all(a.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr() for a in layer.a)
        assert all(b.untyped_storage().data_ptr() == b_RO.untyped_storage().data_ptr() for b in layer.b)
    for name, path in paths.items():
        bank.save(name, tmp_path / name)
        before, after = ((folder / "adapter_model.safetensors").read_bytes() for folder in (path, tmp_path / name))
        assert before == after


def test_an_adapted_head_leaves_ties_as_they_are_and_the_base_too(tmp_path):
    """PEFT saves an adapted head whole, beside its factors."""
    from safetensors.torch import load_file, save_file

    experts = write_adapters(lambda: llama(tie_word_embeddings=True), tmp_path, [{"target_modules": ["lm_head"]}])
    model = llama(tie_word_embeddings=True)
    LoraBank.load(model, experts)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
    file = experts["e0"] / "adapter_model.safetensors"
    tensors = load_file(file)
    (whole,) = [key for key in tensors if "base_layer" in key]
    save_file({**tensors, whole: tensors[whole] + 1}, file)
    with pytest.raises(ConfigError, match="leaves the base as it is"):
        LoraBank.load(llama(tie_word_embeddings=True), experts)
