"""Looks at validation prompts: the best policy is what they say it is, a training ends when none is better, and a kill changes nothing."""

import json
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from learner_cases import SMALL, TASK, killed, log_of, spec_of, weights
from paretune.errors import RewardError
from paretune.tasks.exact.task import ExactTask
from paretune.training import batch
from paretune.training.cost import read_cost
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.loop.watch import KL_ROSE, guard_slack, guarded, named_means, warnings_of
from paretune.training.spec import Artifact
from paretune.types import Objectives

LOOKED = {**SMALL, "samples": 160, "validate_every": 2, "look_samples": 64, "schedule": "constant", "log_every": 1}
WILD = {**LOOKED, "lr": 0.1, "step_kl": None}


@dataclass(frozen=True)
class Watched(ExactTask):
    """The small task; trainings are watched on its test prompts, and a guard counts what the first objective gives."""

    guards = Objectives(("first",), (0.0,), (1.0,))

    def validation(self):
        return self.prompts("test")

    def score_guards(self, prompts, completions):
        return self.score(prompts, completions)[:, :1]


WATCHED = Watched(**{field.name: getattr(TASK, field.name) for field in fields(TASK)})


def looks_of(folder):
    return [look for record in log_of(folder) for look in record.get("looks", ())]


@pytest.mark.usefixtures("one_thread")
def test_the_result_is_the_policy_of_the_best_look(tmp_path):
    """Updates that are far too long: the first ones help, later ones ruin. A second training that ends at the best look says the same."""
    learner = PolicyGradient(**WILD, patience=None)
    spec = spec_of(learner)
    cost = learner.train(spec, WATCHED, tmp_path / "best")
    looks = looks_of(tmp_path / "best")
    assert [look["step"] for look in looks] == [0, 2, 4, 6, 8, 10], "before the first step, every second, and at the end"
    assert cost.validation_samples == 64 * 6
    best = max(looks, key=lambda look: (look["utility"], look["step"]))
    assert 0 < best["step"] < 10
    assert log_of(tmp_path / "best")[-1]["kept"] == {
        "step": best["step"],
        "utility": best["utility"],
        "utility_at_the_end": looks[-1]["utility"],
    }
    short = replace(learner, samples=16 * best["step"], keep="last")
    short.train(spec_of(short), WATCHED, tmp_path / "short")
    assert weights(tmp_path / "best") == weights(tmp_path / "short")
    last = replace(learner, keep="last")
    last.train(spec_of(last), WATCHED, tmp_path / "last")
    assert weights(tmp_path / "best") != weights(tmp_path / "last")
    assert "kept" not in log_of(tmp_path / "last")[-1]


@pytest.mark.usefixtures("one_thread")
def test_a_look_needs_no_more_rows_than_a_batch(tmp_path, monkeypatch):
    """In pieces of whole groups; the same prompts in the same order as in one piece, each with preferences and numbers of its own."""
    sizes, generate = [], batch.generate
    monkeypatch.setattr(batch, "generate", lambda *a, **k: sizes.append(len(a[1]) * k["group"]) or generate(*a, **k))
    learner = PolicyGradient(**{**LOOKED, "samples": 16, "look_samples": 40})
    spec = spec_of(learner, None)
    cost = learner.train(spec, WATCHED, tmp_path)
    assert max(sizes) <= 16
    assert len(WATCHED.validation()) == 2, "two prompts, 16 responses at once: 32"
    assert sum(sizes) == 16 + 2 * 32, "a batch, and a look before and after it"
    assert (cost.validation_samples, cost.evaluations) == (2 * 32, 2)


def test_a_training_ends_when_no_look_was_better_for_a_while(tmp_path):
    learner = PolicyGradient(**{**WILD, "samples": 16 * 40}, patience=3)
    cost = learner.train(spec_of(learner), WATCHED, tmp_path)
    looks = looks_of(tmp_path)
    best = int(np.argmax([look["utility"] for look in looks]))
    assert len(looks) - 1 - best == 3
    assert cost.samples == 16 * looks[-1]["step"] < 16 * 40
    assert log_of(tmp_path)[-1]["kept"]["step"] == looks[best]["step"]


@dataclass(frozen=True)
class Falling(Watched):
    """The guard is what the first objective does not give: it must fall where that rises."""

    def score_guards(self, prompts, completions):
        return 1 - super().score_guards(prompts, completions)


