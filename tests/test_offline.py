"""MODPO: the loss against TRL's and by hand, its minimum in closed form, and what is learned from the reference's responses alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from learner_cases import flat, moved, spec_of
from oracles import small_task
from paretune.errors import ConfigError
from paretune.policy.base import build_policy
from paretune.policy.returns import ExactReturns
from paretune.policy.scoring import token_logp
from paretune.registry import LEARNERS, METHODS, describe
from paretune.seeds import forked_torch
from paretune.tasks.exact.task import ExactTask
from paretune.testing.methods import check_method, quick_learner, quick_task
from paretune.training.batch import draw
from paretune.training.learners.embedded import EmbeddedLearner
from paretune.training.learners.modpo import Modpo, compared, modpo_loss
from paretune.training.learners.policy_gradient import PolicyGradient

TINY = ExactTask(alphabet=3, length=2, prompt_count=2, width=16, layers=1)
SMALL = {"rank": 2, "alpha": 4, "samples": 64, "batch": 16, "group": 4}


def test_the_loss_by_hand():
    at = {"ratio": torch.tensor([2.0, 2.0]), "margin": torch.tensor([0.1, 0.1]), "weight": torch.tensor([0.5, 0.5])}
    first, second = modpo_loss(**at, wins=torch.tensor([1.0, 0.0]), beta=0.25)  # (0.5 - 0.1) / 0.5 = 0.8
    assert first.item() == pytest.approx(np.log1p(np.exp(-0.8)))
    assert second.item() == pytest.approx(np.log1p(np.exp(0.8)))
    mixed = modpo_loss(**at, wins=torch.tensor([0.3, 0.3]), beta=0.25)[0]
    assert mixed.item() == pytest.approx(0.3 * first.item() + 0.7 * second.item())


def test_with_one_objective_it_is_the_loss_of_trl(tmp_path):
    """TRL's own trainer on three pairs, with the same weights and the same tokens."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    reference, tokenizer = TINY.load()
    model, _ = TINY.load()
    with torch.no_grad(), forked_torch(3):
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    config = trl.DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, beta=0.25, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True
    )
    rows = {"prompt": ["abc", "bca", "cca"], "chosen": ["ab", "c", "b"], "rejected": ["ca", "bb", ""]}
    trainer = trl.DPOTrainer(model, reference, args=config, processing_class=tokenizer, train_dataset=Dataset.from_dict(rows))
    batch = next(iter(trainer.get_train_dataloader()))

    def whole(model):
        with torch.no_grad():
            logits = model.forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logp = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        return (logp * batch["completion_mask"][:, 1:]).sum(1)

    changes = whole(model) - whole(reference)
    theirs = trainer.compute_loss(model, batch).item()
    chosen, rejected = changes.chunk(2)
    ours = modpo_loss(chosen - rejected, torch.zeros(3), torch.ones(3), torch.ones(3), beta=0.25).mean().item()
    assert abs(theirs - np.log(2)) > 1e-3
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("w_M", [(1.0, 0.0), (0.5, 0.5), (0.3, 0.7)])
def test_with_expected_labels_the_minimum_is_the_exact_optimum(w_M):
    """At pi*_w the fitted reward is the labeled objective's own, so every pair's gradient is 0; elsewhere it is not."""
    task, w_M = small_task(rho=-0.5), np.array(w_M)
    change_R = (task.optimum_logp_PR(w_M, "train") - task.reference_logp_PR("train"))[0]
    reward_RM, k = task.rewards_PRM("train")[0], int(w_M.argmax())
    apart_RM = reward_RM[1:] - reward_RM[:-1]
    margin = torch.from_numpy(np.delete(apart_RM, k, 1) @ np.delete(w_M, k))
    wins = torch.from_numpy(apart_RM[:, k]).sigmoid()
    for scale, wanted in ((1.0, True), (1.1, False)):
        ratio = torch.from_numpy(scale * np.diff(change_R)).requires_grad_()
        modpo_loss(ratio, margin, torch.full_like(margin, w_M[k]), wins, beta=task.beta).sum().backward()
        assert (ratio.grad.abs().max().item() < 1e-9) == wanted


def pairs_of(w_M=(0.3, 0.7), task=TINY, **fields):
    learner = Modpo(**{**SMALL, **fields})
    policy = moved(learner, task, w_M)
    return learner, policy, learner.collect(policy, task, spec_of(learner, w_M, task), 0)


