"""Advantages against closed forms, against TRL's trainers run for one step, and with scores that are missing."""

import numpy as np
import pytest

from paretune.errors import ConfigError
from paretune.objectives.utilities import check_scalarizer, linear, log_product, scalarize
from paretune.seeds import generator
from paretune.tasks.exact.task import ExactTask
from paretune.training.advantages import advantages, group_mean, leave_one_out, spread

NAN = np.nan
SCORES = {
    "full": np.array([[0.1, 1.0], [0.9, 3.0], [0.3, 2.0], [0.4, 0.5], [0.5, 5.0], [0.2, 4.0], [0.8, 7.0], [0.7, 1.0]]),
    "one missing": np.array([[0.1, 1.0], [0.9, 3.0], [0.3, 2.0], [0.4, NAN], [NAN, 5.0], [0.2, 4.0], [0.8, 7.0], [0.7, 1.0]]),
    "rows missing": np.array([[0.1, 1.0], [NAN, NAN], [0.3, 2.0], [0.4, 0.5], [0.5, 5.0], [0.2, 4.0], [NAN, NAN], [0.7, 1.0]]),
}
W_M = np.array([0.3, 0.7])
GROUP = 4


def ours(scores, **settings):
    return advantages(scores, np.tile(W_M, (len(scores), 1)), group=GROUP, **settings)


def test_leave_one_out_is_the_mean_of_the_others():
    values = generator(0, "advantage").normal(size=(3, 5, 2))
    got = leave_one_out(values)
    for p, g, m in np.ndindex(*values.shape):
        others = np.delete(values[p, :, m], g)
        assert got[p, g, m] == pytest.approx(values[p, g, m] - others.mean())
    np.testing.assert_allclose(got, group_mean(values) * 5 / 4)


def test_missing_scores_leave_the_baseline_of_their_own_objective_only():
    scores = SCORES["one missing"]
    got = ours(scores)
    # Row 3 has no second score: what is left is the first objective against the other three rows.
    assert got[3] == pytest.approx(0.3 * (0.4 - (0.1 + 0.9 + 0.3) / 3))
    # Row 0: all four first scores are known, but only rows 1 and 2 stand beside it for the second.
    assert got[0] == pytest.approx(0.3 * (0.1 - (0.9 + 0.3 + 0.4) / 3) + 0.7 * (1.0 - (3.0 + 2.0) / 2))


def test_nothing_known_is_no_advantage_and_no_error():
    assert (ours(np.full((8, 2), NAN)) == 0).all()
    assert (ours(np.full((8, 2), NAN), normalize="group", at="advantage") == 0).all()
    alone = np.full((8, 2), NAN)
    alone[2] = 1.0
    assert (ours(alone) == 0).all(), "a single scored response has nothing to be compared with"
    for normalize in ("none", "group", "batch"):
        assert (ours(np.ones((8, 2)), normalize=normalize) == 0).all(), "equal responses"


def test_the_spread_of_returns_has_that_of_prompts_in_it():
    scores = SCORES["one missing"]
    known = np.where(np.isnan(scores), [[0.0, 0.0]] * 3 + [[0.0, 2.0]] + [[1.7 / 3, 0.0]] + [[0.0, 0.0]] * 3, scores)  # at the group's mean
    wide = np.std(known @ W_M, ddof=1)
    np.testing.assert_allclose(ours(scores, normalize="batch_returns"), ours(scores) / (wide + 1e-4))
    each = ours(scores, normalize="batch_returns", at="advantage")
    unit_M = np.array([spread(scores[:, k], 0).item() for k in (0, 1)]) + 1e-4
    summed = ours(scores / unit_M)
    np.testing.assert_allclose(each, (summed - summed.mean()) / (np.std(summed, ddof=1) + 1e-4))


def test_spread_is_the_sample_deviation_of_what_is_scored():
    values = np.array([[1.0, NAN, 4.0, 2.0], [NAN, 7.0, NAN, NAN]])
    got = spread(values, 1)
    assert got[0, 0] == pytest.approx(np.std([1, 4, 2], ddof=1))
    assert got[1, 0] == 0


def test_both_levels_agree_without_normalization_and_objectives_may_be_permuted():
    scores = SCORES["full"]
    np.testing.assert_allclose(ours(scores, at="reward"), ours(scores, at="advantage"))
    for settings in ({}, {"normalize": "group", "at": "advantage"}, {"normalize": "batch", "at": "advantage"}):
        flipped = advantages(scores[:, ::-1], np.tile(W_M[::-1], (8, 1)), group=GROUP, **settings)
        np.testing.assert_allclose(flipped, ours(scores, **settings))


