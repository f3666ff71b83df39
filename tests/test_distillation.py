"""Distillation: what is minimized, by the identity that it rests on, and that the student becomes its teachers' mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner_cases import SMALL, TASK, moved, spec_of
from oracles import small_task
from paretune.errors import ConfigError
from paretune.evaluation.evaluate import evaluate
from paretune.policy.rules import StudentRule
from paretune.registry import LEARNERS, METHODS, describe
from paretune.seeds import forked_torch
from paretune.testing.methods import quick_learner, train_plan
from paretune.training.learners.distill import Distillation, mixture_kl
from paretune.training.learners.policy_gradient import PolicyGradient


def test_the_weighted_sum_over_teachers_is_the_kl_to_their_mixture_and_a_constant():
    with forked_torch(0):
        teachers = torch.randn(3, 4, 2, 7)
        students = torch.randn(2, 4, 2, 7)
    w = torch.tensor([0.2, 0.5, 0.3])
    mixture = (w[:, None, None, None] * teachers.log_softmax(-1)).sum(0)
    rest = []
    for student in students:
        apart = sum(w_k * mixture_kl(student, teacher) for w_k, teacher in zip(w, teachers, strict=True))
        rest.append(apart - mixture_kl(student, mixture))
    torch.testing.assert_close(rest[0], rest[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(rest[0], -mixture.logsumexp(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(mixture_kl(mixture + 3.0, mixture), torch.zeros(4, 2), atol=1e-6, rtol=0)


def test_the_student_samples_without_its_teachers():
    assert StudentRule(teachers=2).gates(np.array([[0.5, 0.5]])).tolist() == [[0, 0, 0.5, 0.5, 1.0]]


@pytest.mark.parametrize("more", [0, 1])
def test_the_student_becomes_the_mixture_at_one_forward(tmp_path, more):
    """From the soup, which does harm under conflict, to what the mixture of the same experts reaches at every judged preference."""
    task, learner = small_task(rho=-0.8), quick_learner(steps=60)
    method = METHODS.build({"name": "distilled", "more": more, "effort": 2.0})
    done = train_plan(method, task, learner, tmp_path, seed=0)
    student = method.policy(task, learner, done, 0)
    assert student.policy.forwards_per_token == 1
    mixture = METHODS.build({"name": "placed", "more": more}).policy(task, learner, done, 0)
    soup = METHODS.build({"name": "experts", "mixing": "parameter"}).policy(task, learner, done, 0)
    found = {
        name: np.array(evaluate(task, one, splits=["train"]).metrics["splits"]["train"]["attainment"]["per_preference"])
        for name, one in (("student", student), ("mixture", mixture), ("soup", soup))
    }
    assert np.abs(found["student"] - found["mixture"]).max() < 0.15 * np.abs(found["soup"] - found["mixture"]).max() + 0.02


def test_at_another_temperature_the_tempered_student_learns_the_tempered_mixture():
    """As everywhere the policy that is trained is the tempered one, which sampled; by one forward per row, without padding or groups."""
    learner = Distillation(**SMALL, temperature=2.0)
    policy, spec = moved(learner, preference=None), spec_of(learner, None)
    batch = learner.collect(policy, TASK, spec, 0)
    made, expected = batch.responses, 0.0
    with torch.no_grad():
        for n in range(16):
            prompt = made.prompt_ids_PT[n // 4][made.prompt_mask_PT[n // 4].bool()]
            tokens = made.tokens_NT[n][made.mask_NT[n]]
            rows = torch.cat([prompt, tokens])[None, :-1].expand(3, -1)
            gates = torch.cat([made.gates_NK[n : n + 1], torch.eye(2)])
            student, *teachers = policy.forward(rows, gates_NK=gates)[:, -len(tokens) :].div(2.0).log_softmax(-1)
            mixture = sum(w * teacher for w, teacher in zip(made.w_NM[n], teachers, strict=True)).log_softmax(-1)
            expected += (student.exp() * (student - mixture)).sum().item() / 16
    assert expected > 1e-3
    assert learner.loss(policy, batch, slice(0, 16), beta=TASK.beta).item() == pytest.approx(expected, rel=1e-4)


def test_it_takes_over_the_shape_and_budget_of_another_learner():
    rule = {"name": "identity"}
    from_sampled = Distillation.like(PolicyGradient(samples=640, rank=3, kl_in="loss", kl_estimator="k3", stop_cv=0.1), teacher=rule)
    assert (from_sampled.samples, from_sampled.rank, from_sampled.epochs) == (640, 3, 1)
    assert from_sampled.stop_cv == 0.1
    assert not {"kl_in", "kl_estimator"} & set(describe(from_sampled)), "fields of a loss that it has not"
    assert Distillation.like(quick_learner(steps=7), teacher=rule).steps == 7
    assert from_sampled.scaled(2.0).teacher == rule


def test_what_a_user_can_get_wrong():
    with pytest.raises(ConfigError, match="one epoch a batch"):
        Distillation(epochs=2)
    with pytest.raises(ConfigError, match="no KL to the reference"):
        LEARNERS.build({"name": "distill", "kl_in": "loss"})
    with pytest.raises(ConfigError, match="effort is positive"):
        METHODS.build({"name": "distilled", "effort": 0})


def test_what_the_distillation_cannot_train_is_said_before_the_teachers_are_paid_for():
    """As bridge and extended say it: their targets are the weighting of one preference, a distillation's preferences are sampled."""
    task = small_task(terms={"targets": {"objective_1": 0.5, "objective_2": 0.4}})
    with pytest.raises(ConfigError, match="follows one preference through a training"):
        METHODS.build("distilled").plan(task, quick_learner(), {}, 0)
    assert len(METHODS.build("distilled").plan(small_task(), quick_learner(), {}, 0)) == 2
