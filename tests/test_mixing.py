"""The identities of mixing: what must be equal at every level, what must not be, and what is refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from paretune.errors import ConfigError
from paretune.policy.base import MIXINGS
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.hidden import HiddenMix
from paretune.policy.mixing.parameter import FactorMix, ParameterMix, ReferencePolicy
from paretune.policy.mixing.predictions import LogitMix
from paretune.policy.rules import Constant, Identity, Nearest, Table
from paretune.registry import GATE_RULES, describe
from tiny_models import TOKENIZER, dense_soup, gap, gemma2, gpt2, llama, peft_logits, some_gates, some_ids, write_adapters

LEVEL_NAMES = ("parameter", "factor", "logit", "hidden")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_adapters(llama, tmp_path_factory.mktemp("experts"), [{}, {}, {}])


def policy(level: str, paths, make=llama):
    return MIXINGS[level](LoraBank.load(make(), paths), TOKENIZER)


@torch.no_grad()
def run(policy, ids_NT, gates_NK, **more):
    return policy.forward(ids_NT, gates_NK=gates_NK, **more)


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_a_vertex_is_its_expert(paths, level):
    ids_NT, mixing = some_ids(), policy(level, paths)
    for k, path in enumerate(paths.values()):
        gates_NK = torch.eye(3)[k].repeat(4, 1)
        assert gap(run(mixing, ids_NT, gates_NK), peft_logits(llama, path, ids_NT)) < 1e-5
    with torch.no_grad():
        assert torch.equal(run(mixing, ids_NT, None), llama()(input_ids=ids_NT).logits)


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_permuting_experts_and_gates_changes_nothing(paths, level):
    ids_NT, gates_NK, order = some_ids(), some_gates(4, 3), [2, 0, 1]
    if level == "factor":
        gates_NK = gates_NK[:1].repeat(4, 1)
    shuffled = {f"e{k}": paths[f"e{k}"] for k in order}
    here = run(policy(level, paths), ids_NT, gates_NK)
    assert gap(here, run(policy(level, shuffled), ids_NT, gates_NK[:, order])) < 1e-5
    assert gap(here, run(policy(level, shuffled), ids_NT, gates_NK)) > 1e-3


def test_logit_mixing_is_the_normalized_product_of_the_experts(paths):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3)
    logp_KNTV = torch.stack([peft_logits(llama, path, ids_NT).log_softmax(-1) for path in paths.values()])
    want = torch.einsum("nk,kntv->ntv", gates_NK, logp_KNTV)
    got = run(policy("logit", paths), ids_NT, gates_NK)
    assert gap(got, want) < 1e-5
    assert gap(got, run(policy("parameter", paths), ids_NT, gates_NK)) > 1e-2  # the levels do differ between the vertices


def test_parameter_and_factor_are_two_soups(paths):
    ids_NT, gates_K = some_ids(), torch.tensor([0.2, 0.5, 0.3])
    with torch.no_grad():
        want = dense_soup(llama, paths, gates_K)(input_ids=ids_NT).logits
    assert gap(run(policy("parameter", paths), ids_NT, gates_K.repeat(4, 1)), want) < 1e-5
    assert gap(run(policy("factor", paths), ids_NT, gates_K.repeat(4, 1)), want) > 1e-2


def test_the_last_hidden_layer_is_logit_mixing_under_a_plain_shared_head(tmp_path, paths):
    ids_NT = some_ids()
    for gates_NK in (some_gates(4, 3), torch.rand(4, 3, generator=torch.Generator().manual_seed(3))):  # on the simplex, and off it
        assert gap(run(policy("hidden", paths), ids_NT, gates_NK), run(policy("logit", paths), ids_NT, gates_NK)) < 1e-5
    tied = write_adapters(gpt2, tmp_path, [{"fan_in_fan_out": True}] * 2)
    gates_NK = some_gates(4, 2)
    assert gap(run(policy("hidden", tied, gpt2), ids_NT, gates_NK), run(policy("logit", tied, gpt2), ids_NT, gates_NK)) < 1e-5
    assert gap(run(policy("hidden", tied, gpt2), ids_NT, gates_NK), run(policy("parameter", tied, gpt2), ids_NT, gates_NK)) > 1e-3


def with_bias():
    model = llama()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, 17))
    return model


def test_it_is_not_where_the_head_has_a_bias_and_gates_do_not_sum_to_1(tmp_path):
    experts = write_adapters(with_bias, tmp_path, [{}, {}])
    ids_NT, gates_NK = some_ids(), some_gates(4, 2)
    for scale, equal in ((1.0, True), (0.5, False)):
        hidden = run(policy("hidden", experts, with_bias), ids_NT, scale * gates_NK)
        logit = run(policy("logit", experts, with_bias), ids_NT, scale * gates_NK)
        assert (gap(hidden, logit) < 1e-5) == equal
    one = run(policy("hidden", experts, with_bias), ids_NT, torch.tensor([[0.0, 1.0]]).repeat(4, 1))
    assert gap(one, peft_logits(with_bias, experts["e1"], ids_NT)) < 1e-5


def test_it_is_not_under_a_soft_cap_which_the_hidden_level_applies(tmp_path):
    ids_NT, gates_NK = some_ids(), some_gates(4, 2)
    for cap, equal in ((None, True), (0.2, False)):

        def make(cap=cap):
            return gemma2(cap)

        experts = write_adapters(make, tmp_path / str(cap), [{}, {}])
        hidden, logit = policy("hidden", experts, make), policy("logit", experts, make)
        assert (gap(run(hidden, ids_NT, gates_NK), run(logit, ids_NT, gates_NK)) < 1e-5) == equal
        with torch.no_grad():
            mixed_NTH = torch.einsum("nk,knth->nth", gates_NK, hidden.parts(ids_NT))
            raw = hidden.model.lm_head(mixed_NTH)
        want = raw if cap is None else cap * torch.tanh(raw / cap)
        assert torch.allclose(run(hidden, ids_NT, gates_NK), want, atol=1e-5)


def test_it_is_not_where_heads_differ(tmp_path):
    experts = write_adapters(llama, tmp_path, [{"target_modules": ["q_proj", "lm_head"]}] * 2)
    ids_NT, gates_NK = some_ids(), some_gates(4, 2)
    assert gap(run(policy("hidden", experts), ids_NT, gates_NK), run(policy("logit", experts), ids_NT, gates_NK)) > 1e-3
    for k in range(2):  # yet a vertex is its expert, head included
        assert (
            gap(run(policy("hidden", experts), ids_NT, torch.eye(2)[k].repeat(4, 1)), peft_logits(llama, experts[f"e{k}"], ids_NT)) < 1e-5
        )


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_cached_decoding_equals_one_pass_with_padding_on_the_left(paths, level):
    mixing, gates_NK = policy(level, paths), some_gates(4, 3)
    if level == "factor":
        gates_NK = gates_NK[:1].repeat(4, 1)
    ids_NT, pads = some_ids(4, 9), [0, 2, 3, 1]
    mask_NT = torch.stack([(torch.arange(9) >= pad).long() for pad in pads])
    whole = run(mixing, ids_NT, gates_NK, attention_mask=mask_NT)
    cache = mixing.new_cache(4)
    steps = [run(mixing, ids_NT[:, :4], gates_NK, attention_mask=mask_NT[:, :4], cache=cache)]
    steps.append(run(mixing, ids_NT[:, 4:6], gates_NK, attention_mask=mask_NT[:, :6], cache=cache, last_only=True))
    for t in range(6, 9):
        steps.append(run(mixing, ids_NT[:, t : t + 1], gates_NK, attention_mask=mask_NT[:, : t + 1], cache=cache, last_only=True))
    assert steps[1].shape[1] == 1
    cached = torch.cat([steps[0], steps[0][:, :1], *steps[1:]], 1)
    for n, pad in enumerate(pads):
        real = [t for t in range(pad, 9) if t != 4]
        assert gap(whole[n, real], cached[n, real]) < 1e-5
        alone = run(mixing, ids_NT[n : n + 1, pad:], gates_NK[n : n + 1])  # no padding at all
        assert gap(whole[n : n + 1, pad:], alone) < 1e-5
    assert gap(whole[:, -3:], run(mixing, ids_NT, gates_NK, attention_mask=mask_NT, last_only=3)) < 1e-5


def test_padding_moves_no_position(tmp_path):
    """GPT-2's positions are absolute, so that a position counted from the padding would show."""
    mixing = policy("logit", write_adapters(gpt2, tmp_path, [{"fan_in_fan_out": True}] * 2), gpt2)
    ids_NT, gates_NK, mask_NT = some_ids(2, 6), some_gates(2, 2), torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
    want = run(mixing, ids_NT[1:, 3:], gates_NK[1:])
    assert gap(run(mixing, ids_NT, gates_NK, attention_mask=mask_NT)[1:, 3:], want) < 1e-5
    cache = mixing.new_cache(2)
    run(mixing, ids_NT[:, :5], gates_NK, attention_mask=mask_NT[:, :5], cache=cache)
    assert gap(run(mixing, ids_NT[:, 5:], gates_NK, attention_mask=mask_NT, cache=cache)[1:], want[:, -1:]) < 1e-5