def test_pairs_are_the_references_and_compared_by_the_largest_weight():
    learner, policy, batch = pairs_of()
    made = batch.responses
    same = draw(policy, TINY, spec_of(learner), step=0, first=0, prompts=4, group=4, reference=True)
    assert torch.equal(same.tokens_NT, made.tokens_NT)
    prompts = made.prompt_ids_PT.repeat_interleave(4, 0), made.prompt_mask_PT.repeat_interleave(4, 0)
    with torch.no_grad():
        reference_NT = token_logp(policy, *prompts, made.tokens_NT, gates_NK=None) * made.mask_NT
    torch.testing.assert_close(batch.reference_logp_NT, reference_NT, atol=1e-5, rtol=0)
    for p in range(4):
        for q, (i, j) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
            other, labeled = made.rewards_NM[4 * p + i] - made.rewards_NM[4 * p + j]
            assert batch.wins[p, q].item() == pytest.approx(1 / (1 + np.exp(-labeled)), abs=1e-6)
            assert batch.margin[p, q].item() == pytest.approx(0.3 * other, abs=1e-6)
            assert batch.weight[p, q].item() == pytest.approx(0.7)
    hard, drawn = pairs_of(labels="hard")[2], pairs_of(labels="drawn")[2]
    assert torch.equal(hard.wins[batch.wins != 0.5], (batch.wins[batch.wins != 0.5] > 0.5).float())
    assert set(drawn.wins.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(drawn.wins, hard.wins)


@pytest.mark.parametrize("w_M", [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.4, 0.2, 0.4), (1 / 3, 1 / 3, 1 / 3)])
def test_the_labeled_weight_is_never_below_an_equal_share(w_M):
    task = dataclasses.replace(TINY, objective_count=3)
    batch = pairs_of(w_M, task)[2]
    assert batch.weight.min().item() >= 1 / 3 - 1e-6
    if max(w_M) == 1.0:
        assert not batch.margin.any()