@pytest.mark.usefixtures("one_thread")
def test_a_policy_that_lost_a_guard_is_not_the_best_one(tmp_path):
    falling = Falling(**{field.name: getattr(TASK, field.name) for field in fields(TASK)})
    found, gentle = {}, {**LOOKED, "samples": 320, "lr": 4e-3, "look_samples": 256, "patience": None}
    for drop in (None, 0.02, 1e-9):
        learner = PolicyGradient(**gentle, guard_drop=drop)
        learner.train(spec_of(learner, (1.0, 0.0)), falling, tmp_path / str(drop))
        found[drop] = log_of(tmp_path / str(drop))[-1]["kept"]["step"]
    looks = {drop: looks_of(tmp_path / str(drop)) for drop in found}
    holding = [look for look in looks[0.02] if look["change"]["first"][0] - 1.645 * look["change"]["first"][1] >= -0.02]
    assert found[None] == max(looks[None], key=lambda look: look["utility"])["step"]
    assert found[0.02] == max(holding, key=lambda look: look["utility"])["step"]
    assert found[1e-9] < found[0.02] < found[None]


def test_a_look_measures_the_utility_that_the_training_climbs(tmp_path):
    """Not w . J, also where the method and not the task's terms asked for it: of two policies the one that keeps a constraint is kept."""
    kept = {"name": "multipliers", "utility": {"name": "constrained", "thresholds": [0.6, None]}}
    worst = {"name": "multipliers", "utility": {"name": "max-min", "base": [0.1, 0.2]}}
    learner = PolicyGradient(**{**WILD, "samples": 96}, patience=None)
    for name, weighting in (
        ("kept", kept),
        ("worst", worst),
        ("moved", {"name": "schedule", "course": {"start": [1, 0]}, "weighting": kept}),
    ):
        learner.train(spec_of(learner, weighting=weighting), WATCHED, tmp_path / name)
        for look in looks_of(tmp_path / name):
            gains = [look["rewards"][f"objective_{k}"] - TASK.beta * look["kl"] for k in (1, 2)]
            if name == "worst":
                assert look["utility"] == pytest.approx(min((gains[0] - 0.1) / 0.6, (gains[1] - 0.2) / 1.4))
            else:
                assert look["violation"] == pytest.approx(max(0.6 - gains[0], 0.0))
    looks, best = looks_of(tmp_path / "kept"), log_of(tmp_path / "kept")[-1]["kept"]["step"]
    assert next(look for look in looks if look["step"] == best)["violation"] == min(look["violation"] for look in looks)


@dataclass(frozen=True)
class ByTurns(Watched):
    """Each objective scores every second response, as where prompts of two kinds have rewards of their own: none has both."""

    def observe(self, prompts, completions, *, streams):
        rewards_NM = super().observe(prompts, completions, streams=streams)
        return np.where((np.arange(len(rewards_NM))[:, None] + np.arange(2)) % 2 == 0, rewards_NM, np.nan)


def test_where_no_response_has_all_scores_a_look_is_worth_w_times_their_means(tmp_path):
    """It was worth NaN: the first policy stayed the best one, and the next checkpoint could not be written."""
    task = ByTurns(**{field.name: getattr(TASK, field.name) for field in fields(TASK)})
    learner = PolicyGradient(**LOOKED, max_unscored=0.5, stop_cv=1e-6, guard_drop=None)
    learner.train(spec_of(learner), task, tmp_path / "linear")
    for look in looks_of(tmp_path / "linear"):
        worth = 0.3 * look["rewards"]["objective_1"] + 0.7 * look["rewards"]["objective_2"] - TASK.beta * look["kl"]
        assert look["utility"] == pytest.approx(worth)
    assert np.isfinite([record["validation"] for record in log_of(tmp_path / "linear")[1:]]).all()
    with pytest.raises(RewardError, match="none of 64 by all of them at once"):
        learner.train(spec_of(learner, scalarizer={"name": "log_product"}), task, tmp_path / "product")
    with pytest.raises(RewardError, match="none of 3 by one of them"):
        learner.combine(spec_of(learner)).mean_score(np.array([[0.1, np.nan]] * 3), np.full((3, 2), 0.5), task.objectives)


@dataclass(frozen=True)
class Silent(Watched):
    """The guard can score nothing."""

    def score_guards(self, prompts, completions):
        return np.full((len(completions), 1), np.nan)


def test_a_guard_that_cannot_score_stops_a_training_before_its_first_step(tmp_path):
    """Whether such a policy lost the guard is unknown; it was kept as one that had lost nothing."""
    learner, task = PolicyGradient(**LOOKED), Silent(**{field.name: getattr(TASK, field.name) for field in fields(TASK)})
    with pytest.raises(RewardError, match="'first' scores at least 90%"):
        learner.train(spec_of(learner), task, tmp_path / "made")
    PolicyGradient(**LOOKED, max_unscored=1.0).train(spec_of(learner), task, tmp_path / "more")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kill", [False, True])