@pytest.mark.parametrize("level", LEVEL_NAMES)
def test_a_single_row_may_be_padded(paths, level):
    mixing, ids_NT, gates_NK = policy(level, paths), some_ids(1, 6), some_gates(1, 3)
    mask_NT = torch.tensor([[0, 0, 1, 1, 1, 1]])
    want = run(mixing, ids_NT[:, 2:], gates_NK)
    assert gap(run(mixing, ids_NT, gates_NK, attention_mask=mask_NT)[:, 2:], want) < 1e-5


@pytest.mark.parametrize("level", ["parameter", "logit", "hidden"])
def test_rows_do_not_depend_on_the_batch(paths, level):
    mixing, ids_NT, gates_NK, order = policy(level, paths), some_ids(6), some_gates(6, 3), [4, 0, 5]
    assert gap(run(mixing, ids_NT, gates_NK)[order], run(mixing, ids_NT[order], gates_NK[order])) < 1e-5
    assert gap(run(mixing, ids_NT, gates_NK)[order], run(mixing, ids_NT[order], gates_NK[:3])) > 1e-3


@pytest.mark.parametrize(("bias", "rows"), [(False, 4), (True, 12)])
def test_logits_are_mixed_before_the_head_where_it_is_linear(paths, bias, rows):
    """Against the mean of the experts' logits by hand, with gates that do not sum to 1; a bias counts once per expert."""
    mixing, ids_NT, gates_NK, seen = policy("logit", paths), some_ids(4), 2 * some_gates(4, 3), []
    head = mixing.model.get_output_embeddings()
    if bias:
        head.bias = torch.nn.Parameter(torch.linspace(-1, 1, head.out_features))
    want_NTV = torch.zeros(4, ids_NT.shape[1], head.out_features)
    for k in range(3):
        with torch.no_grad(), mixing.bank.gates(torch.eye(3)[k].expand(4, -1)):
            want_NTV += gates_NK[:, k, None, None] * mixing.model(input_ids=ids_NT).logits
    assert mixing.splits_head is not bias  # found out before rows are counted
    head.register_forward_hook(lambda module, given, made: seen.append(len(given[0])))
    assert gap(run(mixing, ids_NT, gates_NK), want_NTV) < 1e-5
    assert seen == [rows]


