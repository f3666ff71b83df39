"""Mixing beyond the plain levels: at a layer, by other divergences, against the worst case, and merges that prune."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from paretune.errors import ConfigError
from paretune.policy.base import build_mixing
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import MergedMix, dare, ties, trim
from paretune.policy.mixing.predictions import worst_weights
from paretune.policy.rollout import decode
from paretune.seeds import forked_torch, uniforms
from tiny_models import TOKENIZER, dense_soup, gap, gemma2, gpt2, llama, opt, peft_logits, some_gates, some_ids, write_adapters

LAYERS = 3
MIDDLE = [{"name": "hidden-layer", "layer": layer} for layer in (1, 2)]
DIVERGENCE = [{"name": "divergence", "divergence": d} for d in ("forward-kl", "alpha", "js")]
FAITHFUL = [*MIDDLE, *DIVERGENCE, {"name": "robust", "radius": 0.0}, {"name": "merged", "density": 1.0}]  # a vertex is its expert


def deep():
    return llama(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_adapters(deep, tmp_path_factory.mktemp("experts"), [{}, {}, {}])


def policy(level, paths, make=deep):
    return build_mixing(level, LoraBank.load(make(), paths), TOKENIZER)


def name_of(level):
    return "-".join(str(part) for part in level.values())


@torch.no_grad()
def run(policy, ids_NT, gates_NK, **more):
    return policy.forward(ids_NT, gates_NK=gates_NK, **more)


def experts_logp(paths, ids_NT, make=deep):
    return torch.stack([peft_logits(make, path, ids_NT).double().log_softmax(-1) for path in paths.values()])


def refused(*parts: str):
    return pytest.raises(ConfigError, match=".*".join(f"(?s:.*){re.escape(part)}" for part in parts))


def rows_for(level, gates_NK):
    return gates_NK[:1].repeat(len(gates_NK), 1) if level["name"] == "merged" else gates_NK


# Every level


@pytest.mark.parametrize("level", ["parameter", MIDDLE[0], DIVERGENCE[2], {"name": "routed", "experts": 2}], ids=str)
def test_layers_that_are_given_rows_and_tokens_as_one_axis(tmp_path, level):
    experts = write_adapters(opt, tmp_path, [{}, {}])
    ids_NT = some_ids(3)
    got = run(policy(level, experts, opt), ids_NT, torch.eye(2)[[1, 0, 1]]).log_softmax(-1)
    want = torch.stack([peft_logits(opt, experts[f"e{k}"], ids_NT)[n] for n, k in enumerate([1, 0, 1])]).log_softmax(-1)
    assert gap(got, want) < 1e-5


@pytest.mark.parametrize("level", FAITHFUL, ids=name_of)
def test_a_vertex_is_its_expert_and_no_gates_are_the_reference(paths, level):
    ids_NT, mixing = some_ids(), policy(level, paths)
    for k, path in enumerate(paths.values()):
        assert gap(run(mixing, ids_NT, torch.eye(3)[k].repeat(4, 1)), peft_logits(deep, path, ids_NT)) < 1e-4
    with torch.no_grad():
        assert torch.equal(run(mixing, ids_NT, None), deep()(input_ids=ids_NT).logits)


@pytest.mark.parametrize("level", [*FAITHFUL, {"name": "robust"}, {"name": "merged", "density": 0.3}], ids=name_of)
def test_permuting_experts_and_gates_changes_nothing(paths, level):
    ids_NT, gates_NK, order = some_ids(), rows_for(level, some_gates(4, 3)), [2, 0, 1]
    shuffled = {f"e{k}": paths[f"e{k}"] for k in order}
    here = run(policy(level, paths), ids_NT, gates_NK)
    assert gap(here, run(policy(level, shuffled), ids_NT, gates_NK[:, order])) < 1e-4
    hears = level != {"name": "robust"}  # at radius 1 no preference is heard
    assert (gap(here, run(policy(level, shuffled), ids_NT, gates_NK)) > 1e-3) == hears


@pytest.mark.parametrize("level", [*MIDDLE, *DIVERGENCE, {"name": "robust", "radius": 0.5}, {"name": "merged"}], ids=name_of)
def test_cached_decoding_equals_one_pass_with_padding_on_the_left(paths, level):
    mixing, gates_NK = policy(level, paths), rows_for(level, some_gates(4, 3))
    ids_NT, pads = some_ids(4, 9), [0, 2, 3, 1]
    mask_NT = torch.stack([(torch.arange(9) >= pad).long() for pad in pads])
    whole = run(mixing, ids_NT, gates_NK, attention_mask=mask_NT)
    cache = mixing.new_cache(4)
    steps = [run(mixing, ids_NT[:, :5], gates_NK, attention_mask=mask_NT[:, :5], cache=cache)]
    for t in range(5, 9):
        steps.append(run(mixing, ids_NT[:, t : t + 1], gates_NK, attention_mask=mask_NT[:, : t + 1], cache=cache, last_only=True))
    cached = torch.cat(steps, 1)
    for n, pad in enumerate(pads):
        assert gap(whole[n, pad:], cached[n, pad:]) < 2e-5
        assert gap(whole[n : n + 1, pad:], run(mixing, ids_NT[n : n + 1, pad:], gates_NK[n : n + 1])) < 2e-5
    assert gap(whole[:, -3:], run(mixing, ids_NT, gates_NK, attention_mask=mask_NT, last_only=3)) < 2e-5


@pytest.mark.parametrize("level", [*MIDDLE, {"name": "divergence", "divergence": "js"}, {"name": "merged"}], ids=name_of)
def test_sampling_reads_a_prompt_once_for_its_group(paths, level):
    mixing, ids_PT, gates_NK = policy(level, paths), some_ids(2, 5), rows_for(level, some_gates(2, 3)).repeat_interleave(3, 0)
    draws_NT = np.stack([uniforms(4, 0, "test", n) for n in range(6)])
    wanted = {"max_new_tokens": 4, "uniforms_NT": draws_NT, "gates_NK": gates_NK}
    grouped = decode(mixing, ids_PT, torch.ones_like(ids_PT), group=3, **wanted)
    alone = decode(mixing, ids_PT.repeat_interleave(3, 0), torch.ones(6, 5, dtype=torch.long), **wanted)
    assert torch.equal(grouped.tokens_NT, alone.tokens_NT)
    assert torch.allclose(grouped.logp_NT, alone.logp_NT, atol=1e-4)
    assert len({tuple(row) for row in grouped.tokens_NT.tolist()}) > 2


def test_levels_say_what_they_cost(paths):
    bank = LoraBank.load(deep(), paths)
    found = {name_of(level): build_mixing(level, bank, TOKENIZER).forwards_per_token for level in (*MIDDLE, *DIVERGENCE)}
    assert found == {
        "hidden-layer-1": pytest.approx(5 / 3),  # 3 experts in one of three layers, one soup in two
        "hidden-layer-2": pytest.approx(7 / 3),
        "divergence-forward-kl": 3,
        "divergence-alpha": 3,
        "divergence-js": 4,
    }
    assert build_mixing({"name": "hidden-layer", "layer": 0}, bank, TOKENIZER).forwards_per_token == 1
    assert build_mixing({"name": "hidden-layer", "layer": LAYERS}, bank, TOKENIZER).forwards_per_token == 3
    assert build_mixing({"name": "robust"}, bank, TOKENIZER).forwards_per_token == 3
    assert build_mixing("merged", bank, TOKENIZER).forwards_per_token == 1


# Hidden states at a layer


@pytest.mark.parametrize("make", [deep, gpt2, lambda: gemma2(None)], ids=["llama", "gpt2", "gemma2"])
def test_the_first_layer_is_the_soup_and_the_last_is_logit_mixing(tmp_path, make):
    fan = {"fan_in_fan_out": True} if make is gpt2 else {}
    experts, ids_NT, gates_NK = write_adapters(make, tmp_path, [fan] * 2), some_ids(), some_gates(4, 2)
    last = make().config.num_hidden_layers
    soup, logit = (run(policy(level, experts, make), ids_NT, gates_NK) for level in ("parameter", "logit"))
    ends = [run(policy({"name": "hidden-layer", "layer": layer}, experts, make), ids_NT, gates_NK) for layer in range(last + 1)]
    assert gap(ends[0], soup) < 1e-5
    assert gap(ends[-1], logit) < 1e-5
    for between in ends[1:-1]:
        assert min(gap(between, soup), gap(between, logit)) > 1e-2
    per_token = gates_NK[:, None].repeat(1, 7, 1)
    for layer, want in enumerate(ends):
        mixing = policy({"name": "hidden-layer", "layer": layer}, experts, make)
        assert gap(run(mixing, ids_NT, per_token), want) < 1e-5
        assert gap(run(mixing, ids_NT, per_token, last_only=2), want[:, -2:]) < 1e-5


def by_hand(paths, ids_NT, gates_K, layer):
    """Merged copies of the model, their layers called one after the other."""
    mixed = 0.0
    with torch.no_grad():
        for k in range(len(paths)):
            expert = dense_soup(deep, paths, torch.eye(len(paths))[k])
            mixed = mixed + gates_K[k] * expert(input_ids=ids_NT, output_hidden_states=True).hidden_states[layer]
        soup = dense_soup(deep, paths, gates_K)
        rotary = soup.model.rotary_emb(mixed, torch.arange(ids_NT.shape[1])[None])
        for module in soup.model.layers[layer:]:
            mixed = module(mixed, position_embeddings=rotary)
        return soup.lm_head(soup.model.norm(mixed))


@pytest.mark.parametrize("layer", [1, 2])
def test_a_layer_in_the_middle_against_merged_copies(paths, layer):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3)
    got = run(policy({"name": "hidden-layer", "layer": layer}, paths), ids_NT, gates_NK)
    want = torch.cat([by_hand(paths, ids_NT[n : n + 1], gates_NK[n], layer) for n in range(4)])
    assert gap(got, want) < 1e-5


def test_masks_and_positions_follow_the_rows(paths):
    """Two continuations packed into one sequence, with a mask per row; and as many tokens as stacked rows, where vectors could be cut."""
    ids_NT, gates_NK = some_ids(2, 6), some_gates(2, 3)
    sees = torch.ones(6, 6).tril().bool()
    sees[4:, 2:4] = False
    positions_NT = torch.tensor([[0, 1, 2, 3, 2, 3]] * 2)
    for level in MIDDLE:
        mixing = policy(level, paths)
        want = [run(mixing, ids_NT[:, :4], gates_NK), run(mixing, ids_NT[:, [0, 1, 4, 5]], gates_NK)[:, 2:]]
        for mask in (sees[None, None], sees.expand(2, 1, 6, 6)):
            packed = run(mixing, ids_NT, gates_NK, attention_mask=mask, position_ids=positions_NT)
            assert gap(packed, torch.cat(want, 1)) < 1e-5


def test_nothing_is_left_behind(paths):
    mixing = policy(MIDDLE[0], paths)
    before = [len(m._forward_pre_hooks) for m in mixing.layers]
    run(mixing, some_ids(), some_gates(4, 3))
    with refused("a policy takes one row of gates per row of the batch"):
        run(mixing, some_ids(), some_gates(3, 3))
    with pytest.raises(IndexError):
        run(mixing, torch.full((1, 2), 10_000), some_gates(1, 3))
    assert [len(m._forward_pre_hooks) for m in mixing.layers] == before
    with refused("a model with a LoraBank runs under gates"):
        mixing.model(input_ids=some_ids())


def test_gradients_reach_experts_and_gates(paths):
    """Against a finite difference of the gates, and not 0 for an adapter below and above the layer."""
    mixing = build_mixing(MIDDLE[0], LoraBank.load(deep(), paths, trainable=["e1"]), TOKENIZER)
    ids_NT, gates_NK = some_ids(1), some_gates(1, 3).requires_grad_()

    def value(gates):
        return mixing.forward(ids_NT, gates_NK=gates).log_softmax(-1)[..., 3].sum()

    value(gates_NK).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in mixing.bank.parameters())
    for k in range(3):
        step = 1e-2 * torch.eye(3)[k]
        with torch.no_grad():
            slope = (value(gates_NK + step) - value(gates_NK - step)) / 2e-2
        assert float(gates_NK.grad[0, k]) == pytest.approx(float(slope), rel=0.05, abs=0.05)


def test_wrong_layers_and_caches_of_other_gates_are_refused(paths):
    bank = LoraBank.load(deep(), paths)
    for layer in (-1, 4, True):
        with refused("hidden states are mixed at a layer from 0 (the soup) to 3", f"layer = {layer}", "this model has 3 layers"):
            build_mixing({"name": "hidden-layer", "layer": layer}, bank, TOKENIZER)
    mixing, ids_NT, gates_NK = policy(MIDDLE[0], paths), some_ids(), some_gates(4, 3)
    cache = mixing.new_cache(4)
    run(mixing, ids_NT, gates_NK, cache=cache)
    with refused("a cache belongs to the gates that filled it"):
        run(mixing, ids_NT[:, :1], gates_NK.flip(1), cache=cache)
    bank.base.model.layers = torch.nn.ModuleList(bank.base.model.layers[:1])
    with refused("needs a decoder with one list of layers", "no list of 3 modules in LlamaModel"):
        build_mixing({"name": "hidden-layer", "layer": 1}, bank, TOKENIZER)


# Divergences


def test_harmonic_and_power_means_are_the_published_formulas(paths):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3)
    p_KNTV, w = experts_logp(paths, ids_NT).exp(), gates_NK.double().t()[:, :, None, None]
    harmonic = 1 / (w / p_KNTV).sum(0)
    got = run(policy(DIVERGENCE[0], paths), ids_NT, gates_NK)
    assert gap(got, (harmonic / harmonic.sum(-1, keepdim=True)).log()) < 1e-4
    for alpha in (0.3, 0.8):
        power = (w * p_KNTV**-alpha).sum(0) ** (-1 / alpha)
        got = run(policy({"name": "divergence", "divergence": "alpha", "alpha": alpha}, paths), ids_NT, gates_NK)
        assert gap(got, (power / power.sum(-1, keepdim=True)).log()) < 1e-4
        without = (w * p_KNTV**-alpha).sum(0) ** -1  # what leaving 1 / alpha out would be
        assert gap(got, (without / without.sum(-1, keepdim=True)).log()) > 1e-2


def test_alpha_runs_from_the_product_to_the_harmonic_mean(paths):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3)

    def at(alpha):
        return run(policy({"name": "divergence", "divergence": "alpha", "alpha": alpha}, paths), ids_NT, gates_NK)

    logit, harmonic = run(policy("logit", paths), ids_NT, gates_NK), run(policy(DIVERGENCE[0], paths), ids_NT, gates_NK)
    assert gap(at(1.0), harmonic) < 1e-5
    assert gap(at(1e-3), logit) < 1e-3
    away = [gap(at(alpha), logit) for alpha in (0.01, 0.1, 0.5, 1.0)]
    assert away == sorted(away)
    assert away[-1] > 10 * away[0]


def test_js_solves_its_equation(paths):
    """f'(x) = log(2 x / (1 + x)) for x = pi / pi_ref, by bisection, before the normalizer."""
    ids_NT, gates_NK = some_ids(1, 2), some_gates(1, 3)
    with torch.no_grad():
        reference_V = deep()(input_ids=ids_NT).logits.double().log_softmax(-1).exp()[0, -1].numpy()
    experts_KV = experts_logp(paths, ids_NT)[:, 0, -1].exp().numpy()
    w_K = gates_NK[0].double().numpy()

    def slope(x):
        return np.log(2 * x / (1 + x))

    aims_V = (w_K[:, None] * slope(experts_KV / reference_V)).sum(0)
    x_V = np.array([brentq(lambda x, aim=aim: slope(x) - aim, 1e-12, 1e12, xtol=1e-14) for aim in aims_V])
    want_V = x_V * reference_V
    got = run(policy(DIVERGENCE[2], paths), ids_NT, gates_NK)[0, -1].log_softmax(-1).exp().numpy()
    assert got == pytest.approx(want_V / want_V.sum(), rel=1e-4)


