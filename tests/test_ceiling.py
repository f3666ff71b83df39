"""The representable ceiling: against a joint optimization of all states, at its two ends; and the task whose optimum is below it."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from paretune.errors import TaskError
from paretune.tasks.base import reference
from paretune.tasks.exact.ceiling import representable_value_P, sphere
from paretune.tasks.exact.language import next_logits
from paretune.tasks.exact.rewards import fields
from paretune.tasks.exact.task import ExactTask, RepresentableTask

TINY = {"alphabet": 4, "length": 2, "prompt_count": 2, "width": 16, "layers": 1, "rho": -0.5, "seed": 1}
WIDE = {**TINY, "width": 64}
TASK = ExactTask(**TINY)


def test_states_of_the_model_lie_on_the_sphere_and_the_head_maps_them():
    model, _ = reference(TASK)
    A_VD, radius = sphere(model)
    inputs = TASK.inputs("train")
    with torch.no_grad():
        states = model.model(
            input_ids=inputs.input_ids_PT, attention_mask=inputs.mask_11TT, position_ids=inputs.position_ids_PT
        ).last_hidden_state
        logits = model.lm_head(states).double()
    u = (states / model.model.norm.weight.detach()).double()
    assert u.norm(dim=-1).numpy() == pytest.approx(radius, rel=1e-3)  # the norm's epsilon
    assert (u @ A_VD.T - logits).abs().max() < 1e-5


@pytest.mark.parametrize("radius", [0.5, 1.5, 4.0])
def test_the_ceiling_is_what_all_states_can_reach_together(radius):
    """Second implementation: one optimization over the states of every prefix at once, from four starts, without recursion."""
    A_VD = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 6)))
    tree, beta, scores_PR = TASK.tree, TASK.beta, TASK.rewards_PRM("train") @ [0.8, 0.2]
    logp_PR = torch.from_numpy(TASK.reference_logp_PR("train"))

    def lost(flat, prompt):
        raw = torch.tensor(flat.reshape(tree.internal, 6), requires_grad=True)
        u = raw * (radius / raw.norm(dim=1, keepdim=True)).clamp(max=1)
        logp_R = tree.response_logp((u @ A_VD.T).log_softmax(-1)[None])[0]
        value = (logp_R.exp() * (torch.from_numpy(scores_PR[prompt]) - beta * (logp_R - logp_PR[prompt]))).sum()
        (-value).backward()
        return -value.item(), raw.grad.numpy().ravel()

    found = representable_value_P(tree, logp_PR.numpy(), scores_PR, beta, A_VD, radius)
    for prompt in range(2):
        starts = np.random.default_rng(1).normal(size=(4, tree.internal * 6))
        best = max(-minimize(lost, start, args=(prompt,), jac=True, method="L-BFGS-B", options={"maxiter": 3000}).fun for start in starts)
        assert found[prompt] == pytest.approx(best, abs=2e-5)


def test_a_long_radius_represents_the_optimum_and_radius_zero_the_uniform_policy():
    A_VD, _ = sphere(reference(TASK)[0])
    logp_PR, scores_PR = TASK.reference_logp_PR("train"), TASK.rewards_PRM("train") @ [0.3, 0.7]
    best = (TASK.J_M(TASK.optimum_logp_PR(np.array([0.3, 0.7]), "train"), "train") * [0.3, 0.7]).sum()
    values = [representable_value_P(TASK.tree, logp_PR, scores_PR, TASK.beta, A_VD, r).mean() for r in (1e-9, 1.0, 3.0, 10.0, 1e6)]
    assert values[-1] == pytest.approx(best, abs=1e-9)
    assert (np.diff(values) > -1e-9).all()
    assert values[0] < best - 0.01

    even = TASK.tree.response_logp(torch.full((2, TASK.tree.internal, 5), -np.log(5.0), dtype=torch.float64)).numpy()
    assert values[0] == pytest.approx((TASK.J_M(even, "train") * [0.3, 0.7]).sum(), abs=1e-6)


def test_in_attainment_it_is_at_most_one_and_the_second_task_has_all_of_it():
    first_W = TASK.ceiling_W(TASK.judged(), "train")
    assert first_W.max() <= 1 + 1e-9
    assert first_W.min() < 0.97
    second = RepresentableTask(**WIDE, test_count=3)
    for split in ("train", "test"):
        assert second.ceiling_W(second.judged(), split).min() >= 0.998
    assert [len(second.prompts(split)) for split in ("train", "test")] == [2, 3]


def test_the_second_task_refuses_dials_under_which_its_optimum_cannot_be_represented():
    weak = RepresentableTask(**TINY, head=1.0, test_count=2)
    with pytest.raises(TaskError, match=r"(?s)0\.998 of the possible gain.*larger head"):
        weak.rewards_PRM("train")
    with pytest.raises(TaskError):  # again, too
        weak.rewards_PRM("train")
    with pytest.raises(TaskError):  # and for a learner, which only scores
        weak.score(weak.prompts("train"), ["", "a"])
    assert dataclasses.replace(weak, ceiling=0.0).rewards_PRM("train").shape == (2, 21, 2)
    with pytest.raises(TaskError, match="head lies between"):
        RepresentableTask(head=0.0)


def test_a_larger_head_learns_the_language_as_well():
    """The loss of pre-training is the same, with the same language; so is everything else that does not come from the reference."""
    first, second = ExactTask(**{**WIDE, "prompt_count": 4}), RepresentableTask(**{**WIDE, "prompt_count": 4, "test_count": 4}, memory=0)
    assert [p.text for p in first.prompts("train")]
    assert {p.text for p in first.prompts("train")} | {p.text for p in first.prompts("test")} == {
        p.text for p in second.prompts("train")
    } | {p.text for p in second.prompts("test")}
    gap = np.abs(np.exp(first._reference_all_PR) - np.exp(second._reference_all_PR)).sum(1).mean()
    assert gap < 0.1  # total variation of both fits to one language, twice


def test_the_second_task_is_pinned():
    """Prompts to the letter, features and language as numbers, what a model was trained for as closely as processors agree."""
    task = RepresentableTask(**WIDE, test_count=2)
    assert [task._text(row) for row in task._prompts_PT] == ["aba", "caa", "dcb", "dda"]
    assert task._features_PF[0] == pytest.approx([2.29754767, -0.26867669, 1.25228292, 1.35469925], abs=1e-7)
    after_prompt_V = next_logits(task._reference, task._prompts_PT[:1])[0, -1]
    assert after_prompt_V == pytest.approx([-0.74743866, 1.4016022, -2.5543917, -0.69029132, -2.01937656], abs=1e-7)
    assert task._rewards_all_PRM[0, 0] == pytest.approx([0.27486, 0.15482], abs=2e-3)
    assert task._reference_all_PR[0, :3] == pytest.approx([-3.0797, -5.1207, -4.1798], abs=0.02)


def test_language_and_rewards_of_the_second_task_read_the_whole_prompt_through_the_same_features():
    """Of two prompts that differ in the first symbol only, the first task's language knows no difference, the second's does."""
    prompts_NT = np.array([[0, 1, 2], [3, 1, 2]])
    for task, differ in ((TASK, False), (RepresentableTask(**TINY), True)):
        logits_NTV = next_logits(task._reference, prompts_NT)
        assert (np.abs(logits_NTV[0, -1] - logits_NTV[1, -1]).max() > 1e-3) == differ

    features_PF = np.random.default_rng(0).normal(size=(2, 3))
    raw_PRM = fields(TASK.tree, prompts_NT, 2, 1.0, 0, features_PF)  # the last symbol is the same: the difference is linear in the features
    farther_PF = np.stack([features_PF[0], 2 * features_PF[1] - features_PF[0]])
    farther_PRM = fields(TASK.tree, prompts_NT, 2, 1.0, 0, farther_PF)
    assert farther_PRM[1] - farther_PRM[0] == pytest.approx(2 * (raw_PRM[1] - raw_PRM[0]))