@pytest.mark.parametrize("level", ["logit", "hidden"])
def test_parts_are_computed_once_for_many_gates(paths, level):
    mixing, ids_NT = policy(level, paths), some_ids()
    assert not mixing.parts_need_gates
    with torch.no_grad():
        parts = mixing.parts(ids_NT)
        for seed in range(3):
            gates_NK = some_gates(4, 3, seed=seed)
            assert gap(mixing.combine(parts, gates_NK), run(mixing, ids_NT, gates_NK)) < 1e-6
    tokens_NTK = some_gates(4, 7, 3, seed=9)
    assert gap(run(mixing, ids_NT, tokens_NTK)[:, -2:], run(mixing, ids_NT, tokens_NTK, last_only=2)) < 1e-6
    assert gap(run(mixing, ids_NT, tokens_NTK)[2:3, 5:6], run(mixing, ids_NT, tokens_NTK[:, 5])[2:3, 5:6]) < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_4d_masks_boolean_or_additive_per_row_or_shared(paths, attention):
    """Two continuations of one prompt packed into one sequence, each blind to the other, against two sequences."""

    def make():
        return llama(attn_implementation=attention)

    ids_NT, gates_NK = some_ids(2, 6), some_gates(2, 3)
    sees = torch.ones(6, 6).tril().bool()
    sees[4:, 2:4] = False  # tokens 4, 5 follow tokens 0, 1 directly
    positions_NT = torch.tensor([[0, 1, 2, 3, 2, 3]] * 2)
    additive = torch.zeros(6, 6).masked_fill(~sees, torch.finfo(torch.float32).min)
    for level in ("parameter", "logit", "hidden"):
        mixing = policy(level, paths, make)
        want = [run(mixing, ids_NT[:, :4], gates_NK), run(mixing, ids_NT[:, [0, 1, 4, 5]], gates_NK)[:, 2:]]
        for mask in (sees[None, None], additive[None, None], sees.expand(2, 1, 6, 6)):
            packed = run(mixing, ids_NT, gates_NK, attention_mask=mask, position_ids=positions_NT)
            assert gap(packed, torch.cat(want, 1)) < 1e-5
    with pytest.raises(AssertionError, match="a 4-D mask does not say the positions"):
        run(mixing, ids_NT, gates_NK, attention_mask=sees[None, None])