def test_scaling_by_the_batch_is_one_positive_number_but_by_the_group_is_not():
    plain = ours(SCORES["full"])
    ratio = ours(SCORES["full"], normalize="batch") / plain
    assert ratio.min() > 0
    assert np.ptp(ratio) < 1e-12
    assert np.ptp(ours(SCORES["full"], normalize="group") / plain) > 0.1


@pytest.fixture(scope="module")
def trl_advantages(tmp_path_factory):
    """What TRL's own trainers made of the same scores: `advantages(trainer, scores, **config)`, one step of each."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    task = ExactTask(alphabet=3, length=2, prompt_count=2, width=16, layers=1)
    out = str(tmp_path_factory.mktemp("trl"))

    def run(kind, scores, **settings):
        model, tokenizer = task.load()
        columns = [[None if np.isnan(x) else float(x) for x in column] for column in scores.T]

        def objective(k):
            return lambda completions, **_: columns[k]

        config = getattr(trl, f"{kind}Config")(
            output_dir=out,
            per_device_train_batch_size=len(scores),
            num_generations=GROUP,
            max_completion_length=2,
            max_steps=1,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            beta=0.0,
            reward_weights=W_M.tolist(),
            disable_tqdm=True,
            **settings,
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            processing_class=tokenizer,
            reward_funcs=[objective(0), objective(1)],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [p.text for p in task.prompts("train")]}),
        )
        trainer.train()
        return np.array(list(trainer._logs["advantages"])[-len(scores) :])

    return run


@pytest.mark.parametrize(
    ("kind", "theirs", "settings", "scores"),
    [
        ("RLOO", {}, {}, "full"),
        ("RLOO", {}, {}, "rows missing"),
        ("RLOO", {"normalize_advantages": True}, {"normalize": "batch"}, "full"),
        ("GRPO", {"multi_objective_aggregation": "sum_then_normalize"}, {"baseline": "group_mean", "normalize": "group"}, "full"),
        ("GRPO", {"scale_rewards": "none"}, {"baseline": "group_mean"}, "rows missing"),
        ("GRPO", {"scale_rewards": "batch"}, {"baseline": "group_mean", "normalize": "batch_returns"}, "full"),
        ("GRPO", {"scale_rewards": "batch"}, {"baseline": "group_mean", "normalize": "batch_returns"}, "rows missing"),
        (
            "GRPO",
            {"multi_objective_aggregation": "normalize_then_sum"},
            {"baseline": "group_mean", "normalize": "group", "at": "advantage"},
            "full",
        ),
        (
            "GRPO",
            {"multi_objective_aggregation": "normalize_then_sum"},
            {"baseline": "group_mean", "normalize": "group", "at": "advantage"},
            "one missing",
        ),
    ],
)
def test_trl_computes_the_same(trl_advantages, kind, theirs, settings, scores):
    np.testing.assert_allclose(ours(SCORES[scores], **settings), trl_advantages(kind, SCORES[scores], **theirs), rtol=2e-4, atol=2e-5)


def test_scalarizers():
    rewards, w = np.array([[0.5, 0.25], [0.0, 1.0], [NAN, 0.5]]), np.tile([0.5, 0.5], (3, 1))
    np.testing.assert_allclose(linear(rewards, w), [0.375, 0.5, NAN])
    assert linear(rewards[2:], np.array([[0.0, 1.0]]))[0] == 0.5, "an objective without weight need not be known"
    got = log_product(rewards, w, low_M=np.zeros(2), high_M=np.ones(2))
    np.testing.assert_allclose(got, [0.5 * np.log(0.125), 0.5 * np.log(1e-4 * 0.9999), NAN])
    wide = scalarize(2 * rewards - 1, w, {"name": "log_product"}, low_M=-np.ones(2), high_M=np.ones(2))
    np.testing.assert_allclose(wide, got)


@pytest.mark.parametrize(
    ("given", "found"),
    [({"name": "liner"}, "liner"), ({"name": "linear", "floor": 0.1}, "floor"), ({"name": "log_product", "floor": -1.0}, "floor=-1")],
)
def test_a_scalarizer_that_cannot_be_is_refused(given, found):
    with pytest.raises(ConfigError) as error:
        check_scalarizer(given)
    assert found in error.value.found
