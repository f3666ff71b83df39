"""Scoring responses: packed against padded, the head in pieces, rows that leave, and products by oneDNN; values and gradients."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from paretune.policy import rollout, scoring
from paretune.policy.lora import linear
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.hidden import HiddenMix
from paretune.policy.mixing.parameter import FactorMix, ParameterMix, RoutedMix
from paretune.policy.mixing.predictions import LogitMix
from paretune.policy.rollout import decode
from paretune.policy.scoring import Packing, packs, token_logp
from paretune.seeds import forked_torch, generator
from tiny_models import TOKENIZER, VOCAB, gemma2, gpt2, llama

LENGTHS = (3, 1, 5, 4, 0, 2, 5, 1)  # of two groups of four responses


def policy_of(model, mixing=ParameterMix, **settings):
    bank = LoraBank.attach(model, names=["a", "b"], rank=2, alpha=4, seed=5)
    with torch.no_grad(), forked_torch(6):
        for parameter in bank.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return mixing(bank, TOKENIZER, **settings)


def batch(lengths=LENGTHS, prompts=(6, 3)):
    """Left-padded prompts, responses, and which tokens of these are asked for."""
    rng = generator(0, "scoring")
    ids_PT = torch.from_numpy(rng.integers(0, VOCAB - 1, (len(prompts), max(prompts))))
    mask_PT = torch.tensor([[0] * (max(prompts) - n) + [1] * n for n in prompts])
    tokens_NT = torch.from_numpy(rng.integers(0, VOCAB - 1, (len(lengths), max(lengths))))
    return ids_PT, mask_PT, tokens_NT, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def gradients(policy, value):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, policy.bank.parameters())])


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("per_prompt", [False, True], ids=["one gate vector", "one per prompt"])
def test_packed_and_padded_are_the_same_numbers_and_gradients(make, per_prompt):
    policy = policy_of(make())
    ids_PT, mask_PT, tokens_NT, asked_NT = batch()
    gates_NK = torch.tensor([[0.7, 0.3]] * 4 + [[0.7, 0.3] if not per_prompt else [-0.2, 1.1]] * 4)
    weight_NT = torch.from_numpy(generator(1, "weights").normal(size=tokens_NT.shape)).float() * asked_NT
    found = []
    for settings in ({"packed": False}, {"packed": True}, {"packed": True, "at_once": 5 * VOCAB}):
        logp_NT = token_logp(policy, ids_PT, mask_PT, tokens_NT, gates_NK=gates_NK, group=4, mask_NT=asked_NT, **settings)
        found.append((logp_NT.detach() * asked_NT, gradients(policy, (logp_NT * weight_NT).sum())))
    assert (found[0][1].abs() > 1e-3).float().mean() > 0.5, "a gradient that says something"
    for values, gradient in found[1:]:
        torch.testing.assert_close(values, found[0][0], atol=2e-5, rtol=0)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-4, rtol=1e-4)
    reference = token_logp(policy, ids_PT, mask_PT, tokens_NT, gates_NK=None, group=4, mask_NT=asked_NT, packed=True)
    plain = token_logp(policy, ids_PT, mask_PT, tokens_NT, gates_NK=None, group=4, packed=False)
    torch.testing.assert_close(reference * asked_NT, plain * asked_NT, atol=2e-5, rtol=0)
    assert (reference - found[0][0])[asked_NT].abs().max() > 0.01


def test_gates_get_their_gradient_from_packed_rows():
    policy, (ids_PT, mask_PT, tokens_NT, asked_NT) = policy_of(llama()), batch()
    slopes = []
    for packed in (False, True):
        gates_PK = torch.tensor([[0.7, 0.3], [0.7, 0.3]], requires_grad=True)  # alike, and yet each its own
        gates_NK = gates_PK.repeat_interleave(4, 0)
        logp_NT = token_logp(policy, ids_PT, mask_PT, tokens_NT, gates_NK=gates_NK, group=4, mask_NT=asked_NT, packed=packed)
        slopes.append(torch.autograd.grad((logp_NT * asked_NT).sum(), gates_PK)[0])
    assert slopes[0].abs().min() > 1e-3
    torch.testing.assert_close(slopes[1], slopes[0], atol=1e-4, rtol=1e-4)


def test_a_packing_holds_each_prompt_once_and_no_more_than_is_read():
    _ids_PT, mask_PT, _tokens_NT, asked_NT = batch()
    packing = Packing.of(mask_PT, asked_NT, 4)
    assert packing.size == 6 + 3 + sum(max(0, n - 1) for n in LENGTHS), "one sequence without padding"
    assert sorted(packing.prompt_BS[packing.prompt_BS >= 0].tolist()) == mask_PT.flatten().nonzero()[:, 0].tolist()
    assert len(packing.asked_U) == sum(LENGTHS)
    seen = packing.mask_B1SS[0, 0]
    assert not seen.triu(1).any()
    assert seen.diagonal().all()
    for row in range(packing.size):  # whatever is seen is the row's own prompt or its own response
        owners = {int(n) for n in packing.row_BS[0][seen[row] & (packing.token_BS[0] >= 0)]}
        assert len(owners) <= 1
    many = Packing.of(torch.ones(5, 200, dtype=torch.long), torch.ones(10, 31, dtype=torch.bool), 2)
    assert many.prompt_BS.shape == (5, 260), "a group is never cut, and two do not fit"


def test_what_is_packed_and_what_is_not():
    bank = policy_of(llama()).bank
    gates_NK = torch.ones(8, 2)
    assert packs(ParameterMix(bank, TOKENIZER), gates_NK)
    assert packs(RoutedMix(bank, TOKENIZER, experts=2), None)
    for mixing in (
        FactorMix(bank, TOKENIZER),
        RoutedMix(bank, TOKENIZER, experts=2),
        LogitMix(bank, TOKENIZER),
        HiddenMix(bank, TOKENIZER),
    ):
        assert not packs(mixing, gates_NK), mixing.mixing
    assert packs(policy_of(gpt2()), gates_NK)
    assert not packs(policy_of(gemma2(None)), gates_NK), "attention with a window"


def causal(inputs):
    """Only as causal attention has it: a text sees the text before it."""
    mask = inputs["attention_mask"]
    return {**inputs, "attention_mask": torch.full_like(mask, torch.finfo(mask.dtype).min).triu(1)}


def counted_on(inputs):
    return {**inputs, "position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}


@pytest.mark.parametrize(("wrong", "make"), [(causal, llama), (counted_on, gpt2)], ids=["masks", "positions"])
def test_a_model_that_reads_masks_or_positions_its_own_way_is_not_packed(monkeypatch, wrong, make):
    policy = policy_of(make())
    inputs = policy._inputs
    monkeypatch.setattr(policy, "_inputs", lambda *given: wrong(inputs(*given)) if given[2] is not None else inputs(*given))
    assert not packs(policy, torch.ones(8, 2))


def test_the_model_runs_over_fewer_tokens_where_responses_are_short(monkeypatch):
    policy = policy_of(llama())
    lengths = (40, *[3] * 15)
    ids_PT, mask_PT, tokens_NT, asked_NT = batch(lengths, (9,) * 4)
    sizes, forward = [], policy.forward
    monkeypatch.setattr(policy, "forward", lambda ids, **given: sizes.append(ids.numel()) or forward(ids, **given))
    gates_NK = torch.ones(16, 2)
    short = token_logp(policy, ids_PT, mask_PT, tokens_NT, gates_NK=gates_NK, group=4, mask_NT=asked_NT)
    assert sizes == [4 * 9 + 39 + 15 * 2]
    sizes.clear()
    monkeypatch.setattr(Packing, "of", lambda *_: pytest.fail("packed to find out that nothing is gained"))
    whole = token_logp(policy, ids_PT, mask_PT, tokens_NT, gates_NK=gates_NK, group=4, mask_NT=torch.ones_like(asked_NT))
    assert sum(sizes) == 4 * 9 + 16 * 39, "nothing to gain: padded, with prompts read once"
    torch.testing.assert_close(short * asked_NT, whole * asked_NT, atol=2e-5, rtol=0)


def test_logits_are_made_once_and_a_piece_at_a_time(monkeypatch):
    policy, (ids_PT, mask_PT, tokens_NT, _asked_NT) = policy_of(llama()), batch()
    made, head = [], scoring.run_head
    monkeypatch.setattr(scoring, "run_head", lambda model, h: made.append(h.shape[1]) or head(model, h))
    logp_NT = token_logp(policy, ids_PT, mask_PT, tokens_NT, gates_NK=torch.ones(8, 2), group=4, packed=False, at_once=3 * VOCAB)
    logp_NT.sum().backward()
    assert max(made) == 3
    assert sum(made) == 8 * 4, "the logits of first tokens come with the prompts"


@pytest.mark.parametrize("group", [1, 3])
def test_rows_that_have_ended_leave_and_nothing_changes(monkeypatch, group):
    """With a likely EOS rows end at different steps; the model then runs over those that are left."""
    policy = policy_of(llama())
    ids_PT, mask_PT, _, _ = batch(prompts=(6, 3, 4, 5))
    n = len(ids_PT) * group
    policy.eos_ids = (16, 0, 1)
    given = {"gates_NK": torch.ones(n, 2) * 0.5, "max_new_tokens": 12, "uniforms_NT": generator(3, "u").random((n, 12)), "group": group}
    rows, forward = [], policy.forward
    monkeypatch.setattr(policy, "forward", lambda ids, **settings: rows.append(len(ids)) or forward(ids, **settings))
    kept = decode(policy, ids_PT, mask_PT, **given)
    assert rows[0] == len(ids_PT)
    assert rows[-1] < n
    monkeypatch.setattr(rollout, "KEPT_BELOW", -1.0)
    whole = decode(policy, ids_PT, mask_PT, **given)
    assert torch.equal(kept.tokens_NT, whole.tokens_NT)
    assert torch.equal(kept.mask_NT, whole.mask_NT)
    assert torch.equal(kept.stopped_N, whole.stopped_N)
    assert kept.stopped_N.any()
    torch.testing.assert_close(kept.logp_NT, whole.logp_NT, atol=1e-5, rtol=0)
    assert not kept.logp_NT.is_inference()


@pytest.mark.parametrize("shape", [(7, 300), (2, 5, 300), (1, 300)])
def test_products_by_onednn_are_those_of_float64(monkeypatch, shape):
    rng = generator(4, "linear")
    weight, bias = (torch.from_numpy(rng.normal(size=size)).float() for size in ((260, 300), (260,)))
    x = torch.from_numpy(rng.normal(size=shape)).float().requires_grad_()
    dy = torch.from_numpy(rng.normal(size=(*shape[:-1], 260))).float()
    monkeypatch.setattr(linear, "ON_AVX512", torch.backends.mkldnn.is_available())
    for b in (None, bias):
        y = linear.frozen_linear(x, weight, b)
        truth = functional.linear(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(y.double(), truth, atol=2e-4, rtol=0)
        slope = torch.autograd.grad(y, x, dy)[0]
        torch.testing.assert_close(slope.double(), dy.double() @ weight.double(), atol=2e-4, rtol=0)
        with torch.inference_mode():
            assert torch.equal(linear.frozen_linear(x, weight, b), y)


def test_what_is_trained_small_or_of_another_dtype_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(linear, "ON_AVX512", True)
    monkeypatch.setattr(linear, "_product", lambda *_: pytest.fail("by oneDNN"))
    x = torch.ones(2, 300)
    for weight in (torch.ones(260, 300, requires_grad=True), torch.ones(10, 300)):
        assert linear.frozen_linear(x, weight).sum() == 2 * 300 * len(weight)
    assert linear.frozen_linear(x.bfloat16(), torch.ones(260, 300, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_is_not_copied_for_every_row(monkeypatch, avx512, dtype):
    """The head at the last token of each prompt: torch makes a batched product of a slice, which copies the head once per row."""
    monkeypatch.setattr(linear, "ON_AVX512", avx512 and torch.backends.mkldnn.is_available())
    head, h_NTH = torch.ones(2000, 64, dtype=dtype), torch.ones(3, 5, 64, dtype=dtype)
    ran = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Noted():
        y_N1V = linear.frozen_linear(h_NTH[:, -1:], head)
    assert (y_N1V.shape, float(y_N1V.float().mean())) == ((3, 1, 2000), 64.0)
    assert torch.ops.aten.bmm.default not in ran


def test_a_bank_gives_every_frozen_layer_this_product_and_takes_it_back(monkeypatch):
    """Layers with adapters, layers without and the head: a policy on it is the policy without."""
    model = llama()
    ids_NT = torch.arange(10)[None]
    with torch.no_grad():
        truth = model(ids_NT).logits
    bank = LoraBank.attach(model, names=["a"], rank=2, seed=0, targets=["q_proj", "v_proj"])
    called, product = [], linear._product
    monkeypatch.setattr(linear, "ON_AVX512", torch.backends.mkldnn.is_available())
    monkeypatch.setattr(linear, "LARGE", 1)
    monkeypatch.setattr(linear, "_product", lambda x, w, b: called.append(w.shape) or product(x, w, b))
    with torch.no_grad(), bank.gates(None):
        torch.testing.assert_close(model(ids_NT).logits, truth, atol=1e-4, rtol=1e-4)
    assert len(called) == 2 * 7 + 1
    bank.detach()
    with torch.no_grad():
        assert torch.equal(model(ids_NT).logits, truth)
    assert len(called) == 15


def test_packing_leaves_out_what_has_no_response():
    """Rows of which nothing is asked need no place, and a sequence's padding no state."""
    packing = Packing.of(torch.tensor([[1, 1]] * 3), torch.tensor([[True, True], [False, False], [True, False]]), 1)
    assert packing.size == 2 + 1 + 2 + 2
    assert packing.asked_U.tolist() == [0, 1, 4]
    assert np.isin(packing.states_U.numpy(), np.arange(packing.size)).all()