def test_a_training_that_loses_a_guard_turns_back_with_shorter_steps(tmp_path, kill):
    """The weights, the schedule and the words are those of the kept policy; a kill between two looks changes nothing."""
    falling = Falling(**{field.name: getattr(TASK, field.name) for field in fields(TASK)})
    gentle = {**LOOKED, "samples": 320, "lr": 8e-3, "look_samples": 256, "patience": None, "step_kl": None}
    learner = PolicyGradient(**gentle, guard_drop=0.03)
    spec = spec_of(learner, (1.0, 0.0))
    learner.train(spec, falling, tmp_path / "whole")
    looks, log = looks_of(tmp_path / "whole"), log_of(tmp_path / "whole")
    back = [look for look in looks if "back_to" in look]
    assert back, "or this shows nothing"
    for look in back:
        (mean, _), before = look["change"]["first"], [seen for seen in looks if seen["step"] < look["step"]]
        assert mean < -0.03
        assert look["back_to"] in {seen["step"] for seen in before}
    assert all(look["change"]["first"][0] >= -0.03 or "back_to" in look for look in looks)
    rates = {record["step"]: record["lr"] for record in log}
    first = back[0]["step"]
    assert rates[first] == learner.lr
    assert rates[first + 1] == learner.lr / 2
    assert rates[learner.steps] == pytest.approx(learner.lr / 2 ** len([look for look in back if look["step"] < learner.steps]))
    said = [record["warnings"]["turned back"] for record in log if "turned back" in record.get("warnings", {})]
    assert len(said) == 1, "once"
    assert f"went back to the policy of step {back[0]['back_to']}" in said[0]
    if kill:
        killed(learner, spec, falling, tmp_path / "killed", first + 1)
        learner.train(spec, falling, tmp_path / "killed")
        assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
        assert looks_of(tmp_path / "killed") == looks


@pytest.mark.usefixtures("one_thread")
def test_guards_of_a_training_on_another_policy_are_measured_from_the_untrained_model(tmp_path):
    """An expert lost the guard; what is trained on it begins with that loss, and turns back to nothing: its own start is beyond."""
    falling = Falling(**{field.name: getattr(TASK, field.name) for field in fields(TASK)})
    learner = PolicyGradient(**{**LOOKED, "look_samples": 256, "patience": None}, guard_drop=None)
    spec = spec_of(learner, (1.0, 0.0))
    learner.train(spec, falling, tmp_path / "expert")
    lost = looks_of(tmp_path / "expert")[-1]["change"]["first"]
    assert lost[0] + 2 * lost[1] < 0, "or this shows nothing"
    expert = Artifact(spec.key, tmp_path / "expert", spec)
    after = PolicyGradient(**{**LOOKED, "samples": 64, "lr": 1e-12, "look_samples": 256, "patience": None}, guard_drop=1e-3)
    on = spec_of(after, (1.0, 0.0), init_from=(spec.key,))
    cost = after.train(on, falling, tmp_path / "after", parents={spec.key: expert})
    looks = looks_of(tmp_path / "after")
    assert looks[0]["change"]["first"] == pytest.approx(lost, abs=0.03), "the seeds differ, the loss does not"
    assert looks[0]["change"]["first"] == looks[-1]["change"]["first"]
    assert not any("back_to" in look for look in looks)
    assert cost.validation_samples == (len(looks) + 1) * 256, "the untrained model's answers are charged, too"


def test_responses_to_one_prompt_count_as_one():
    """The error of a change is that of the means of prompts: a second copy of every response makes nobody surer."""
    change_P = np.array([0.1, -0.2, 0.05, -0.1])
    once = guarded(Said.guards, 0.5 + change_P[:, None], [[0.5]] * 4, ["a", "b", "c", "d"])["change"]["sense"]
    twice = guarded(Said.guards, 0.5 + change_P.repeat(2)[:, None], [[0.5]] * 8, list("aabbccdd"))["change"]["sense"]
    assert once == pytest.approx([change_P.mean(), change_P.std(ddof=1) / 2])
    assert twice == pytest.approx(once)
    missing = guarded(Said.guards, np.array([[0.6], [np.nan], [0.3], [np.nan]]), [[0.5]] * 4, list("aabb"))["change"]["sense"]
    assert missing == pytest.approx([-0.05, 0.15]), "what was not scored is left out of its prompt"