def test_gradients_flow_through_logit_and_hidden_mixing(paths):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3)
    grads = []
    for level in ("logit", "hidden"):
        mixing = MIXINGS[level](LoraBank.load(llama(), paths, trainable=["e1"]), TOKENIZER)
        mixing.forward(ids_NT, gates_NK=gates_NK).log_softmax(-1)[..., 3].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in mixing.bank.parameters()]))
    assert float(grads[0].abs().max()) > 1e-3
    assert torch.allclose(*grads, atol=1e-4 * float(grads[0].abs().max()))
    peft = [peft_logits(llama, path, ids_NT) for path in paths.values()]
    mixing = MIXINGS["logit"](LoraBank.load(llama(), paths), TOKENIZER)
    gates_NK.requires_grad_()
    mixing.forward(ids_NT, gates_NK=gates_NK).log_softmax(-1)[..., 3].sum().backward()
    dense_NK = gates_NK.detach().clone().requires_grad_()
    torch.einsum("nk,kntv->ntv", dense_NK, torch.stack(peft)).log_softmax(-1)[..., 3].sum().backward()
    assert torch.allclose(gates_NK.grad, dense_NK.grad, atol=1e-3)


def test_bfloat16_experts_are_combined_in_float32(tmp_path):
    def make():
        return llama(torch.bfloat16)

    experts, ids_NT, gates_NK = write_adapters(make, tmp_path, [{}, {}]), some_ids(), some_gates(4, 2)
    parts = torch.stack([peft_logits(make, path, ids_NT) for path in experts.values()])
    got = run(policy("logit", experts, make), ids_NT, gates_NK)
    assert got.dtype == torch.float32
    want = torch.einsum("nk,kntv->ntv", gates_NK, parts.float())
    assert gap(got, want) < 0.02  # batches of another size round elsewhere; a combination in bfloat16 adds its own
    assert gap(run(policy("hidden", experts, make), ids_NT, gates_NK), got) < 0.05


def test_the_reference_policy_ignores_gates_and_needs_no_adapter(paths):
    ids_NT = some_ids()
    with torch.no_grad():
        want = llama()(input_ids=ids_NT).logits
    empty = ReferencePolicy(LoraBank.attach(llama(), names=[], seed=0), TOKENIZER)
    assert torch.equal(run(empty, ids_NT, torch.zeros(4, 0)), want)
    assert torch.equal(run(policy("reference", paths), ids_NT, some_gates(4, 3)), want)
    cache = empty.new_cache(4)
    run(empty, ids_NT[:, :5], torch.zeros(4, 0), cache=cache)
    assert gap(run(empty, ids_NT[:, 5:], torch.zeros(4, 0), cache=cache), want[:, 5:]) < 1e-5


def test_levels_say_what_they_cost(paths):
    bank = LoraBank.load(llama(), paths)
    cost = {cls.registered_name: cls(bank, TOKENIZER).forwards_per_token for cls in (ParameterMix, FactorMix, LogitMix, HiddenMix)}
    assert cost == {"parameter": 1.0, "factor": 1.0, "logit": 3.0, "hidden": 3.0}
    assert set(MIXINGS) >= {*cost, "reference", "hidden-layer", "divergence", "robust", "merged"}


