"""Evaluation against closed forms (table policies), and the sampled path against the exact one (real models)."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import t

from oracles import TablePolicy, constant_of, experts_of, optimum_of, small_task
from paretune.errors import ConfigError
from paretune.evaluation import metrics
from paretune.evaluation.evaluate import compare, evaluate
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.hidden import HiddenMix
from paretune.policy.mixing.parameter import FactorMix, ParameterMix, ReferencePolicy
from paretune.policy.mixing.predictions import LogitMix
from paretune.policy.returns import ExactReturns, SampledReturns
from paretune.policy.rules import Constant, Identity
from paretune.seeds import generator
from paretune.tasks.base import Task
from paretune.tasks.exact.task import ExactTask
from paretune.training.cost import Cost


@pytest.fixture(scope="module")
def task():
    return small_task(rho=-0.8)


@pytest.fixture(scope="module")
def noisy_bank(task):
    """Two random adapters: no expert, but a real policy at every gate."""
    model, tokenizer = task.load()
    bank = LoraBank.attach(model, names=["a", "b"], seed=0, rank=4, alpha=32)
    rng = generator(0, "test adapters")
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.from_numpy(rng.normal(0, 0.1, parameter.shape)).float())
    return bank, tokenizer


def family_of(task, policy, rule=None):
    return Family(policy, rule or Identity(), task.objectives, task.base(), max_new_tokens=task.max_new_tokens)


def test_the_optimum_is_perfect(task):
    got = evaluate(task, optimum_of(task, task.judged())).metrics
    for split in ("train", "test"):
        m = got["splits"][split]
        assert m["attainment"]["worst"] == pytest.approx(1, abs=1e-9)
        assert m["regret"]["worst"] == pytest.approx(0, abs=1e-12)
        assert m["utility_loss"]["maximum"] == pytest.approx(0, abs=1e-12)
        assert m["controllability"] == pytest.approx(1, abs=1e-9)
        assert m["hypervolume"]["share"] == pytest.approx(m["hypervolume"]["share_of_optimum"])
        assert 0.9 < m["hypervolume"]["share"] < 1
        assert m["igd_plus"]["value"] == pytest.approx(m["igd_plus"]["of_optimum"])
        assert m["loss"] is None


def test_the_reference_is_zero(task):
    model, tokenizer = task.load()
    policy = ReferencePolicy(LoraBank.load(model, {}), tokenizer)
    m = evaluate(task, family_of(task, policy, Constant(gates_K=()))).metrics["splits"]["test"]
    assert np.abs(m["attainment"]["per_preference"]).max() < 1e-4
    assert m["kl"]["worst"] == pytest.approx(0, abs=1e-9)
    assert m["controllability"] == pytest.approx(0, abs=1e-9)


def test_a_constant_policy_is_not_controlled_and_a_reversed_one_less(task):
    w = task.judged()
    constant = evaluate(task, constant_of(task, [0.5, 0.5])).metrics["splits"]["train"]
    assert constant["controllability"] == pytest.approx(0, abs=1e-9)
    assert constant["attainment"]["per_preference"][5] == pytest.approx(1), "it is the optimum of (.5, .5)"
    backwards = evaluate(task, optimum_of(task, w, list(range(len(w)))[::-1])).metrics["splits"]["train"]
    assert backwards["controllability"] < -0.5
    assert backwards["attainment"]["worst"] < -1
    assert backwards["hypervolume"]["share"] == pytest.approx(backwards["hypervolume"]["share_of_optimum"]), "hypervolume does not see it"
    assert backwards["utility_loss"]["maximum"] == pytest.approx(0, abs=1e-12)


def test_attainment_by_hand(task):
    """One preference, from the definition, without any of the library's metrics."""
    w = np.array([[0.3, 0.7]])
    family = experts_of(task, Identity())
    got = evaluate(task, family, w_WM=w, splits=["test"])
    prompts, responses = range(4), range(len(task.responses))
    logp = family.policy.combine(family.policy.parts(task.inputs("test").input_ids_PT), torch.tensor([[0.3, 0.7]]).repeat(4, 1))
    logp_PR = task.logp_from_logits(logp, "test").numpy()

    def utility(table_PR):
        total = 0.0
        for p in prompts:
            for r in responses:
                kl = table_PR[p, r] - task.reference_logp_PR("test")[p, r]
                total += math.exp(table_PR[p, r]) * (w[0] @ task.rewards_PRM("test")[p, r] - task.beta * kl)
        return total / len(prompts)

    start, best = utility(task.reference_logp_PR("test")), utility(task.optimum_logp_PR(w[0], "test"))
    m = got.metrics["splits"]["test"]
    assert m["attainment"]["per_preference"][0] == pytest.approx((utility(logp_PR) - start) / (best - start), abs=1e-9)
    assert m["regret"]["per_preference"][0] == pytest.approx(best - utility(logp_PR), abs=1e-9)
    assert m["gain"]["per_preference"][0]["value"] == pytest.approx(utility(logp_PR) - start, abs=1e-9)
    assert m["controllability"] is None, "one preference is no path"
    assert got.curves["test"].exact
    assert got.curves["test"].rewards_WSM.shape == (1, 4, 2)


