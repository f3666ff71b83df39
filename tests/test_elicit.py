"""Preference elicitation: the posterior against integration on a grid, decisions against their definition, learning of true weights."""

import inspect
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from paretune.cli import app
from paretune.cli.elicit import elicit
from paretune.errors import ConfigError
from paretune.evaluation.elicit import CONSISTENCY, EACH, TIE, TIES, Elicitation, Question, draw_pool, pool_preferences
from paretune.policy.family import Family
from paretune.runs.suite import fit
from paretune.tasks.exact.task import ExactTask

RNG = np.random.default_rng(3)
POOL = RNG.normal(size=(60, 2))
PROMPTS = np.repeat(np.arange(6), 10)


def test_the_posterior_is_what_integration_on_a_grid_gives():
    asked = Elicitation(POOL, PROMPTS, particles=6000, seed=1)
    told = [((0, 1), 0), ((10, 13), 1), ((22, 27), TIE), ((31, 38), 0), ((40, 41), 1), ((52, 55), TIE)]
    for options, chosen in told:
        asked.answer(Question(int(PROMPTS[options[0]]), options), chosen)

    first, log_s, log_v = np.meshgrid(np.linspace(0.005, 0.995, 100), np.linspace(-4, 6, 101), np.linspace(-6, 4, 81), indexing="ij")
    log_p = -(((log_s - asked._center[0]) / CONSISTENCY[1]) ** 2 + ((log_v - TIES[0]) / TIES[1]) ** 2) / 2
    for (a, b), chosen in told:
        u_a, u_b = (np.exp(log_s) * (first * POOL[i, 0] + (1 - first) * POOL[i, 1]) for i in (a, b))
        choices = [u_a, u_b, log_v + (u_a + u_b) / 2]
        log_p += choices[chosen] - np.logaddexp.reduce(choices)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * first).sum()
    spread = np.sqrt((p * (first - mean) ** 2).sum())
    assert spread < 0.27  # the answers say something: a uniform w has .289
    assert asked.w_IM[:, 0].mean() == pytest.approx(mean, abs=0.015)
    assert asked.w_IM[:, 0].std() == pytest.approx(spread, abs=0.015)
    assert asked._x_IX[:, -2].mean() == pytest.approx((p * log_s).sum(), abs=0.06)
    assert asked._x_IX[:, -1].mean() == pytest.approx((p * log_v).sum(), abs=0.06)


@pytest.mark.parametrize("w", [(0.85, 0.15), (0.3, 0.7)])
def test_consistent_answers_lead_to_the_weights_behind_them(w):
    asked = Elicitation(POOL, PROMPTS, seed=2)
    regrets = [asked.regret]
    for _ in range(12):
        question = asked.ask()
        asked.answer(question, int(np.argmax(POOL[list(question.options)] @ w)))
        regrets.append(asked.regret)
    low, high = asked.interval()
    assert asked.weights == pytest.approx(w, abs=0.06)
    assert (low <= w).all()
    assert (w <= high).all()
    assert regrets[-1] < 0.05 * regrets[0]


def test_three_options_and_three_objectives_work_the_same():
    rng, w = np.random.default_rng(5), np.array([0.6, 0.3, 0.1])
    pool = rng.normal(size=(80, 3))
    asked = Elicitation(pool, np.repeat(np.arange(8), 10), options=3, seed=4)
    for _ in range(12):
        question = asked.ask()
        assert len(question.options) == 3
        asked.answer(question, int(np.argmax(pool[list(question.options)] @ w)))
    assert asked.weights == pytest.approx(w, abs=0.1)


def test_weights_minimize_the_expected_loss_and_regret_is_its_minimum():
    asked = Elicitation(POOL * [1, 5], PROMPTS, seed=0)  # objectives of unequal spread, or the mean would do
    asked.answer(Question(0, (0, 1)), 0)
    S = sum(np.cov(asked.rewards_NM[p == PROMPTS].T, bias=True) for p in range(6)) / 6

    def loss(u):
        return np.mean([(w - u) @ S @ (w - u) / (w @ S @ w) for w in asked.w_IM])

    best = min((loss(np.array([x, 1 - x])), x) for x in np.linspace(0, 1, 501))
    assert asked.regret == pytest.approx(best[0], rel=1e-3)
    assert asked.weights[0] == pytest.approx(best[1], abs=0.003)
    assert abs(asked.w_IM[:, 0].mean() - best[1]) > 0.02


def test_a_tie_says_that_the_weights_make_both_equal():
    pool = np.array([[1.0, 0.0], [0.0, 3.0]])
    asked = Elicitation(pool, np.zeros(2, int), seed=0)
    for _ in range(8):
        asked.answer(asked.ask(), TIE)
    assert asked.weights == pytest.approx([0.75, 0.25], abs=0.08)


def test_the_question_is_one_that_can_change_the_decision():
    """Responses to prompt 0 differ along the line on which everybody agrees; those to prompt 1 are a trade."""
    pool = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [0.0, 1.0], [1.0, 0.0]])
    assert Elicitation(pool, np.array([0, 0, 0, 1, 1])).ask().prompt == 1


def test_a_question_stands_until_it_is_answered_and_answers_can_be_replayed():
    asked = Elicitation(POOL, PROMPTS, seed=7)
    assert asked.ask() == asked.ask()
    for chosen in (0, 1, TIE):
        question = asked.ask()
        assert len(set(question.options)) == 2
        assert {int(PROMPTS[o]) for o in question.options} == {question.prompt}
        asked.answer(question, chosen)
    again = Elicitation(POOL, PROMPTS, seed=7)
    for told in asked.to_json()["answers"]:
        again.answer(Question(told["prompt"], tuple(told["options"])), told["chosen"])
    assert again.to_json() == asked.to_json()