def refused(*parts: str):
    return pytest.raises(ConfigError, match=".*".join(f"(?s:.*){re.escape(part)}" for part in parts))


def test_wrong_gates_and_caches_are_refused(paths):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3)
    for level in LEVEL_NAMES:
        for shape in ((2, 3), (4, 2), (4, 6, 3)):
            with refused("a policy takes one row of gates per row of the batch", f"gates {shape} for a batch (4, 7) and 3 adapters"):
                run(policy(level, paths), ids_NT, torch.ones(shape))
    with refused("factor averaging has one gate vector for the whole batch", "rows with different gates", 'use mixing "parameter"'):
        run(policy("factor", paths), ids_NT, gates_NK)
    for first, then in ((gates_NK, gates_NK.flip(1)), (None, gates_NK)):
        mixing = policy("parameter", paths)
        cache = mixing.new_cache(4)
        run(mixing, ids_NT, first, cache=cache)
        with refused("in a soup a cache belongs to the gates that filled it", "make a new cache for every preference"):
            run(mixing, ids_NT[:, :1], then, cache=cache)
    mixing = policy("logit", paths)  # where sharing is right
    cache = mixing.new_cache(4)
    run(mixing, ids_NT[:, :6], gates_NK, cache=cache)
    assert gap(run(mixing, ids_NT[:, 6:], gates_NK.flip(1), cache=cache), run(mixing, ids_NT, gates_NK.flip(1))[:, 6:]) < 1e-5


def test_hidden_mixing_needs_a_decoder_and_a_head(paths):
    bank = LoraBank.load(llama(), paths)
    bank.base = bank.base.model
    bank.base.generation_config = None
    with refused("hidden-state mixing needs a model made of a decoder and a head", "LlamaModel"):
        HiddenMix(bank, TOKENIZER)


def test_rules_turn_preferences_into_gates():
    w_WM = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    assert np.array_equal(Identity().gates(w_WM), w_WM)
    points = ((1.0, 0.0), (0.6, 0.4), (0.4, 0.6), (0.0, 1.0))
    assert Nearest(points_KM=points).gates(w_WM).argmax(1).tolist() == [0, 3, 1]  # the last one is a tie: the first wins
    assert np.array_equal(Nearest(points_KM=points).gates(np.array(points)), np.eye(4))
    assert np.array_equal(Constant(gates_K=(0.25, 0.25, 0.5)).gates(w_WM), np.tile([0.25, 0.25, 0.5], (3, 1)))
    table = Table(w_WM=((0.9, 0.1), (0.2, 0.8)), gates_WK=((0.3, 0.0, 0.7), (1.0, 0.5, 0.0)))
    assert table.gates(w_WM[[1, 0]]).tolist() == [[1.0, 0.5, 0.0], [0.3, 0.0, 0.7]]
    assert table.gates(np.array([[0.3, 0.7]])).tolist() == [[1.0, 0.5, 0.0]]


@pytest.mark.parametrize(
    "rule",
    [
        Identity(),
        Nearest(points_KM=((1.0, 0.0), (0.1, 0.9))),
        Constant(gates_K=(0.5, 0.5)),
        Table(w_WM=((0.5, 0.5),), gates_WK=((0.1, 1 / 3),)),
    ],
)
def test_rules_survive_json(rule):
    again = GATE_RULES.build(json.loads(json.dumps(describe(rule))))
    assert again == rule
    assert np.array_equal(again.gates(np.array([[0.3, 0.7]])), rule.gates(np.array([[0.3, 0.7]])))


def test_rules_that_are_no_tables_are_refused():
    with refused("nearest: points_KM is a table of finite numbers with rows of one length", "2 rows of lengths [1, 2]"):
        Nearest(points_KM=((1.0,), (0.5, 0.5)))
    with refused("nearest: points_KM is a table", "0 rows"):
        GATE_RULES.build({"name": "nearest", "points_KM": []})
    with refused("a table has one row of gates per preference", "2 preferences, 1 rows of gates"):
        Table(w_WM=((0.5, 0.5), (1.0, 0.0)), gates_WK=((1.0,),))
    with refused("gates are finite numbers", "gates_K = [nan]"):
        Constant(gates_K=(float("nan"),))
    with refused("a gate rule is known by its name", "'nearst'", "did you mean 'nearest'?"):
        GATE_RULES.build("nearst")