def test_optimal_experts_lose_by_composition_alone(task):
    m = evaluate(task, experts_of(task, Identity())).metrics["splits"]["train"]
    assert m["loss"]["experts"] == pytest.approx([0, 0], abs=1e-9)
    assert m["loss"]["learning"] == pytest.approx([0] * 11, abs=1e-6)
    assert m["loss"]["remainder"] == [0] * 11
    assert max(m["loss"]["composition"]) == pytest.approx(1 - task.verified()["train"]["worst_composition_limit"], abs=1e-4)


def test_weak_experts_lose_by_learning_too(task):
    m = evaluate(task, experts_of(task, Identity(), temper=0.7)).metrics["splits"]["train"]
    parts = [sum(three) for three in zip(m["loss"]["composition"], m["loss"]["learning"], m["loss"]["remainder"], strict=True)]
    assert parts == pytest.approx([1 - a for a in m["attainment"]["per_preference"]])
    assert min(m["loss"]["experts"]) > 0.02
    assert m["loss"]["learning"][0] > 0.02, "near a vertex the loss is the expert's"
    assert min(m["loss"]["learning"]) < 0, "in the middle under-trained experts mix better than perfect ones"
    perfect = evaluate(task, experts_of(task, Identity())).metrics["splits"]["train"]
    assert m["loss"]["composition"] == perfect["loss"]["composition"]


def test_soups_have_no_composition_limit(task):
    m = evaluate(task, experts_of(task, Identity(), mixing="parameter")).metrics["splits"]["train"]
    assert m["loss"]["composition"] is None
    assert m["loss"]["learning"] is None
    assert m["loss"]["remainder"] == pytest.approx([1 - a for a in m["attainment"]["per_preference"]])


def test_permuting_objectives_permutes_results(task):
    class Swapped(ExactTask):
        registered_name = "swapped"

        def rewards_PRM(self, split):
            return super().rewards_PRM(split)[:, :, ::-1]

    other = Swapped(**{f: getattr(task, f) for f in ("alphabet", "length", "prompt_count", "width", "layers", "rho")})
    w = task.judged()[:4]
    one = evaluate(task, experts_of(task, Identity(), temper=0.7), w_WM=w).metrics["splits"]["train"]
    two = evaluate(other, experts_of(other, Identity(), temper=0.7), w_WM=w[:, ::-1]).metrics["splits"]["train"]
    for name in ("attainment", "regret", "kl"):
        assert two[name]["per_preference"] == pytest.approx(one[name]["per_preference"], abs=1e-9)
    for name in ("hypervolume", "igd_plus"):
        assert two[name]["value"] == pytest.approx(one[name]["value"], abs=1e-9)
    assert two["controllability"] == pytest.approx(one["controllability"], abs=1e-9)
    assert np.array(two["returns"])[:, ::-1] == pytest.approx(np.array(one["returns"]), abs=1e-9)


def test_parts_are_computed_once_per_split(task):
    family = experts_of(task, Identity())
    evaluate(task, family)
    assert family.policy.calls == 2


def test_equal_gates_are_computed_once(task):
    family = constant_of(task, [0.5, 0.5])
    family.policy.parts_need_gates = True
    evaluate(task, family, splits=["train"])
    assert family.policy.calls == 1


@pytest.mark.parametrize("level", [ParameterMix, FactorMix, LogitMix, HiddenMix])
def test_cached_parts_equal_separate_forwards(task, noisy_bank, level):
    policy = level(*noisy_bank)
    gates = np.array([[0.2, 0.8], [1.0, 0.0], [0.5, 0.1]])
    inputs = task.inputs("test")
    measured = ExactReturns(task, policy, "test").at(gates)
    rewards_WPM, kl_WP = measured.rewards_WSM, measured.kl_WS
    for g, rewards_PM, kl_P in zip(gates, rewards_WPM, kl_WP, strict=True):
        gates_PK = torch.from_numpy(g).float().repeat(4, 1)
        with torch.no_grad():
            logits = policy.forward(
                inputs.input_ids_PT, gates_NK=gates_PK, attention_mask=inputs.mask_11TT, position_ids=inputs.position_ids_PT
            )
        expected = task.returns(task.logp_from_logits(logits, "test").numpy(), "test")
        assert rewards_PM == pytest.approx(expected[0], abs=1e-6)
        assert kl_P == pytest.approx(expected[1], abs=1e-6)


