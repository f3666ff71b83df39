"""Quantized bases: a fake layer that any machine has, against the same model with its weights dequantized; then the real libraries.

bitsandbytes (43 MB) and torchao are no requirements of the tests. Where they are missing, the tests of `REAL` are skipped, and say so;
`pip install '.[quantize]'` runs them.
"""

import copy
import importlib.util
import json
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.nn import Linear, Parameter, functional

import tiny_models
from paretune import export
from paretune.errors import ConfigError
from paretune.policy.base import build_mixing
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank, soup_state
from paretune.policy.lora.decoder import stacked_share
from paretune.policy.lora.linear import base_weight, is_quantized, numbers
from paretune.policy.self_test import check_model
from paretune.registry import METHODS, describe
from paretune.runs.recipes.recipe import load_recipe
from paretune.runs.suite import fit
from paretune.tasks import pretrained
from paretune.tasks.pretrained import keep_layout, load_pretrained
from paretune.training.batch import _merged
from recipe_files import tiny_model, write_recipe

NAMES = ("a", "b")
IDS = torch.arange(1, 13).view(2, 6)
GATES = torch.tensor([[0.3, 0.7], [1.2, -0.4]])
REAL = [
    pytest.param(bits, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed: skipped"))
    for bits, package in pretrained.PACKAGES.items()
]


class Int8(Linear):
    """Weights of 8 bits with a scale per row, as HQQ holds them; `rounds` rounds the inputs, too."""

    def __init__(self, linear, rounds=False):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias, self.rounds = linear.bias, rounds

    @property
    def W_q(self):
        return self.weight

    def dequantize(self):
        return self.W_q * self.scale

    def forward(self, x):
        return functional.linear(x.mul(64).round().div(64) if self.rounds else x, self.dequantize(), self.bias)


def models(rounds=False):
    """A Llama whose linear layers are quantized, but for its head; and the same with dequantized weights."""
    quantized, plain = tiny_models.llama(), tiny_models.llama()
    for name, module in list(plain.model.named_modules()):
        if isinstance(module, Linear):
            small = Int8(module, rounds)
            quantized.model.set_submodule(name, small)
            module.weight.data = small.dequantize()
    return quantized, plain


def bank_on(model):
    bank = LoraBank.attach(model, names=NAMES, seed=0, rank=3, alpha=6)
    with torch.no_grad():
        for k, p in enumerate(bank.parameters()):
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(k))
    return bank


@pytest.mark.parametrize(
    "mixing",
    ["parameter", "factor", "logit", "hidden", "robust", {"name": "hidden-layer", "layer": 1}, {"name": "merged", "how": "dare-ties"}],
)
def test_every_mixing_computes_what_it_does_on_the_dequantized_base(mixing):
    one = mixing == "factor" or (isinstance(mixing, dict) and mixing["name"] == "merged")
    gates = GATES[:1].expand(2, -1) if one else GATES.abs() if mixing == "robust" else GATES
    logits = []
    for model in models():
        policy = build_mixing(mixing, bank_on(model), tiny_models.TOKENIZER)
        stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            logits.append([policy.forward(IDS, gates_NK=g) for g in (gates, None, gates)])
        assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items()), "the base was written into"
    for got, want in zip(*logits, strict=True):
        assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(logits[0][0], logits[0][1], atol=1e-2), "the adapters do something"


def test_gradients_are_those_on_the_dequantized_base():
    grads = []
    for model in models():
        policy = build_mixing("parameter", bank_on(model), tiny_models.TOKENIZER)
        policy.forward(IDS, gates_NK=GATES).log_softmax(-1)[..., 3].sum().backward()
        grads.append([p.grad for p in policy.parameters()])
    for got, want in zip(*grads, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
        assert want.abs().max() > 0


@pytest.mark.parametrize("how", ["delta", "factor"])
def test_a_soup_loads_into_a_model_that_is_not_quantized(how):
    model, plain = models()
    bank = bank_on(model)
    state = soup_state(bank, [0.3, 0.7], how=how)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    plain.load_state_dict(state, strict=False)
    with torch.no_grad(), bank.gates([0.3, 0.7]) if how == "delta" else bank.factor([0.3, 0.7]):
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-5)


