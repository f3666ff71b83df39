"""Lines known from the training prompts: closed forms at both ends, a second implementation, and that nothing but them is used."""

import dataclasses

import numpy as np
import pytest
from scipy.special import expit, logit

from paretune.errors import TaskError
from paretune.tasks.exact.rewards import design, fields
from paretune.tasks.exact.task import ExactTask, RepresentableTask

TINY = {"alphabet": 4, "length": 2, "width": 16, "layers": 1, "rho": -0.5, "seed": 1}
FIRST = ExactTask(**TINY, prompt_count=3)
SECOND = RepresentableTask(**TINY, prompt_count=6, test_count=3, shared=2, ceiling=0.0)


@pytest.mark.parametrize("task", [FIRST, SECOND], ids=lambda task: task.registered_name)
def test_raw_scores_are_linear_in_unit_normal_weights_by_the_design(task):
    """Over many seeds, the covariance of the raw scores of `fields` is the design's Gram matrix."""
    prompts_PT, features_PF = task._prompts_PT[:2], None if task._features_PF is None else task._features_PF[:2]
    design_ND = np.concatenate([
        design(task.tree, row_T, 0.7, None if features_PF is None else features_PF[p]) for p, row_T in enumerate(prompts_PT)
    ])  # fmt: skip
    drawn_KN = np.concatenate([fields(task.tree, prompts_PT, 40, 0.7, seed, features_PF).reshape(-1, 40).T for seed in range(60)])
    gram_NN = design_ND @ design_ND.T
    assert np.abs(drawn_KN.T @ drawn_KN / len(drawn_KN) - gram_NN).max() < 0.15 * gram_NN.max()  # 2400 draws: five standard errors
    assert design_ND @ np.linalg.lstsq(design_ND, drawn_KN.T, rcond=None)[0] == pytest.approx(drawn_KN.T)


def test_on_training_prompts_the_posterior_mean_is_the_reward():
    for task in (FIRST, SECOND, dataclasses.replace(FIRST, scale=3.0)):
        assert task.posterior_PRM("train") == pytest.approx(task.rewards_PRM("train"), abs=1e-6)
        assert task.known_W(task.judged(), "train")["posterior"] == pytest.approx(1.0, abs=1e-6)


def test_where_training_prompts_tell_all_the_posterior_mean_is_the_reward_of_test_prompts():
    """Two features and six prompts leave no weight unknown but those of letters that no training prompt ends with."""
    ends = {prompt.text[-1] for prompt in SECOND.prompts("train")}
    told = [p for p, prompt in enumerate(SECOND.prompts("test")) if prompt.text[-1] in ends]
    assert told
    assert SECOND.posterior_PRM("test")[told] == pytest.approx(SECOND.rewards_PRM("test")[told], abs=1e-5)


def test_the_posterior_mean_of_what_is_not_told_is_that_of_a_normal_given_others():
    """Second implementation: kriging of the responses' scores with the covariance of the prior, and a mean over draws of what is left."""
    train_ND, test_ND = (np.concatenate(FIRST.designs(split)) for split in ("train", "test"))
    seen_NM = logit(FIRST.rewards_PRM("train")).reshape(-1, 2)
    gain_NN = test_ND @ train_ND.T @ np.linalg.pinv(train_ND @ train_ND.T, rcond=1e-9)
    mean_NM = gain_NN @ seen_NM
    left_N = np.maximum((test_ND @ test_ND.T - gain_NN @ train_ND @ test_ND.T).diagonal(), 0)
    assert left_N.max() > 0.1
    noise_K = np.random.default_rng(0).normal(size=40_000)
    noise_K = np.concatenate([noise_K, -noise_K])
    expected_NM = expit(mean_NM[..., None] + np.sqrt(left_N)[:, None, None] * FIRST.deviation_M[:, None] * noise_K).mean(-1)
    assert FIRST.posterior_PRM("test").reshape(-1, 2) == pytest.approx(expected_NM, abs=3e-3)
    assert np.abs(expected_NM - expit(mean_NM)).max() > 0.01  # the mean of the squashed is not the squashed mean


def test_the_posterior_mean_reads_no_test_reward():
    task = ExactTask(**TINY, prompt_count=3)
    before = task.posterior_PRM("test").copy()
    for name in ("_rewards_all_PRM", "_dense_all_PRM"):
        changed = getattr(task, name).copy()
        changed[task._rows["test"]] = 0.5 + 0.1 * (changed[task._rows["test"]] - 0.5)
        task.__dict__[name] = changed
    assert task.rewards_PRM("test").std() < 0.05
    del task.__dict__["deviation_M"]
    assert task.posterior_PRM("test") == pytest.approx(before)


def test_blind_is_the_optimum_under_the_mean_reward_and_one_prompt_alone_is_no_blindness():
    mean_RM, w_M = FIRST.rewards_PRM("train").mean(0), np.array([0.3, 0.7])
    assert (FIRST.blind_PRM("test") == mean_RM).all()
    p_PR = np.exp(FIRST.reference_logp_PR("test")) * np.exp(mean_RM @ w_M / FIRST.beta)
    logp_PR = np.log(p_PR / p_PR.sum(1, keepdims=True))
    start, found, best = (
        w_M @ FIRST.J_M(x, "test") for x in (FIRST.reference_logp_PR("test"), logp_PR, FIRST.optimum_logp_PR(w_M, "test"))
    )
    assert FIRST.known_W(w_M[None], "test")["blind"] == pytest.approx([(found - start) / (best - start)])
    assert ExactTask(**TINY, prompt_count=1).known_W(w_M[None], "train")["blind"] == pytest.approx([1.0])


def test_sparse_and_contextual_rewards_have_no_posterior_line():
    for dials in ({"sparse": 0.05}, {"context": 0.2, "prompt_count": 4}):
        task = ExactTask(**{**TINY, "prompt_count": 3, "length": 3, "rho": 0.0, **dials})
        with pytest.raises(TaskError, match="one map"):
            task.posterior_PRM("test")
        assert set(task.known_W(task.judged()[:1], "train")) == {"representable", "blind"}
