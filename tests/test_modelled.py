"""Training on prompts that nobody scores: the reward model's features, its fit, what is scored, and what is gained on other prompts."""

import json
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from learner_cases import SMALL, killed, log_of, spec_of, weights
from paretune.errors import ConfigError, RewardError
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.returns import ExactReturns
from paretune.registry import describe
from paretune.runs.recipes.recipe import load_recipe
from paretune.tasks.exact.task import RepresentableTask
from paretune.training.learners.exact import ExactGradient
from paretune.training.learners.modelled import FILE, RewardModel
from paretune.training.learners.policy_gradient import PolicyGradient
from recipe_files import tiny_model, write_lines, write_recipe

TASK = RepresentableTask(alphabet=4, length=2, width=32, layers=1, rho=-0.5, seed=1, prompt_count=12, test_count=12, shared=2, ceiling=0.0)
SAMPLED = PolicyGradient(**{**SMALL, "samples": 128}, scored=64, unlabelled=10)


def model_of(task=TASK):
    loaded, tokenizer = task.load()
    policy = ParameterMix(LoraBank.attach(loaded, names=["policy"], seed=0, rank=2), tokenizer)
    with torch.no_grad():  # features are the reference's, whatever adapters say
        for parameter in policy.bank.parameters():
            parameter.add_(1.0)
    return RewardModel(policy, seed=3)


def said(folder):
    return json.loads((folder / FILE).read_text())


def test_features_are_products_of_each_token_with_the_state_before_it():
    """By the tree, by texts, and by a plain forward of the reference over one response."""
    model, prompt = model_of(), TASK.prompts("train")[2]
    by_tree_RF = model.tree_RF(TASK, 2)
    by_text_RF = model.text_NF([prompt] * TASK.tree.responses, TASK.responses, limit=TASK.length)
    assert by_text_RF == pytest.approx(by_tree_RF, abs=1e-5)
    loaded, tokenizer = TASK.load()
    number = TASK.responses.index("b")  # one symbol, then its end
    ids = tokenizer(prompt.text + "b", return_tensors="pt").input_ids
    with torch.no_grad():
        states_TH = loaded(ids, output_hidden_states=True).hidden_states[-1][0].double()
    products = [
        torch.cat([state_H, torch.ones(1)]) @ model._state_HF * model._token_VF[token]
        for state_H, token in zip(states_TH[-2:], (TASK.tree.symbols_RL[number, 0], TASK.tree.eos), strict=True)
    ]
    assert by_tree_RF[number] == pytest.approx((products[0] + products[1]).numpy(), abs=1e-5)


def test_rewards_that_are_such_a_head_are_known_on_other_prompts():
    model, rng = model_of(), np.random.default_rng(0)
    head_FM, level_P1 = rng.normal(0, 0.1, (1024, 2)), rng.normal(0, 5.0, (12, 1))
    features = [model.tree_RF(TASK, p) for p in range(12)]
    share_PR = np.exp(TASK.reference_logp_PR("train"))
    data = [(p, features[p], features[p] @ head_FM + level_P1[p], share_PR[p]) for p in range(12)]
    noise = [(p, features[p], rng.normal(size=(len(features[p]), 2)), share_PR[p]) for p in range(12)]
    assert min(model.fit(data, ridge=1e-6)) > 0.8, "the level of a prompt is no part of it"
    assert max(model.fit(noise, ridge=1e-2)) < 0.1
    model.fit(data[:11], ridge=1e-6)
    left_RM, wanted_RM = features[11] @ (model.weights_FM - head_FM), features[11] @ head_FM
    off_M, all_M = (share_PR[11] @ (x_RM - share_PR[11] @ x_RM) ** 2 for x_RM in (left_RM, wanted_RM))
    assert (off_M < 0.2 * all_M).all()


def test_unlabelled_prompts_are_none_of_the_others():
    more = TASK.unlabelled(20)
    assert len(more) == len({prompt.text for prompt in more}) == 20
    assert not {prompt.text for prompt in more} & {prompt.text for split in ("train", "test") for prompt in TASK.prompts(split)}
    assert more == TASK.unlabelled(40)[:20]
    assert len(TASK.unlabelled(500)) <= 4**3 - 24


def test_retrained_has_the_guess_on_training_prompts_and_the_truth_elsewhere():
    made = replace(TASK, noise=0.5).retrained(TASK.unlabelled(3), lambda task: np.full((task.prompt_count, task.tree.responses, 2), 0.25))
    assert made.prompt_count == len(made.prompts("train")) == 15
    assert [p.text for p in made.prompts("train")] == [p.text for p in (*TASK.prompts("train"), *TASK.unlabelled(3))]
    assert (made.rewards_PRM("train") == 0.25).all()
    assert made.rewards_PRM("test") == pytest.approx(TASK.rewards_PRM("test"))
    assert made.reference_logp_PR("train")[:12] == pytest.approx(TASK.reference_logp_PR("train"))
    assert made.observe(made.prompts("train")[-1:], ["ab"], streams=[1]).tolist() == [[0.25, 0.25]], "and no noise"