@pytest.mark.parametrize(("mean", "error", "drop", "sure", "slack"), [
    (-0.02, 0.01, 0.05, True, 0.05 - 0.02 - 0.01645),
    (-0.02, 0.03, 0.05, True, 0.05 - 0.02 - 0.04935),
    (-0.02, 0.03, 0.05, False, 0.03),
    (0.1, 0.0, 0.05, True, 0.15),
])  # fmt: skip
def test_what_a_guard_may_yet_lose(mean, error, drop, sure, slack):
    look = {"change": {"sense": [mean, error]}}
    assert guard_slack(look, Said.guards, drop, sure=sure) == pytest.approx(slack)
    wide = Objectives(("sense",), (0.0,), (10.0,))
    assert guard_slack({"change": {"sense": [10 * mean, 10 * error]}}, wide, drop, sure=sure) == pytest.approx(slack), "of its range"
    assert guard_slack(look, Said.guards, None) == guard_slack(look, None, drop) == guard_slack({"change": {}}, Said.guards, drop) == np.inf


@pytest.mark.usefixtures("one_thread")
def test_looks_survive_a_kill(tmp_path):
    learner = PolicyGradient(**WILD, patience=None)
    spec = spec_of(learner)
    learner.train(spec, WATCHED, tmp_path / "whole")

    killed(learner, spec, WATCHED, tmp_path / "killed", 9)
    state = json.loads((tmp_path / "killed" / "checkpoint" / "00000008" / "state.json").read_text())
    assert state["looks"][state["best"]]["step"] < 8, "the best is kept from before the checkpoint, or this shows nothing"
    learner.train(spec, WATCHED, tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert looks_of(tmp_path / "killed") == looks_of(tmp_path / "whole")
    assert read_cost(tmp_path / "killed").validation_samples == read_cost(tmp_path / "whole").validation_samples


def test_a_look_is_utility_on_validation_prompts_and_the_same_draw_every_time(tmp_path):
    """Against enumeration; and an update of nothing changes no number."""
    learner = PolicyGradient(**{**LOOKED, "samples": 64, "lr": 1e-12, "look_samples": 4096}, patience=None)
    spec = spec_of(learner)
    learner.train(spec, WATCHED, tmp_path)
    first, *others = looks_of(tmp_path)
    exact_M = WATCHED.J_M(WATCHED.reference_logp_PR("test"), "test")
    assert abs(first["utility"] - exact_M @ np.array(spec.preference)) < 0.03
    assert abs(first["kl"]) < 1e-6
    assert first["guards"]["first"] == pytest.approx(first["rewards"][WATCHED.objectives.names[0]])
    for look in others:
        assert look["utility"] == pytest.approx(first["utility"], abs=1e-6)
        assert look["change"]["first"] == [0.0, 0.0]


# What is said of them


class Said:
    objectives = Objectives(("kind", "brief"), (0.0, 0.0), (1.0, 1.0))
    guards = Objectives(("sense",), (0.0,), (1.0,))
    is_exact, max_new_tokens, beta = False, 32, 0.1


def records(count, **changes):
    """Records of 64 responses in groups of 8, ten steps each; a change is a number, or one per record."""
    given = {"kl": 1.0, "cut": 0.0, "kind": 0.5, "brief": 0.5, "spread": 0.2, "equal": 0.0} | changes
    columns = {name: np.broadcast_to(np.asarray(value, dtype=float), count) for name, value in given.items()}
    made = []
    for i in range(count):
        row = {name: float(column[i]) for name, column in columns.items()}
        both = ("kind", "brief")
        made.append(
            {
                "step": 10 * (i + 1),
                "samples": 640 * (i + 1),
                "kl": row["kl"],
                "cut": row["cut"],
                "rewards": {name: row[name] for name in both},
                "spread": dict.fromkeys(both, row["spread"]),
                "equal": {"kind": row["equal"], "brief": 0.0},
            }
        )
    return made


def said(found, looks=(), preference=(0.5, 0.5)):
    return warnings_of(found, looks, Said, preference, group=8)


def test_nothing_is_said_of_a_training_that_learns():
    learns = records(8, kl=np.linspace(0, 3, 8), kind=np.linspace(0.3, 0.9, 8), cut=0.4, equal=0.8)
    assert said(learns) == {}


def test_answers_that_are_cut_and_scores_that_are_equal():
    assert list(said(records(1, cut=0.6))) == ["cut"]
    assert "60% of the answers were cut off at max_new_tokens = 32" in said(records(1, cut=0.6))["cut"]
    found = said(records(1, equal=0.94))
    assert list(found) == ["equal kind"]
    assert "`kind` was equal in 94% of the groups" in found["equal kind"]
    assert said(records(1, equal=0.94), preference=(0.0, 1.0)) == {}, "an objective that is not asked for here"
    few = records(1, cut=0.9, equal=1.0)
    few[0]["samples"] = 32
    assert said(few) == {}, "too few to say"


@pytest.mark.parametrize(
    ("changes", "rose"),
    [
        ({"kl": [1, 1, 1, 3, 3, 3]}, True),
        ({"kl": [1, 1, 1, 1.2, 1.2, 1.2]}, False),
        ({"kl": [3, 3, 3, 1, 1, 1]}, False),
        ({"kl": [1, 1, 1, 3, 3, 3], "kind": [0.2, 0.2, 0.2, 0.7, 0.7, 0.7]}, False),
        ({"kl": [1, 1, 1, 3, 3, 3], "kind": [0.5, 0.5, 0.5, 0.505, 0.505, 0.505]}, True),  # within the noise
        ({"kl": [1, 1, 1, 3, 3, 3], "kind": [0.7, 0.7, 0.7, 0.2, 0.2, 0.2]}, True),
    ],
)
def test_kl_that_rises_for_nothing(changes, rose):
    assert (KL_ROSE in said(records(6, **changes))) == rose
    assert KL_ROSE not in said(records(5, **{name: values[1:] for name, values in changes.items()})), "not before six records"


def test_kl_that_rises_where_an_objective_without_weight_is_never_scored():
    found = records(6, kl=[1, 1, 1, 3, 3, 3])
    for record in found:
        record["rewards"]["brief"] = record["spread"]["brief"] = None
    assert KL_ROSE in said(found, preference=(1.0, 0.0))
    assert KL_ROSE not in said(found), "what counts is unknown"


def test_a_guard_that_falls_while_utility_rises():
    first, scores = [], np.linspace(0.4, 0.8, 32)[:, None]
    asked = [str(n) for n in range(32)]
    begin = {"utility": 0.4, **guarded(Said.guards, scores, first, asked)}
    assert np.array(first).shape == (32, 1)
    noise = 0.1 * (-1.0) ** np.arange(32)[:, None]
    for fall, better, warned in ((0.3, 0.1, True), (0.04, 0.1, False), (0.3, -0.1, False)):
        look = {"utility": 0.4 + better, **guarded(Said.guards, scores - fall + noise, first, asked)}
        mean, error = look["change"]["sense"]
        assert mean == pytest.approx(-fall)
        assert error == pytest.approx(0.1 / np.sqrt(31), rel=1e-6)
        assert ("guard sense" in said(records(1), [begin, look])) == warned
    assert (
        "`sense` fell from 0.600 to 0.300"
        in said(records(1), [begin, {"utility": 0.5, **guarded(Said.guards, scores - 0.3, first, asked)}])["guard sense"]
    )
    wild = {"utility": 0.5, **guarded(Said.guards, scores - 0.3 + 20 * noise, first, asked)}
    assert "guard sense" not in said(records(1), [begin, wild]), "no more than noise"


def test_means_and_changes_leave_out_what_was_not_scored():
    first = []
    scores = np.array([[0.2], [np.nan], [0.6]])
    found = guarded(Said.guards, scores, first, ["a", "b", "c"])
    assert found["guards"] == {"sense": pytest.approx(0.4)}
    assert json.dumps(first) == "[[0.2], [null], [0.6]]"
    assert guarded(Said.guards, scores + 0.1, first, ["a", "b", "c"])["change"]["sense"] == pytest.approx([0.1, 0.0])
    assert named_means(Said.guards, np.full((2, 1), np.nan)) == {"sense": None}


def test_the_learning_rate_is_halved_where_kl_rises_for_nothing(tmp_path, monkeypatch):
    """Once every three records; the sentence is said once."""
    from paretune.training.learners import embedded

    monkeypatch.setattr(embedded, "warnings_of", lambda *_, **__: {KL_ROSE: "rises"})
    learner = PolicyGradient(**LOOKED)
    learner.train(spec_of(learner), TASK, tmp_path)
    log = log_of(tmp_path)
    assert [record["step"] for record in log if "warnings" in record] == [1]
    np.testing.assert_allclose([record["lr"] / learner.lr for record in log], [1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125])
    assert torch.get_default_dtype() == torch.float32