@pytest.mark.parametrize("apart", [10.0, 40.0, 100.0, 400.0])
def test_js_far_from_the_reference(paths, apart):
    """Experts that agree are their mixture, also where exp(-apart) is no float32; the reference has a token that they have not."""
    expert_V = torch.tensor([apart, 0.0, 1.0, -apart]).requires_grad_()
    parts = torch.stack([*[expert_V] * 3, torch.tensor([0.0, apart, 0.0, 0.0])])[:, None, None]
    got = policy(DIVERGENCE[2], paths).combine(parts, some_gates(1, 3)).log_softmax(-1)[0, 0]
    assert got.detach().numpy() == pytest.approx(expert_V.detach().log_softmax(-1).numpy(), abs=1e-3, rel=1e-4)
    (got[1] - got[2]).backward()
    assert expert_V.grad.numpy() == pytest.approx([0.0, 1.0, -1.0, 0.0], abs=1e-3)


@pytest.mark.parametrize("apart", [16.0, 40.0, 100.0])
def test_js_of_experts_that_are_unequally_far_from_the_reference(paths, apart):
    """In float64 the formula holds as it is written."""
    experts, gates = [torch.tensor([x, 0.0, 1.0]) for x in (-6.0, 1.0, 3.0)], some_gates(1, 3)
    parts = torch.stack([*experts, torch.tensor([-apart, 0.0, 0.0])])[:, None, None]
    logp, w = parts.double().log_softmax(-1), gates.double().t()[:, :, None, None]
    log_s = (w * torch.nn.functional.logsigmoid(logp[:-1] - logp[-1:])).sum(0)
    want = (logp[-1] + log_s - torch.log(-torch.expm1(log_s))).log_softmax(-1)
    assert gap(policy(DIVERGENCE[2], paths).combine(parts, gates).log_softmax(-1).double(), want) < 1e-3