@pytest.mark.usefixtures("one_thread")
def test_what_is_learned_holds_on_prompts_that_nobody_scored(tmp_path):
    """A gain on test prompts that the same steps without unlabelled prompts do not have."""
    gained, w_M = {}, np.array([0.5, 0.5])
    for learner in (ExactGradient(rank=8, steps=60), ExactGradient(rank=8, steps=60, unlabelled=28)):
        folder = tmp_path / str(learner.unlabelled)
        learner.train(spec_of(learner, (0.5, 0.5), TASK), TASK, folder)
        loaded, tokenizer = TASK.load()
        policy = ParameterMix(LoraBank.load(loaded, {"policy": folder}), tokenizer)
        gained[learner.unlabelled] = TASK.J_M(ExactReturns(TASK, policy, "test").logp_PR(np.ones(1)), "test") @ w_M
    best = TASK.J_M(TASK.optimum_logp_PR(w_M, "test"), "test") @ w_M
    assert best - gained[28] < 0.7 * (best - gained[0])
    assert said(tmp_path / "28")["unlabelled"] == 28
    assert not (tmp_path / "0" / FILE).exists()


@dataclass(frozen=True)
class Counted(RepresentableTask):
    """The same task; it counts which responses were scored."""

    seen = []

    def observe(self, prompts, completions, *, streams):
        self.seen.extend(prompt.text for prompt in prompts)
        return super().observe(prompts, completions, streams=streams)

    def retrained(self, more, guess):
        made = super().retrained(more, guess)
        made.__dict__["seen"] = []
        return made


COUNTED = Counted(**{field.name: getattr(TASK, field.name) for field in fields(TASK)})


@pytest.mark.usefixtures("one_thread")
def test_only_the_scored_samples_are_scored_and_all_are_counted(tmp_path):
    COUNTED.seen.clear()
    cost = SAMPLED.train(spec_of(SAMPLED, task=TASK), COUNTED, tmp_path)
    assert len(COUNTED.seen) == 64
    assert set(COUNTED.seen) <= {p.text for p in COUNTED.prompts("train")}
    assert cost.samples == 128
    assert cost.steps == 4 == SAMPLED.steps
    assert said(tmp_path)["scored"] == 64
    assert log_of(tmp_path)[-1]["samples"] == 128


@pytest.mark.usefixtures("one_thread")
def test_prompts_with_rewards_may_keep_their_own(tmp_path):
    """The truth on the first prompts of an exact task, and the model's scores on the others."""
    guess = {}
    for own in (False, True):
        learner = ExactGradient(rank=8, unlabelled=10, own_scores=own)
        policy = learner.start(spec_of(learner, (0.5, 0.5), TASK), TASK, {})
        task, _ = learner.trained_on(policy, spec_of(learner, (0.5, 0.5), TASK), TASK, tmp_path / str(own))
        guess[own] = task.rewards_PRM("train")
    assert guess[True][:12] == pytest.approx(TASK.rewards_PRM("train"))
    assert np.abs(guess[False][:12] - TASK.rewards_PRM("train")).max() > 0.01, "the model does not express the truth"
    assert (guess[True][12:] == guess[False][12:]).all()


def test_features_that_span_the_head_say_all_that_it_can(tmp_path):
    """5 tokens and 33 numbers of a state and 1: 165 products say what 1,024 do, and 40 do not."""
    known = {}
    for count in (40, 165, 1024):
        learner = ExactGradient(unlabelled=10, features=count, ridge=1e-9)
        spec = spec_of(learner, (0.5, 0.5), TASK)
        task, _ = learner.trained_on(learner.start(spec, TASK, {}), spec, TASK, tmp_path / str(count))
        known[count] = task.rewards_PRM("train")[12:]
    assert np.abs(known[165] - known[1024]).mean() < 0.05 * np.abs(known[40] - known[1024]).mean()


@pytest.mark.parametrize("learner", [ExactGradient, PolicyGradient])
def test_own_scores_without_unlabelled_prompts_say_so(learner):
    with pytest.raises(ConfigError, match="own_scores"):
        learner(own_scores=True)


@pytest.mark.usefixtures("one_thread")
def test_a_kill_costs_neither_scores_nor_bits(tmp_path):
    spec = spec_of(SAMPLED, task=TASK)
    SAMPLED.train(spec, TASK, tmp_path / "whole")
    killed(SAMPLED, spec, TASK, tmp_path / "twice", 2)
    COUNTED.seen.clear()
    SAMPLED.train(spec, COUNTED, tmp_path / "twice")
    assert not COUNTED.seen
    assert weights(tmp_path / "twice") == weights(tmp_path / "whole")
    assert said(tmp_path / "twice") == said(tmp_path / "whole")