def test_a_weight_that_is_not_what_the_layer_computes_with_is_not_merged():
    layer = Int8(Linear(32, 8))
    assert torch.equal(base_weight(layer), layer.dequantize())
    layer.dequantize = lambda: layer.W_q.float()  # without its scale
    layer.forward = lambda x: functional.linear(x, layer.W_q * layer.scale, layer.bias)
    with pytest.raises(ConfigError, match="needs the base's weights in floating point") as error:
        base_weight(layer)
    assert "Int8, whose weight gives outputs" in error.value.found
    assert "--as adapter" in error.value.remedy
    layer.dequantize = Mock(side_effect=RuntimeError())  # an error without a message
    with pytest.raises(ConfigError) as error:
        base_weight(layer)
    assert error.value.found == "a quantized Int8, RuntimeError: RuntimeError"
    with pytest.raises(ConfigError, match="in floating point"):  # a layer that has no weight to show
        base_weight(SimpleNamespace(qweight=torch.zeros(3, dtype=torch.int32), in_features=32))


@pytest.mark.parametrize(("rounds", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_self_test_knows_what_rounds(rounds, dtype):
    bank = bank_on(models(rounds)[0])
    assert bank.rounding == dtype
    assert len(bank.quantized) == len(bank.layers) == 14
    check_model(build_mixing("parameter", bank, tiny_models.TOKENIZER))


def test_what_counts_as_quantized():
    float8 = Linear(4, 4)
    float8.weight = Parameter(float8.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert is_quantized(Int8(Linear(4, 4)))
    assert is_quantized(float8)
    assert not is_quantized(Linear(4, 4))
    assert not is_quantized(Linear(4, 4).half())
    assert not is_quantized(torch.nn.Embedding(4, 4))
    packed = type("Params4bit", (Parameter,), {})(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert (numbers(packed), numbers(Linear(4, 4).weight)) == (16, 16)
    assert 0 < stacked_share(bank_on(models()[0])) <= 1


def test_merged_weights_are_not_sampled_from():
    quantized, plain = models()
    for model, merges in ((plain, True), (quantized, False)):
        bank = LoraBank.attach(model, names=["a"], seed=0, rank=3)
        with _merged(build_mixing("parameter", bank, tiny_models.TOKENIZER), one=True) as merged:
            assert merged is merges


def test_a_repacked_weight_is_unpacked_and_stays_so():
    calls = []
    layer = Linear(2, 2)
    layer.support_avx512bf16_for_cpu = 1
    layer.state_dict = lambda: calls.append(1)
    for _ in range(2):
        keep_layout(torch.nn.Sequential(layer, Linear(2, 2)))
    assert (calls, layer.support_avx512bf16_for_cpu) == ([1], False)


# Recipes


def recipe(folder, **changes):
    learner = {"name": "pg", "samples": 32, "batch": 16, "group": 4, "rank": 2, **changes.pop("learner", {})}
    return load_recipe(write_recipe(folder, changes.pop("model", tiny_model()), learner=learner, **changes))


@pytest.mark.parametrize("bits", ["4bit", "8bit", "torchao-int8"])
def test_a_missing_package_is_named_with_its_extra(bits, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs that package\n.*\n.*pip install 'paretune\[quantize\]'") as error:
        recipe(tmp_path, quantize=bits)
    assert pretrained.PACKAGES[bits] in error.value.rule


def quantized_copy(folder, method):
    folder.mkdir()
    for file in tiny_model().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_quantized_checkpoint_is_not_quantized_again_and_needs_its_package(tmp_path, monkeypatch):
    model = quantized_copy(tmp_path / "model", "bitsandbytes")
    with pytest.raises(ConfigError, match="a base is quantized once") as error:
        recipe(tmp_path, model=model, quantize="8bit")
    assert "is quantized by bitsandbytes" in error.value.found
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs that package"):
        recipe(tmp_path, model=model)


def test_bits_that_there_are_not(tmp_path):
    with pytest.raises(ConfigError, match="'4bit', '8bit' or 'torchao-int8'"):
        recipe(tmp_path, quantize="3bit")


def test_bits_are_part_of_keys_and_of_a_familys_base(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: name)
    plain, small = recipe(tmp_path).task, recipe(tmp_path, quantize="4bit").task
    assert describe(plain) | {"quantize": "4bit"} == describe(small)
    assert "quantize" not in plain.base()
    assert small.base() == plain.base() | {"quantize": "4bit"}


def test_a_learner_does_not_cast_a_quantized_base(tmp_path, monkeypatch):
    asked = recipe(tmp_path, learner={"dtype": "bfloat16"})
    model, tokenizer = asked.task.load()
    monkeypatch.setattr(type(model), "is_quantized", True, raising=False)
    monkeypatch.setattr(type(asked.task), "load", lambda self: (model, tokenizer))
    (spec, *_) = METHODS.build("experts").plan(asked.task, asked.learner, {}, 0)
    with pytest.raises(ConfigError, match="a quantized base keeps the dtypes"):
        asked.learner.start(spec, asked.task, {})


# The real libraries


@pytest.mark.parametrize("bits", REAL)
def test_forwards_without_gradients_leave_later_gradients_as_they_were(bits):
    """bitsandbytes repacks 4-bit weights in such a forward on some processors."""
    policy = build_mixing("parameter", bank_on(load_pretrained(str(tiny_model()), quantize=bits)[0]), tiny_models.TOKENIZER)
    found = []
    for _ in range(2):
        logits = policy.forward(IDS, gates_NK=GATES)
        found.append([logits.detach(), *torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), policy.parameters())])
        with torch.no_grad():
            assert torch.allclose(policy.forward(IDS, gates_NK=GATES), logits, atol=1e-5)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    check_model(policy)


@pytest.mark.parametrize("bits", REAL)
def test_gates_and_gradients_on_the_real_layers_are_those_on_dequantized_weights(bits):
    model, _ = load_pretrained(str(tiny_model()), quantize=bits)
    bank = bank_on(model)
    rounds = bank.rounding == torch.bfloat16
    assert rounds == (bits == "8bit")
    plain, _ = load_pretrained(str(tiny_model()))
    before = copy.deepcopy(plain.state_dict())
    plain.load_state_dict({f"{name}.weight": base_weight(layer).float() for name, layer in bank.quantized.items()}, strict=False)
    assert any(not torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())
    found = []
    for one in (bank, bank_on(plain)):
        with one.gates(GATES):
            logits = one.base(IDS).logits
            found.append([logits, *torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), one.parameters())])
    for got, want in zip(*found, strict=True):
        assert float((got - want).norm() / want.norm()) < (0.05 if rounds else 1e-4)


@pytest.mark.parametrize("bits", REAL)
def test_a_family_is_fitted_saved_loaded_and_exported(bits, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    asked = recipe(tmp_path, quantize=bits, learner={"checkpointing": True})
    made = fit(asked.task, {"name": "bridge"}, learner=asked.learner, root=tmp_path / "runs", progress=False)
    made.save(tmp_path / "family")
    family = Family.load(tmp_path / "family")
    ids, w_WM = torch.arange(5, 25)[None], np.array([[0.5, 0.5]])
    with torch.no_grad():
        want = family.policy.forward(ids, gates_NK=torch.from_numpy(family.gates(w_WM)).float())
        assert torch.equal(want, made.policy.forward(ids, gates_NK=torch.from_numpy(made.gates(w_WM)).float()))
        export(family, tmp_path / "merged", [0.5, 0.5])
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert "quantization_config" not in merged.config.to_dict()
        assert torch.allclose(merged(ids).logits, want, atol=0.05 if bits == "8bit" else 1e-5)
        export(family, tmp_path / "adapter", [0.5, 0.5], kind="adapter")
        base, _ = load_pretrained(**family.base)
        assert torch.allclose(PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(ids).logits, want, atol=1e-5)
    assert f"'quantize': '{bits}'" in (tmp_path / "adapter" / "README.md").read_text()
    assert "dequantized" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("bits", REAL)
def test_a_checkpoint_that_was_saved_quantized_loads_as_it_is(bits, tmp_path):
    model, tokenizer = load_pretrained(str(tiny_model()), quantize=bits)
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path)
    again, _ = load_pretrained(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert LoraBank.attach(again, names=["a"], seed=0).quantized