@pytest.mark.parametrize("level", [*DIVERGENCE[:2], {"name": "robust", "radius": 0.4}], ids=name_of)
def test_means_do_not_hear_the_scale_of_the_gates(paths, level):
    mixing, ids_NT, gates_NK = policy(level, paths), some_ids(), some_gates(4, 3)
    assert gap(run(mixing, ids_NT, 3 * gates_NK), run(mixing, ids_NT, gates_NK)) < 1e-4


@pytest.mark.parametrize("level", [*DIVERGENCE, {"name": "robust"}], ids=name_of)
def test_gates_that_are_no_weights_are_refused(paths, level):
    mixing, ids_NT = policy(level, paths), some_ids(1)
    with refused("the gates of this mixing are weights", "a smallest gate of -0.5", 'mixing "logit"'):
        run(mixing, ids_NT, torch.tensor([[1.5, -0.5, 0.0]]))
    with refused("the gates of this mixing are weights", "a smallest sum of 0"):
        run(mixing, ids_NT, torch.zeros(1, 3))


def test_bad_settings(paths):
    bank = LoraBank.load(deep(), paths)
    for level, parts in (
        ({"name": "divergence", "divergence": "kl"}, ("a divergence is one of forward-kl, alpha, js", "'kl'")),
        ({"name": "divergence", "alpha": 0.0}, ("0 < alpha <= 1", "alpha=0")),
        ({"name": "robust", "radius": 1.5}, ("the radius of the worst case lies between 0 and 1", "radius=1.5")),
        ({"name": "merged", "how": "tie"}, ("a merge is one of ties, dare, dare-ties", "'tie'")),
        ({"name": "merged", "density": 0.0}, ("a share of entries above 0 and at most 1", "density=0")),
    ):
        with refused(*parts):
            build_mixing(level, bank, TOKENIZER)