@pytest.mark.parametrize("level", [ParameterMix, LogitMix])
def test_samples_agree_with_enumeration(task, noisy_bank, level):
    """Means of 1,600 samples within 4.5 standard errors of the exact values: 12 checks, false alarm below 1e-4."""
    policy, gates = level(*noisy_bank), np.array([[0.7, 0.6], [0.0, 1.0]])
    measured = ExactReturns(task, policy, "train").at(gates)
    exact_rewards_WPM, exact_kl_WP = measured.rewards_WSM, measured.kl_WS
    drawn = SampledReturns(task, policy, "train", samples=1600, seed=3).at(gates)
    for w in range(2):
        for values_S, truth in (
            *((drawn.rewards_WSM[w, :, m], exact_rewards_WPM[w, :, m].mean()) for m in range(2)),
            (drawn.kl_WS[w], exact_kl_WP[w].mean()),
        ):
            assert abs(values_S.mean() - truth) < 4.5 * values_S.std() / 40
    assert exact_kl_WP.mean() > 0.02, "or the test sees nothing"
    assert (np.bincount(drawn.prompt_S) == 400).all()


def test_sampled_evaluation(task, noisy_bank):
    family = family_of(task, LogitMix(*noisy_bank))
    w = np.array([[0.9, 0.1], [0.5, 0.5]])
    got = evaluate(task, family, w_WM=w, samples=80, exact=False, seed=1)
    again = evaluate(task, family, w_WM=w[:1], samples=80, exact=False, seed=1)
    m = got.metrics["splits"]["test"]
    json.dumps(got.metrics, allow_nan=False)
    assert not got.curves["test"].exact
    assert got.curves["test"].rewards_WSM.shape == (2, 80, 2)
    assert (again.curves["test"].rewards_WSM[0] == got.curves["test"].rewards_WSM[0]).all(), "noise does not depend on what else is asked"
    assert m["attainment"] is m["regret"] is m["loss"] is m["controllability"] is None
    assert m["hypervolume"]["share"] is None
    assert m["hypervolume"]["reference_point"] == [0, 0]
    shown = m["utility"]["per_preference"][0]
    assert shown["n"] == 80
    assert shown["low"] < shown["value"] < shown["high"]
    truth = evaluate(task, family, w_WM=w).metrics["splits"]["test"]["utility"]["per_preference"][0]
    assert truth["low"] is None
    assert shown["value"] == pytest.approx(truth["value"], abs=3 * (shown["high"] - shown["low"]) / 2)


def test_shared_noise_narrows_the_difference_to_the_reference(task, noisy_bank):
    """A policy near the reference draws mostly the same responses from the same uniforms."""
    family = family_of(task, ParameterMix(*noisy_bank), Constant(gates_K=(0.03, 0.03)))
    m = evaluate(task, family, w_WM=np.array([[0.9, 0.1]]), samples=200, exact=False).metrics["splits"]["train"]
    width = {name: m[name]["per_preference"][0]["high"] - m[name]["per_preference"][0]["low"] for name in ("utility", "gain")}
    assert width["gain"] < 0.6 * width["utility"]


def test_every_sampled_interval_is_over_prompts(task, noisy_bank):
    """Utility, gain, returns and comparisons: prompts differ far more than 50 responses to one do, so rows as units would be too narrow."""
    near, far = (family_of(task, ParameterMix(*noisy_bank), Constant(gates_K=(g, 0.0))) for g in (0.1, 0.6))
    one, two = (evaluate(task, f, w_WM=np.array([[0.9, 0.1]]), samples=200, exact=False, splits=["train"]) for f in (near, far))
    m, curve = two.metrics["splits"]["train"], two.curves["train"]

    def half(value_S):
        return t.ppf(0.975, 3) * value_S.reshape(50, 4).mean(0).std(ddof=1) / 2

    utility_S = curve.returns_WSM[0] @ [0.9, 0.1]
    start_S = SampledReturns(task, far.policy, "train", samples=200, seed=0).at([None]).returns_WSM[0] @ [0.9, 0.1]
    gap_S = utility_S - one.curves["train"].returns_WSM[0] @ [0.9, 0.1]
    assert half(utility_S) > 1.5 * 1.96 * utility_S.std() / np.sqrt(200), "or the test sees nothing"
    compared = compare(two, one, split="train")
    for shown, value_S in ((m["utility"], utility_S), (m["gain"], utility_S - start_S), (compared, gap_S)):
        for found in (shown["mean"], shown["per_preference"][0]):
            assert found["high"] - found["value"] == pytest.approx(half(value_S))
            assert found["value"] - found["low"] == pytest.approx(half(value_S))
    assert m["returns_error"][0] == pytest.approx([half(curve.returns_WSM[0, :, k]) for k in range(2)])
    assert m["rewards_error"][0] == pytest.approx([half(curve.rewards_WSM[0, :, k]) for k in range(2)])


