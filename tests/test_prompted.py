"""The preference in the prompt: the same numbers through every way of running it, and that the policy reads what stands there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles import small_task
from paretune.errors import ConfigError
from paretune.evaluation.explain import explain
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.prompted import PromptedMix, digit_ids
from paretune.policy.returns import ExactReturns
from paretune.policy.rollout import decode, encode
from paretune.policy.rules import PromptedRule
from paretune.policy.scoring import token_logp
from paretune.registry import METHODS
from paretune.report.page import token_table, write_explanation
from paretune.seeds import forked_torch, generator
from paretune.testing.methods import check_method, quick_learner, quick_task, train_plan
from paretune.training.learners.policy_gradient import PolicyGradient

W_NM = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.4, 0.6], [0.0, 1.0]])


@pytest.fixture(scope="module")
def task():
    return small_task(rho=-0.8)


@pytest.fixture(scope="module")
def policy(task):
    model, tokenizer = task.load()
    bank = LoraBank.load(model, {}, trainable=[])
    bank.add("policy", seed=1, rank=2, alpha=4, targets="all-linear")
    with torch.no_grad(), forked_torch(2):
        for parameter in bank.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return PromptedMix(bank, tokenizer, objectives=2, digits=2)


def plain(policy, ids_NT, w_NM):
    """(N, T, V): prefix by hand, the model called on whole rows, one by one, without masks."""
    rows = []
    for ids_T, w_M in zip(ids_NT, w_NM, strict=True):
        whole = [divmod(round(float(w) * 15), 4) for w in w_M]  # base 4, two digits
        before = torch.tensor([d for pair in whole for d in pair])
        with torch.no_grad(), policy.bank.gates(torch.ones(1)):
            rows.append(policy.model(torch.cat([before, ids_T])[None]).logits[0, len(before) :])
    return torch.stack(rows)


def test_the_packed_tree_gives_what_forwards_of_each_response_give(task, policy):
    tree, prompts = task.tree, encode(policy.tokenizer, task.prompts("train"))[0]
    for w_M in W_NM:
        logp_PR = ExactReturns(task, policy, "train").logp_PR(w_M.numpy())
        np.testing.assert_allclose(np.exp(logp_PR).sum(1), 1.0, atol=1e-5)
        for r in (0, 3, 17, tree.responses - 1):
            symbols = [*tree.symbols_RL[r][: tree.depth_R[r]].tolist(), *([tree.eos] if tree.depth_R[r] < tree.length else [])]
            response = torch.tensor(symbols).expand(len(prompts), -1)
            logits = plain(policy, torch.cat([prompts, response[:, :-1]], 1), w_M.expand(len(prompts), 2))[:, -len(symbols) :]
            alone = logits.double().log_softmax(-1).gather(2, response[..., None])[..., 0].sum(1)
            np.testing.assert_allclose(logp_PR[:, r], alone.numpy(), atol=2e-5)


def test_a_cache_changes_nothing_in_sampling_and_scoring(task, policy):
    ids_PT, mask_PT = encode(policy.tokenizer, task.prompts("train"))
    uniforms_NT = generator(3, "prompted").random((8, 3))
    gates_NK = W_NM.repeat_interleave(2, 0)
    made = decode(policy, ids_PT, mask_PT, gates_NK=gates_NK, max_new_tokens=3, uniforms_NT=uniforms_NT, group=2)
    ids_NT = torch.cat([ids_PT.repeat_interleave(2, 0), made.tokens_NT[:, :-1]], 1)
    full_NT = plain(policy, ids_NT, gates_NK)[:, -made.tokens_NT.shape[1] :].log_softmax(-1).gather(2, made.tokens_NT[..., None])[..., 0]
    torch.testing.assert_close(made.logp_NT.float(), full_NT * made.mask_NT, atol=2e-5, rtol=0)
    with torch.no_grad():
        for group in (1, 2):
            prompts = [x.repeat_interleave(2 // group, 0) for x in (ids_PT, mask_PT)]
            scored_NT = token_logp(policy, *prompts, made.tokens_NT, gates_NK=gates_NK, group=group)
            torch.testing.assert_close(scored_NT, full_NT, atol=2e-5, rtol=0)


def test_padding_changes_nothing(task, policy):
    ids_NT = encode(policy.tokenizer, task.prompts("train"))[0]
    padded_NT = torch.cat([torch.full((4, 2), policy.pad_id), ids_NT], 1)
    mask_NT = (torch.arange(5) >= 2).long().expand(4, 5)
    cache, more_NT = policy.new_cache(4), torch.tensor([[1], [2], [3], [0]])
    with torch.no_grad():
        first = policy.forward(padded_NT, gates_NK=W_NM, attention_mask=mask_NT, cache=cache)[:, 2:]
        mask_NT = torch.cat([mask_NT, torch.ones(4, 1, dtype=torch.long)], 1)
        then = policy.forward(more_NT, gates_NK=W_NM, attention_mask=mask_NT, cache=cache)
        shown = torch.tril(torch.ones(3, 3, dtype=torch.bool))[None, None]
        square = policy.forward(ids_NT, gates_NK=W_NM, attention_mask=shown, position_ids=torch.arange(3)[None])
        again = policy.forward(ids_NT, gates_NK=W_NM)
    wanted = plain(policy, torch.cat([ids_NT, more_NT], 1), W_NM)
    torch.testing.assert_close(torch.cat([first, then], 1), wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(square, wanted[:, :3], atol=2e-5, rtol=0)
    torch.testing.assert_close(again, wanted[:, :3], atol=2e-5, rtol=0)


def test_no_gates_are_the_reference_and_other_gates_need_another_cache(task, policy):
    ids_NT, (model, _) = encode(policy.tokenizer, task.prompts("train"))[0], task.load()
    with torch.no_grad():
        torch.testing.assert_close(policy.forward(ids_NT, gates_NK=None), model(ids_NT).logits)
        cache = policy.new_cache(4)
        policy.forward(ids_NT, gates_NK=W_NM, cache=cache)
        with pytest.raises(ConfigError, match="a cache belongs to the gates"):
            policy.forward(ids_NT[:, :1], gates_NK=W_NM.flip(0), cache=cache)


def test_what_moved_a_token_is_told_by_objective(task, policy, tmp_path):
    family = Family(policy, PromptedRule(objectives=2), task.objectives, task.base(), max_new_tokens=task.max_new_tokens)
    assert "adapters 1: policy" in repr(family)
    (found,) = explain(family, task.prompts("train")[0], [0.4, 0.6])
    assert found.adapters == task.objectives.names, "the one adapter has no share of its own"
    row = token_table(found).rows[-1]
    assert row["expert_0"] + row["expert_1"] + row["remainder"] == pytest.approx(row["ratio"])
    assert task.objectives.names[1] in write_explanation(tmp_path / "page.html", [found], None, family=family).read_text()


def test_digits_are_decimal_where_they_are_tokens_and_letters_elsewhere(task, policy):
    assert policy.prefix(W_NM).tolist() == [[0, 3, 3, 0], [3, 3, 0, 0], [1, 2, 2, 1], [0, 0, 3, 3]]
    assert digit_ids(policy.tokenizer) == [0, 1, 2, 3]

    class Decimal:
        def convert_tokens_to_ids(self, token):
            return 40 + int(token) if token.isdigit() else 7 if token == "a" else None

    assert digit_ids(Decimal()) == list(range(40, 50))
    policy_10 = PromptedMix(policy.bank, policy.tokenizer, objectives=3, digits=2)
    policy_10.symbols = torch.tensor(digit_ids(Decimal()))
    assert (policy_10.prefix(torch.tensor([[0.26, 0.74, 0.0]])) - 40).tolist() == [[2, 6, 7, 3, 0, 0]]
    assert (policy_10.K, policy_10.extra_positions, policy_10.forwards_per_token) == (3, 6, 1)


def test_it_learns_to_read_the_preference(task, tmp_path):
    """At each vertex the return of its own objective is the larger one, well above the reference; saved and loaded it is the same."""
    method, learner = METHODS.build({"name": "prompted"}), quick_learner(steps=200, rank=8)
    family = method.policy(task, learner, train_plan(method, task, learner, tmp_path, seed=0), 0)
    family.save(tmp_path / "family")
    loaded = Family.load(tmp_path / "family")
    assert loaded.policy.settings == {"objectives": 2, "digits": 2}
    start_M = task.J_M(task.reference_logp_PR("train"), "train")
    found = [ExactReturns(task, family.policy, "train").logp_PR(e_M) for e_M in np.eye(2)]
    J_WM = np.stack([task.J_M(logp_PR, "train") for logp_PR in found])
    assert J_WM[0, 0] > J_WM[1, 0] + 0.05
    assert J_WM[1, 1] > J_WM[0, 1] + 0.05
    assert (np.diag(J_WM) > start_M).all()
    np.testing.assert_allclose(ExactReturns(task, loaded.policy, "train").logp_PR(np.eye(2)[0]), found[0], atol=1e-5)


def test_conformance_with_the_sampled_learner():
    check_method("prompted", task=quick_task(), learner=PolicyGradient(samples=32, batch=16, group=4, rank=2))


def test_what_a_user_can_get_wrong(policy):
    with pytest.raises(ConfigError, match="effort is positive, digits are at least 1"):
        METHODS.build({"name": "prompted", "digits": 0})
    with pytest.raises(ConfigError, match="weights from 0 to 1"):
        policy.forward(torch.zeros(1, 3, dtype=torch.long), gates_NK=torch.tensor([[1.5, -0.5]]))
    with pytest.raises(ConfigError, match="the same for all tokens of a row"):
        policy.forward(torch.zeros(1, 3, dtype=torch.long), gates_NK=torch.ones(1, 3, 2) / 2)
    with pytest.raises(ConfigError, match="has one adapter"):
        PromptedMix(policy.bank, policy.tokenizer, objectives=0)

    class Wordless:
        def convert_tokens_to_ids(self, token):
            return None

    with pytest.raises(ConfigError, match="neither decimal digits nor letters"):
        digit_ids(Wordless())
    assert PromptedRule(objectives=2).gates(W_NM.numpy()).shape == (4, 2)