# The worst case


def random_logp(k, seed, v=6, sharp=2.0):
    return (sharp * torch.randn(k, 2, 3, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(-1)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_worst_weights_are_those_of_a_general_solver(k):
    logp = random_logp(k, seed=k)
    logp[0] = 0.7 * logp[1] + 0.3 * logp[-1]  # an expert that lies between others
    logp = logp.log_softmax(-1)
    center = torch.full((2, 1, k), 1 / k, dtype=torch.float64)
    for radius in (1.0, 0.4):
        got = worst_weights(logp, center, radius=radius)
        assert got.sum(-1).numpy() == pytest.approx(np.ones((2, 3)))
        assert float(got.min()) >= (1 - radius) / k - 1e-9
        for n, t in ((0, 0), (0, 2), (1, 1)):
            x_KV = logp[:, n, t].numpy()

            def value(u, x_KV=x_KV, radius=radius):
                return np.log(np.exp(((1 - radius) / k + radius * u) @ x_KV).sum())

            best = minimize(
                value, np.full(k, 1 / k), bounds=[(0, 1)] * k, constraints={"type": "eq", "fun": lambda u: u.sum() - 1}, tol=1e-14
            )
            mine = (got[n, t].numpy() - (1 - radius) / k) / radius
            assert value(mine) == pytest.approx(best.fun, abs=1e-7)


def test_the_worst_case_is_equally_far_from_every_expert_that_counts(paths):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3)
    logp = experts_logp(paths, ids_NT)
    mixed = run(policy({"name": "robust"}, paths), ids_NT, gates_NK).double().log_softmax(-1)
    far_KNT = (mixed.exp() * (mixed - logp)).sum(-1)
    weights_KNT = worst_weights(logp, gates_NK[:, None].double(), radius=1.0).movedim(-1, 0)
    largest_NT = far_KNT.max(0).values
    assert float(((largest_NT - far_KNT) * (weights_KNT > 1e-4)).max()) < 1e-4
    assert float((weights_KNT < 1e-6).double().sum()) > 0, "some expert does not count somewhere: else the test is easier than it looks"
    plain = run(policy("logit", paths), ids_NT, gates_NK).double().log_softmax(-1)
    assert float(((plain.exp() * (plain - logp)).sum(-1).max(0).values - largest_NT).min()) > -1e-6, "no mixture is nearer to all"


def test_the_radius_runs_from_logit_mixing_to_the_whole_simplex(paths):
    ids_NT, gates_NK = some_ids(), some_gates(4, 3)
    logit = run(policy("logit", paths), ids_NT, gates_NK)
    away = [gap(run(policy({"name": "robust", "radius": r}, paths), ids_NT, gates_NK), logit) for r in (0.0, 0.1, 0.5, 1.0)]
    assert away[0] < 1e-5
    assert away == sorted(away)
    one, other = (run(policy({"name": "robust"}, paths), ids_NT, some_gates(4, 3, seed=s)) for s in (1, 2))
    assert gap(one, other) < 1e-4


# Merges


def deltas(paths):
    """Module -> (K, O, I) from the files alone."""
    base, found = dict(deep().named_parameters()), {}
    for k in range(len(paths)):
        merged = dict(dense_soup(deep, paths, torch.eye(len(paths))[k]).named_parameters())
        for name, weight in merged.items():
            found.setdefault(name, []).append((weight - base[name]).detach())
    return {name: torch.stack(each) for name, each in found.items() if float(torch.stack(each).abs().max()) > 0}


def test_ties_is_pefts_at_equal_weights(paths):
    """PEFT's functions, which know no election by weight and no weighted mean, agree where all weights are 1."""
    from peft.utils import merge_utils

    for delta_KOI in list(deltas(paths).values())[:4]:
        each = list(delta_KOI)
        want = merge_utils.ties(each, torch.ones(3), 0.4)
        kept = torch.stack([trim(d, 0.4) for d in each])
        assert torch.allclose(ties(kept, torch.full((3,), 0.2), normalize=True), want, atol=1e-6)
        assert torch.equal(kept[1], merge_utils.magnitude_based_pruning(each[1], 0.4))
        soup = merge_utils.magnitude_prune(each, torch.tensor([0.5, 0.3, 0.2]), 0.4)
        assert not torch.allclose(ties(kept, torch.tensor([0.5, 0.3, 0.2]), normalize=False), soup, atol=1e-3)


def test_ties_entry_by_entry():
    gates = [0.5, 0.3, 0.2]
    rows = [(2.0, -1.0, 1.0), (1.0, -3.0, 0.5), (-1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (3.0, 0.0, -7.0), (2.0, 2.0, 2.0)]
    for row in rows:
        pulled = [g * d for g, d in zip(gates, row, strict=True)]
        sign = 1 if sum(pulled) >= 0 else -1
        agree = [k for k in range(3) if pulled[k] * sign > 0]
        total, weight = sum(pulled[k] for k in agree), sum(gates[k] for k in agree)
        deltas_KOI = torch.tensor(row, dtype=torch.float64)[:, None, None]
        for normalize, want in ((False, total), (True, total / weight if agree else 0.0)):
            got = ties(deltas_KOI, torch.tensor(gates, dtype=torch.float64), normalize=normalize)
            assert float(got) == pytest.approx(want)


def test_dare_is_unbiased_and_keeps_its_share():
    """4.5 standard errors over 400 draws of 120 entries: false alarm below 1e-3."""
    delta = torch.randn(12, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.stack([dare(delta, 0.3, seed=s) for s in range(400)])
    spread = delta.abs() * ((1 - 0.3) / 0.3 / 400) ** 0.5
    assert bool(((draws.mean(0) - delta).abs() < 4.5 * spread).all())
    assert float((draws != 0).double().mean()) == pytest.approx(0.3, abs=4.5 * (0.21 / draws.numel()) ** 0.5)
    assert torch.equal(dare(delta, 0.3, seed=5), dare(delta, 0.3, seed=5))
    assert torch.equal(dare(delta, 1.0, seed=5), delta)
    kept = draws[0] != 0
    assert torch.allclose(draws[0][kept], delta[kept] / 0.3)


@pytest.mark.parametrize("how", ["ties", "dare", "dare-ties"])
def test_a_merged_policy_is_the_model_with_pefts_merge_in_its_weights(paths, how, monkeypatch):
    """PEFT's arithmetic on changes that were read from the files; its random pruning is replaced by ours, which a test above looks at."""
    from peft.utils import merge_utils

    ids_NT, gates_K, density = some_ids(), torch.full((3,), 1 / 3), 0.5
    mixing = policy({"name": "merged", "how": how, "density": density, "normalize": True, "seed": 7}, paths)
    model, found = deep(), deltas(paths)
    sparse = {layer.name: None for layer in mixing.bank._layers}
    assert {f"{name}.weight" for name in sparse} == set(found)
    with torch.no_grad():
        for name in sparse:
            each = list(found[f"{name}.weight"])
            pruned = iter(mixing._sparse(torch.stack(each), name))
            monkeypatch.setattr(merge_utils, "random_pruning", lambda tensor, density, rescale, pruned=pruned: next(pruned))
            if how == "ties":
                merged = merge_utils.ties(each, torch.ones(3), density)
            elif how == "dare-ties":
                merged = merge_utils.dare_ties(each, torch.ones(3), density)
            else:
                merged = merge_utils.dare_linear(each, gates_K, density)
            model.get_parameter(f"{name}.weight").add_(merged)
        want = model(input_ids=ids_NT).logits
    got = run(mixing, ids_NT, gates_K.repeat(4, 1))
    assert gap(got, want) < 1e-3
    assert gap(got, run(policy("parameter", paths), ids_NT, gates_K.repeat(4, 1))) > 1e-2


def test_a_merge_of_a_tied_head_leaves_the_embeddings_alone():
    bank = LoraBank.attach(llama(tie_word_embeddings=True), names=["a", "b"], seed=0, rank=2, targets=["lm_head", "q_proj"])
    with torch.no_grad(), forked_torch(1):
        for parameter in bank.parameters():
            parameter.normal_(0, 0.3)
    ids_NT, gates_NK = some_ids(2), torch.tensor([[0.3, 0.7]]).repeat(2, 1)
    dense = run(build_mixing({"name": "merged", "how": "dare", "density": 1.0}, bank, TOKENIZER), ids_NT, gates_NK)
    assert gap(dense, run(build_mixing("parameter", bank, TOKENIZER), ids_NT, gates_NK)) < 1e-4


def test_dropping_nothing_is_the_plain_soup(paths, tmp_path):
    ids_NT, gates_NK = some_ids(), torch.tensor([[0.2, 0.5, 0.3]]).repeat(4, 1)
    level = {"name": "merged", "how": "dare", "density": 1.0}
    assert gap(run(policy(level, paths), ids_NT, gates_NK), run(policy("parameter", paths), ids_NT, gates_NK)) < 1e-5
    tied = write_adapters(gpt2, tmp_path, [{"fan_in_fan_out": True}] * 2)  # matrices that are stored transposed
    two = gates_NK[:, :2]
    assert gap(run(policy(level, tied, gpt2), ids_NT, two), run(policy("parameter", tied, gpt2), ids_NT, two)) < 1e-5


def test_a_merge_is_kept_until_gates_or_adapters_change(paths):
    mixing = policy({"name": "merged"}, paths)
    first = mixing.weights(torch.tensor([0.5, 0.3, 0.2]))
    assert mixing.weights(torch.tensor([0.5, 0.3, 0.2])) is first
    assert mixing.weights(torch.tensor([0.2, 0.3, 0.5])) is not first
    again = mixing.weights(torch.tensor([0.5, 0.3, 0.2]))
    with torch.no_grad():
        mixing.bank.parameters_of(0)[0].mul_(2.0)
    changed = mixing.weights(torch.tensor([0.5, 0.3, 0.2]))
    assert any(not torch.equal(changed[name], again[name]) for name in again)


def test_one_merge_serves_one_preference(paths):
    mixing = policy({"name": "merged"}, paths)
    with refused("a merged soup has one gate vector for the whole batch", "rows with different gates", 'use mixing "parameter"'):
        run(mixing, some_ids(), some_gates(4, 3))
    with refused("a merged soup has one gate vector", "no gates"):
        mixing.parts(some_ids())
    assert isinstance(mixing, MergedMix)