def test_unscored_responses_are_counted_and_never_shown():
    pool = POOL.copy()
    pool[3, 1] = np.nan
    asked = Elicitation(pool, PROMPTS)
    assert asked.unscored == 1
    for seed in range(5):
        assert 3 not in {o for q in asked._draw(np.random.default_rng(seed), 400) for o in q.options}


@pytest.mark.parametrize(
    ("pool", "prompts"),
    [
        (np.ones((4, 2)), np.zeros(4)),
        (POOL[:2], np.arange(2)),
        (np.full((4, 2), np.nan), np.zeros(4)),
        (np.empty((0, 2)), np.empty(0)),
    ],
    ids=["all alike", "one each", "unscored", "empty"],
)
def test_a_pool_without_two_responses_that_differ_is_refused(pool, prompts):
    with pytest.raises(ConfigError, match="rewards differ"):
        Elicitation(pool, prompts)


def test_an_objective_that_never_differs_is_refused():
    """Its weight is what no answer says: it was told as .72 to somebody who had asked for none of it in eight answers."""
    pool = np.stack([POOL[:, 0], 0.1 * PROMPTS], axis=1)  # it differs between prompts, and questions are about one
    with pytest.raises(ConfigError, match=r"(?s)rewards differ.*equal rewards of objective 2 of 2"):
        Elicitation(pool, PROMPTS)


@pytest.mark.parametrize("chosen", [2, -2, 17])
def test_an_answer_that_is_no_option_is_refused_and_changes_nothing(chosen):
    asked = Elicitation(POOL, PROMPTS)
    before = asked.to_json()
    with pytest.raises(ConfigError, match="place of an option"):
        asked.answer(asked.ask(), chosen)
    assert asked.to_json() == before


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    task = ExactTask(alphabet=4, length=3, prompt_count=4, width=32, layers=1)
    made = fit(task, "experts", learner={"name": "exact", "steps": 3}, root=root / "runs", progress=False)
    made.save(root / "family")
    return task, made, root / "family"


def test_a_pool_has_a_response_at_each_preference_once_and_its_true_rewards(family):
    task, made, _ = family
    prompts = list(task.prompts("test"))
    pool = draw_pool(task, made, prompts, each=6, seed=3)
    drawn = {
        (p, made.sample([prompts[p]], w.tolist(), seed=3 + k)[0][0]) for k, w in enumerate(pool_preferences(2, 6, 3)) for p in range(4)
    }
    rows = list(zip(pool.prompt_N.tolist(), pool.responses_N, strict=True))
    assert len(set(rows)) == len(rows)
    assert set(rows) == drawn
    assert (pool.rewards_NM == task.score([prompts[p] for p, _ in rows], [text for _, text in rows])).all()
    w_WM = pool_preferences(2, 6, 3)
    assert len(w_WM) == 6
    assert {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)} <= {tuple(w) for w in w_WM.tolist()}
    assert len(pool_preferences(5, 2)) == 6  # all vertices and the middle, however few were asked for


def test_the_command_asks_hears_and_prints_a_preference_that_can_be_pasted(family):
    _, _, folder = family
    typed = "1\nwhat?\n2\n=\nb\n"
    result = CliRunner().invoke(app, ["elicit", str(folder), "--questions", "4", "--enough", "0", "--each", "6", "--json"], input=typed)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [told["chosen"] for told in found["answers"]] == [0, 1, TIE, 1]
    assert "'what?' is no answer" in result.stderr
    assert result.stderr.count("=== question") == 4
    weights = dict(part.split("=") for part in found["preference"].split(","))
    assert sum(round(100 * float(w)) for w in weights.values()) == 100
    assert [float(w) for w in weights.values()] == pytest.approx(found["weights"], abs=0.01)

    plain = CliRunner().invoke(app, ["elicit", str(folder), "--questions", "4", "--enough", "0", "--each", "6"], input=typed)
    assert f"--preference {found['preference']}" in plain.stdout
    said = CliRunner().invoke(app, ["sample", str(folder), "--preference", found["preference"], "abc"])
    assert said.exit_code == 0, said.output


def test_the_command_stops_where_nothing_is_at_stake_at_q_and_at_the_end_of_the_input(family):
    _, _, folder = family

    def run(*more, typed):
        return json.loads(CliRunner().invoke(app, ["elicit", str(folder), "--each", "4", "--json", *more], input=typed).stdout)

    assert len(run("--enough", "1", typed="1\n" * 10)["answers"]) == 1
    assert len(run(typed="1\nq\n1\n")["answers"]) == 1
    assert run(typed="")["answers"] == []


def test_a_folder_that_is_no_family_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["elicit", str(tmp_path)])
    assert result.exit_code == 2
    assert "remedy" in result.stderr


def test_the_command_draws_as_many_as_the_library():
    """The command's default is a number of its own, so that its help loads nothing."""
    assert inspect.signature(elicit).parameters["each"].default == EACH


def test_a_file_that_is_not_there_is_refused_before_the_model_is_loaded(family, monkeypatch):
    monkeypatch.setattr(Family, "load", lambda *_, **__: pytest.fail("loaded"))
    result = CliRunner().invoke(app, ["elicit", str(family[2]), "--file", "nothing.jsonl"])
    assert result.exit_code == 2