@pytest.mark.parametrize("w_M", [(0.4, 0.4, 0.2), (0.4, 0.2, 0.4), (1 / 3, 1 / 3, 1 / 3)])
def test_a_tie_of_the_largest_weights_is_not_broken_by_the_order_of_objectives(w_M):
    """The same responses with their rewards and weights in the opposite order are compared by the same objective, bit for bit."""
    learner, _, batch = pairs_of(w_M, dataclasses.replace(TINY, objective_count=3))
    made = batch.responses
    turned = dataclasses.replace(made, w_NM=made.w_NM[:, ::-1].copy(), rewards_NM=made.rewards_NM[:, ::-1].copy())
    settings = {"group": learner.group, "labeled": learner.labeled, "labels": learner.labels}
    margin, weight, wins, known = compared(made, spec_of(learner, w_M), 0, **settings)
    for one, two in zip((weight, wins, known), compared(turned, spec_of(learner, w_M), 0, **settings)[1:], strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(compared(turned, spec_of(learner, w_M), 0, **settings)[0], margin, atol=1e-12)  # a sum in another order
    assert weight.min() == max(w_M)


def test_the_gradient_is_that_of_the_mean_and_does_not_depend_on_micro_batches():
    found = []
    for micro_batch in (None, 4, 6):
        learner, policy, batch = pairs_of(micro_batch=micro_batch)
        loss = learner.gradient(policy, batch, beta=TINY.beta)
        found.append((loss, flat(policy)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        np.testing.assert_allclose(gradient, found[0][1], rtol=1e-3, atol=1e-6)
    assert np.abs(found[0][1]).max() > 1e-4


def test_pairs_without_a_score_are_left_out():
    learner, policy, batch = pairs_of()
    learner.gradient(policy, batch, beta=TINY.beta)
    before = flat(policy)

    class Silent(ExactTask):
        def observe(self, prompts, completions, *, streams):
            rewards_NM = super().observe(prompts, completions, streams=streams)
            rewards_NM[0, 0] = np.nan
            return rewards_NM

    task = Silent(**dataclasses.asdict(TINY))
    batch = learner.collect(policy, task, spec_of(learner), 0)
    assert batch.known.sum() == 24 - 3
    assert not batch.known[0, :3].any()
    for parameter in policy.bank.parameters():
        parameter.grad = None
    learner.gradient(policy, batch, beta=TINY.beta)
    assert np.isfinite(flat(policy)).all()
    assert np.abs(flat(policy) - before).max() > 1e-5


def test_an_objective_without_weight_need_not_be_scored():
    """As everywhere else; its pairs were left out, all of them where it is never scored."""
    learner, _, batch = pairs_of((0.6, 0.4, 0.0), task := dataclasses.replace(TINY, objective_count=3))
    made = batch.responses
    holes_NM = made.rewards_NM.copy()
    holes_NM[:, 2] = np.nan
    spec = spec_of(learner, (0.6, 0.4, 0.0), task)
    settings = {"group": learner.group, "labeled": learner.labeled, "labels": learner.labels}
    whole = compared(made, spec, 0, **settings)
    for one, two in zip(whole, compared(dataclasses.replace(made, rewards_NM=holes_NM), spec, 0, **settings), strict=True):
        np.testing.assert_array_equal(one, two)
    assert whole[3].all()
    holes_NM[0, 1] = np.nan
    assert not compared(dataclasses.replace(made, rewards_NM=holes_NM), spec, 0, **settings)[3].all()


def test_an_update_is_bounded_however_far_the_policy_has_come(tmp_path, monkeypatch):
    """Its responses are the reference's: how far the policy says otherwise is what it has learned, and no rounding that widens it."""
    seen, bound = [], EmbeddedLearner._bound
    monkeypatch.setattr(EmbeddedLearner, "_bound", lambda self, run: seen.append((bound(self, run), run.kl)) or seen[-1][0])
    learner = Modpo(**{**SMALL, "samples": 160}, lr=3e-2, schedule="constant", labels="hard")
    learner.train(spec_of(learner, (1.0, 0.0)), TINY, tmp_path)
    assert max(kl for _, kl in seen) > 0.05, "it moved"
    for allowed, kl in seen:
        assert allowed == pytest.approx(max(0.02, 0.1 * kl))


def test_it_learns_what_the_policy_itself_never_said(tmp_path):
    """From the reference's responses alone to half of the possible gain, where the labels are not merely the larger reward."""
    task, w_M = small_task(rho=-0.8), np.array([0.3, 0.7])
    learner = Modpo(samples=2048, rank=4, lr=5e-3)
    cost = learner.train(spec_of(learner, tuple(w_M), task), task, tmp_path)
    assert cost.samples == 2048
    assert cost.tokens > 2048
    returns = ExactReturns(task, build_policy(task, "parameter", {"policy": tmp_path}), "train")
    start, best, mine = (
        w_M @ task.J_M(logp_PR, "train")
        for logp_PR in (task.reference_logp_PR("train"), task.optimum_logp_PR(w_M, "train"), returns.logp_PR(np.ones(1)))
    )
    assert mine - start > 0.4 * (best - start)


@pytest.mark.parametrize("count", [2, 3])
def test_conformance(count):
    learner = Modpo(samples=32, batch=16, group=4, rank=2)
    check_method({"name": "modpo", "points": 2}, task=quick_task(objective_count=count), learner=learner)


def test_it_takes_over_the_shape_and_budget_of_another_learner():
    sampled = Modpo.like(PolicyGradient(samples=640, rank=3, kl_in="loss", kl_estimator="k3", normalize="group", stop_cv=0.1))
    assert (sampled.samples, sampled.rank) == (640, 3)
    assert sampled.stop_cv == 0.1
    assert not {"kl_in", "kl_estimator", "normalize"} & set(describe(sampled)), "fields of a loss that it has not"
    assert Modpo.like(quick_learner(steps=7), labels="hard").steps == 7
    spec = METHODS.build({"name": "modpo", "labels": "hard"}).plan(TINY, quick_learner(), {}, 0)[0]
    assert (spec.learner["name"], spec.learner["labels"]) == ("modpo", "hard")


def test_what_a_user_can_get_wrong(tmp_path):
    with pytest.raises(ConfigError, match="no KL in a loss of its own"):
        LEARNERS.build({"name": "modpo", "kl_in": "loss", "kl_estimator": "k3"})

    def train(preference, labeled, **settings):
        learner = Modpo(**SMALL, labeled=labeled)
        learner.train(spec_of(learner, preference, TINY, **settings), TINY, tmp_path)

    with pytest.raises(ConfigError, match=r"(?s)must be above 0.*objective_1 with weight 0"):
        train((0.0, 1.0), 0)
    with pytest.raises(ConfigError, match="sampled preferences"):
        train(None, 0)
    with pytest.raises(ConfigError, match="labeled=2 of 2"):
        train((0.5, 0.5), 2)
    with pytest.raises(ConfigError, match="with the preference itself"):
        train((0.5, 0.5), None, scalarizer={"name": "product"})