class Repeated(ExactTask):
    """Every prompt stands there three times."""

    registered_name = "repeated"

    def prompts(self, split):
        return [*super().prompts(split)] * 3


def test_prompts_that_come_again_get_responses_of_their_own_and_are_one_unit(task, noisy_bank):
    again = Repeated(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    family = family_of(task, ParameterMix(*noisy_bank))
    once, more = (evaluate(t, family, samples=24, exact=False, splits=["train"]).curves["train"] for t in (task, again))
    assert np.array_equal(once.prompt_S, more.prompt_S)
    assert np.array_equal(once.rewards_WSM, more.rewards_WSM)


def test_few_samples_have_no_interval(task, noisy_bank):
    m = evaluate(task, family_of(task, ParameterMix(*noisy_bank)), samples=9, exact=False, splits=["train"]).metrics["splits"]["train"]
    assert m["utility"]["mean"]["low"] is None
    assert m["utility"]["mean"]["value"] is not None


class Forgetful(ExactTask):
    """Objective 1 cannot score responses that begin with "a"; objective 2 none to the second prompt."""

    registered_name = "forgetful"

    def score(self, prompts, completions):
        rewards_NM = super().score(prompts, completions)
        rewards_NM[[c.startswith("a") for c in completions], 0] = np.nan
        rewards_NM[[p.text == self.prompts("train")[1].text for p in prompts], 1] = np.nan
        return rewards_NM


def test_unscored_is_left_out_and_counted(task, noisy_bank):
    forgetful = Forgetful(**{f: getattr(task, f) for f in ("alphabet", "length", "prompt_count", "width", "layers", "rho")})
    family = family_of(forgetful, ParameterMix(*noisy_bank))
    w = np.array([[1.0, 0.0], [0.5, 0.5]])
    got = evaluate(forgetful, family, w_WM=w, samples=80, exact=False, splits=["train"])
    curve, m = got.curves["train"], got.metrics["splits"]["train"]
    missing = np.isnan(curve.rewards_WSM)
    assert m["unscored"] == {"count": int(missing.sum()), "of": 320, "per_objective": missing.sum((0, 1)).tolist()}
    assert m["unscored"]["per_objective"][1] == 2 * 20
    assert m["rewards"][0] == pytest.approx(np.nanmean(curve.rewards_WSM[0], axis=0))
    assert m["utility"]["per_preference"][0]["n"] == int((~missing[0, :, 0]).sum()), "an objective without weight may be missing"
    assert m["utility"]["per_preference"][1]["n"] == int((~missing[1].any(1)).sum())
    json.dumps(got.metrics, allow_nan=False)


def test_rewards_outside_of_their_range_are_counted_in_the_cell(task, noisy_bank):
    class Half(ExactTask):
        registered_name = "half"

        @property
        def objectives(self):
            there = super().objectives
            return type(there)(there.names, there.low, (0.5, there.high[1]))

    half = Half(**{f: getattr(task, f) for f in ("alphabet", "length", "prompt_count", "width", "layers", "rho")})
    family = family_of(half, ParameterMix(*noisy_bank))
    got = evaluate(half, family, w_WM=np.array([[1.0, 0.0], [0.5, 0.5]]), samples=40, exact=False, splits=["train"])
    rewards_N = got.curves["train"].rewards_WSM[:, :, 0].ravel()
    expected = {"count": int((rewards_N > 0.5).sum()), "lowest": rewards_N.min(), "highest": rewards_N.max()}
    assert got.metrics["splits"]["train"]["outside"] == {"objective_1": pytest.approx(expected)}
    assert 0 < expected["count"] < 80
    json.dumps(got.metrics, allow_nan=False)


def test_nothing_scored_is_unknown(task, noisy_bank):
    class Silent(ExactTask):
        registered_name = "silent"

        def score(self, prompts, completions):
            return np.full((len(completions), 2), np.nan)

    silent = Silent(**{f: getattr(task, f) for f in ("alphabet", "length", "prompt_count", "width", "layers", "rho")})
    family = family_of(silent, ParameterMix(*noisy_bank))
    m = evaluate(silent, family, samples=20, exact=False, splits=["test"]).metrics["splits"]["test"]
    assert m["utility"]["mean"] == {"value": None, "low": None, "high": None, "n": 0}
    assert m["hypervolume"]["value"] is None
    assert m["rewards"][0] == [None, None]


def test_compare_pairs_samples_and_prompts(task, noisy_bank):
    w = np.array([[0.5, 0.5], [0.2, 0.8]])
    near = [family_of(task, ParameterMix(*noisy_bank), Constant(gates_K=(g, 0.0))) for g in (0.5, 0.6)]
    one, two = (evaluate(task, f, w_WM=w, samples=120, exact=False) for f in near)
    got = compare(one, two, split="train")
    assert got["mean"]["n"] == 120
    alone = one.metrics["splits"]["train"]["utility"]["mean"]
    assert got["mean"]["high"] - got["mean"]["low"] < 0.6 * (alone["high"] - alone["low"])
    assert compare(two, one, split="train")["mean"]["value"] == pytest.approx(-got["mean"]["value"])
    exact = [evaluate(task, f, w_WM=w) for f in near]
    assert compare(*exact, split="train")["mean"]["low"] is None
    with pytest.raises(ConfigError, match="same preferences, prompts and samples"):
        compare(one, exact[0], split="train")


def test_undefined_attainment_is_counted(task, monkeypatch):
    monkeypatch.setattr(metrics, "MIN_GAIN", 0.06)
    m = evaluate(task, constant_of(task, [0.5, 0.5])).metrics["splits"]["train"]
    values = m["attainment"]["per_preference"]
    assert 0 < m["attainment"]["undefined"] == values.count(None) < len(values)
    assert m["attainment"]["mean"] == pytest.approx(np.mean([v for v in values if v is not None]))


def test_bad_questions(task):
    family = constant_of(task, [0.5, 0.5])
    for w, message in (
        (np.array([0.5, 0.5]), r"\(W, M\) array"),
        (np.array([[0.5, 0.6]]), "sum to 1"),
        (np.array([[1.0, 0.0, 0.0]]), "one weight per objective"),
        (np.empty((0, 2)), "at least one row"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(task, family, w_WM=w)
    with pytest.raises(ConfigError, match="at least one sample"):
        evaluate(task, family, samples=0)


def test_exact_is_refused_where_nothing_is_exact(task):
    class Plain(Task):
        registered_name = "plain"
        objectives, beta, max_new_tokens = task.objectives, 0.1, 3
        load = prompts = score = None

    with pytest.raises(ConfigError, match="exact on exact tasks only"):
        evaluate(Plain(), constant_of(task, [0.5, 0.5]), exact=True)


def test_three_objectives():
    task = small_task(objective_count=3, rho=-0.3)
    w = task.judged()[:12]
    m = evaluate(task, optimum_of(task, w), w_WM=w, splits=["train"]).metrics["splits"]["train"]
    assert m["attainment"]["worst"] == pytest.approx(1, abs=1e-9)
    assert m["controllability"] == pytest.approx(1, abs=1e-9)
    assert 0 < m["hypervolume"]["share"] < 1


def test_search_cost_is_reported(task):
    class Searching(Constant):
        def cost(self, w_WM):
            return Cost(evaluations=len(w_WM))

    family = constant_of(task, [0.5, 0.5])
    assert evaluate(task, family, splits=["train"]).cost == Cost()
    family.rule = Searching(gates_K=(1.0,))
    assert evaluate(task, family, splits=["train"]).cost.evaluations == 11


def test_the_oracle_is_what_it_claims(task):
    """Table policies give back the tables they were made of."""
    policy = TablePolicy(task, {s: [task.optimum_logp_PR(np.array([0.3, 0.7]), s)] for s in ("train", "test")})
    got = ExactReturns(task, policy, "test").logp_PR(np.array([1.0]))
    assert got == pytest.approx(task.optimum_logp_PR(np.array([0.3, 0.7]), "test"), abs=1e-9)
    assert ExactReturns(task, policy, "test").logp_PR(None) == pytest.approx(task.reference_logp_PR("test"), abs=1e-9)