@pytest.mark.usefixtures("one_thread")
def test_a_recipe_names_a_file_of_unlabelled_prompts(tmp_path):
    """They lack the columns that an objective needs, and are never scored by it."""
    write_lines(tmp_path / "more.jsonl", [{"prompt": f"Customer: is box {i} here?\nAgent:"} for i in range(6)])
    changes = {"prompts": {"path": "prompts.jsonl", "unlabelled": "more.jsonl", "test": 0.5}}
    objectives = [{"name": "knows", "use": "rewards.py:answers", "low": 0, "high": 1}, {"name": "brief", "use": "length", "half": 10}]
    task = load_recipe(write_recipe(tmp_path, tiny_model(), objectives=objectives, **changes)).task
    task.check()
    assert len(task.unlabelled(4)) == 4
    assert len(task.unlabelled(99)) == 6
    learner = replace(SAMPLED, unlabelled=6)
    cost = learner.train(spec_of(learner, task=task), task, tmp_path / "made")
    assert cost.samples == 128
    assert said(tmp_path / "made")["scored"] == 64
    last = log_of(tmp_path / "made")[-1]
    assert set(last["rewards"]) == {"knows", "brief"}
    assert all(0 <= value <= 1 for value in last["rewards"].values())


@pytest.mark.usefixtures("one_thread")
def test_rewards_are_asked_about_prompts_that_keep_their_own_and_no_others(tmp_path, monkeypatch):
    """After the 64 that the model is fitted to, they are what is learned from: other ones make another policy."""
    write_lines(tmp_path / "more.jsonl", [{"prompt": f"Customer: is box {i} here?\nAgent:"} for i in range(6)])
    changes = {"prompts": {"path": "prompts.jsonl", "unlabelled": "more.jsonl", "test": 0.5}}
    task, asked, made = load_recipe(write_recipe(tmp_path, tiny_model(), **changes)).task, [], {}
    score, learner = type(task).score, replace(SAMPLED, unlabelled=6, own_scores=True)
    for sign in (1, -1):

        def signed(self, prompts, texts, sign=sign):
            fitted = len(asked) >= 64
            asked.extend(p.text for p in prompts)
            return score(self, prompts, texts) * (sign if fitted else 1)

        monkeypatch.setattr(type(task), "score", signed)
        assert learner.train(spec_of(learner, task=task), task, tmp_path / str(sign)).samples == 128
        assert 64 < len(asked) < 128, "responses to unlabelled prompts are drawn, too"
        assert set(asked) <= {p.text for p in task.prompts("train")}
        made[sign] = weights(tmp_path / str(sign))
        asked.clear()
    assert made[1] != made[-1]


def test_noise_on_scores_that_a_table_would_not_have_says_so(tmp_path):
    learner, task = replace(SAMPLED, own_scores=True), replace(TASK, noise=0.5)
    with pytest.raises(ConfigError, match="own_scores"):
        learner.train(spec_of(learner, task=task), task, tmp_path / "made")


def test_fields_that_came_later_move_no_key():
    assert not {"scored", "unlabelled", "ridge", "features", "own_scores"} & set(describe(PolicyGradient()))
    assert {"scored": 64, "unlabelled": 10}.items() <= describe(SAMPLED).items()


@pytest.mark.parametrize("given", [{"unlabelled": 5}, {"scored": 64}, {"unlabelled": 5, "scored": 8}, {"unlabelled": 5, "scored": 120}])
def test_scored_and_unlabelled_go_together_and_leave_samples(given):
    with pytest.raises(ConfigError, match="scored"):
        PolicyGradient(**{**SMALL, "samples": 128}, **given)


def test_a_task_without_such_prompts_says_so(tmp_path):
    task = load_recipe(write_recipe(tmp_path, tiny_model())).task
    with pytest.raises(ConfigError, match="prompts without rewards") as raised:
        SAMPLED.train(spec_of(SAMPLED, task=task), task, tmp_path / "made")
    assert "unlabelled: more.jsonl" in str(raised.value)


def test_a_head_with_adapters_says_so(tmp_path):
    learner = replace(SAMPLED, targets=("lm_head",))
    with pytest.raises(ConfigError, match="head"):
        learner.train(spec_of(learner, task=TASK), TASK, tmp_path / "made")


@pytest.mark.parametrize(("score", "found"), [(0.5, "each with equal scores"), (None, "no prompt with two responses")])
def test_rewards_that_never_differ_say_so_before_a_step(tmp_path, score, found):
    write_lines(tmp_path / "more.jsonl", [{"prompt": "Customer: is it here?\nAgent:"}])
    (tmp_path / "rewards.py").write_text(f"def same(completions, **columns):\n    return [{score}] * len(completions)\n")
    objectives = [{"name": name, "use": "rewards.py:same", "low": 0, "high": 1} for name in ("one", "two")]
    recipe = write_recipe(tmp_path, tiny_model(), objectives=objectives, prompts={"path": "prompts.jsonl", "unlabelled": "more.jsonl"})
    task, learner = load_recipe(recipe).task, replace(SAMPLED, max_unscored=1.0)
    with pytest.raises(RewardError, match="whose scores differ") as raised:
        learner.train(spec_of(learner, task=task), task, tmp_path / "made")
    assert found in raised.value.found
    assert not (tmp_path / "made" / FILE).exists()
