"""The learner `trl-modpo`: TRL's DPOTrainer ends where the embedded offline learner ends, step by step, and goes on after a kill."""

from __future__ import annotations

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from learner_cases import SMALL, TASK, W, log_of, spec_of, weights
from paretune.errors import ConfigError, RewardError
from paretune.registry import LEARNERS, METHODS
from paretune.tasks.exact.task import ExactTask
from paretune.testing.methods import quick_learner
from paretune.training.cost import TIMED, read_cost
from paretune.training.learners.base import draw_step
from paretune.training.learners.modpo import Modpo, modpo_loss
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.trl.dpo import TrlModpo, _collate
from paretune.training.trl.learner import Trl
from processes import alone

EVERY = {**SMALL, "log_every": 1}
ADAM = {"optimizer": "adam", "lr": 1e-2}  # Muon rounds to bfloat16, which would hide small differences


def untimed(folder):
    return [{name: value for name, value in line.items() if name not in TIMED} for line in log_of(folder)]


class Silent(ExactTask):
    """The first response of every call cannot be scored by the first objective."""

    def observe(self, prompts, completions, *, streams):
        rewards_NM = super().observe(prompts, completions, streams=streams)
        rewards_NM[0, 0] = np.nan
        return rewards_NM


@pytest.mark.parametrize(
    ("preference", "fields"),
    [
        (W, {"labels": "drawn", "micro_batch": 7, **ADAM}),  # 24 pairs a step, 3 at once
        ((0.6, 0.4), {"labels": "drawn", "labeled": 1, "checkpointing": True, **ADAM}),
        ((1.0, 0.0), {"labels": "hard"}),
    ],
    ids=["in-parts", "labeled", "vertex"],
)
def test_it_takes_the_steps_of_the_embedded_learner(preference, fields, tmp_path):
    """Same responses, labels and first adapter, so loss, gradient, KL and weights agree. A response without EOS is among them, and one that
    is nothing else: a token too many or too few, or a margin on the wrong side, would be seen in the first gradient."""
    embedded, learner = Modpo(**{**EVERY, **fields}), TrlModpo(**{**EVERY, **fields})
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    known, cost = (x.train(spec_of(x, preference), TASK, folder) for x, folder in ((embedded, mine), (learner, theirs)))
    assert len(log_of(mine)) == 4
    for line, other in zip(untimed(mine), untimed(theirs), strict=True):
        for name in ("loss", "gradient_norm", "kl", "lr"):
            assert other.pop(name) == pytest.approx(line.pop(name), rel=1e-4, abs=1e-5), name
        mine_alone, theirs_alone = {"length", "cut", "kl_max"}, {"entropy_per_token"}  # what the other one does not hand on
        assert line.keys() - other.keys() <= mine_alone
        assert other.keys() - line.keys() <= theirs_alone
        assert {name: line[name] for name in line.keys() & other.keys()} == {name: other[name] for name in line.keys() & other.keys()}
    ours, others = (load_file(folder / "adapter_model.safetensors") for folder in (mine, theirs))
    assert list(ours) == list(others)
    assert all(torch.allclose(ours[name], others[name], rtol=0, atol=1e-4) for name in ours)
    policy = embedded.start(spec_of(embedded, preference), TASK, {})
    made = draw_step(embedded, policy, TASK, spec_of(embedded, preference), 0, reference=True)
    eos = policy.eos_ids[0]
    assert {tuple(ids[mask].eq(eos).tolist()) for ids, mask in zip(made.tokens_NT, made.mask_NT, strict=True)} >= {(True,), (False, False)}
    assert (cost.samples, cost.tokens, cost.steps, cost.storage_bytes) == (known.samples, known.tokens, known.steps, known.storage_bytes)
    assert cost.flops > known.flops
    assert read_cost(theirs) == cost
    assert learner.train(spec_of(learner, preference), TASK, theirs) == cost  # finished: nothing is trained again
    assert sorted(p.name for p in theirs.iterdir()) == sorted(p.name for p in mine.iterdir())
    PeftModel.from_pretrained(TASK.load()[0], theirs)


def test_the_moved_reference_is_the_loss_by_hand():
    """DPO's loss on the collator's numbers is MODPO's; the embedded learner's closed form is the other side."""
    learner, spec = TrlModpo(**SMALL), spec_of(TrlModpo(**SMALL))
    reference, policy, margin, wins = (-1.0, -2.5), (-0.7, -3.0), 0.3, 0.0  # the second response is the better one
    shift = -margin / (2 * TASK.beta)
    row = {"context": [1, 2], "better": [1], "worse": [2, 0], "shift": shift}
    batch = _collate([{**row, "ref_chosen_logps": reference[1], "ref_rejected_logps": reference[0]}])
    assert batch["input_ids"].tolist() == [[1, 2, 1, 0], [1, 2, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    moved = (policy[1] - batch["ref_chosen_logps"]) - (policy[0] - batch["ref_rejected_logps"])
    ratio = torch.tensor([(policy[0] - reference[0]) - (policy[1] - reference[1])])
    closed = modpo_loss(ratio, torch.tensor([margin]), torch.tensor([max(W)]), torch.tensor([wins]), beta=TASK.beta)
    assert -logsigmoid(learner._beta(spec, TASK) * moved).item() == pytest.approx(closed.item(), rel=1e-6)


def test_a_pair_without_a_score_moves_nothing(tmp_path):
    """Three of 24 pairs: the mean of the others, which the embedded learner takes over 21."""
    silent, fields = Silent(**dataclasses.asdict(TASK)), {**EVERY, "samples": 16, "labels": "drawn"}
    for kind, folder in ((Modpo, tmp_path / "mine"), (TrlModpo, tmp_path / "theirs")):
        kind(**fields).train(spec_of(kind(**fields)), silent, folder)
    (line,), (other,) = (log_of(tmp_path / name) for name in ("mine", "theirs"))
    assert other["unscored"] == line["unscored"] == {"objective_1": 1, "objective_2": 0}
    assert other["gradient_norm"] == pytest.approx(line["gradient_norm"] * 21 / 24, rel=1e-4)
    assert other["loss"] == pytest.approx((line["loss"] * 21 + np.log(2) * 3) / 24, rel=1e-5)


def test_a_tie_is_decided_by_a_coin(monkeypatch):
    """Rewards that never differ: both responses of a pair get to be the better one, the same ones at the same seed."""
    monkeypatch.setattr(ExactTask, "observe", lambda task, prompts, texts, *, streams: np.ones((len(texts), 2)))
    learner = TrlModpo(**{**SMALL, "labels": "hard"})
    spec = spec_of(learner)
    made = draw_step(learner, learner.start(spec, TASK, {}), TASK, spec, 0, reference=True)
    rows = learner._rows(made, spec, TASK, 0)
    assert rows == learner._rows(made, spec, TASK, 0)
    answers = [ids[mask].tolist() for ids, mask in zip(made.tokens_NT, made.mask_NT, strict=True)]
    pairs = [
        (4 * p + i, 4 * p + j) for p in range(4) for i in range(4) for j in range(i + 1, 4) if answers[4 * p + i] != answers[4 * p + j]
    ]
    places = [6 * (i // 4) + [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)].index((i % 4, j % 4)) for i, j in pairs]
    won = [rows[place]["better"] == answers[i] for place, (i, _) in zip(places, pairs, strict=True)]
    assert 0 < sum(won) < len(won)


def _killed(learner, folder):
    def progress(record):
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    learner.train(spec_of(learner), TASK, folder, progress=progress)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_training_goes_on_and_ends_the_same(tmp_path):
    learner, whole, torn = TrlModpo(**{**EVERY, **ADAM, "micro_batch": 16}), tmp_path / "whole", tmp_path / "torn"
    cost = learner.train(spec_of(learner), TASK, whole)
    assert alone(_killed, learner, torn) == -signal.SIGKILL
    assert not (torn / "ledger.json").exists()
    assert [p.name for p in (torn / "checkpoint").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = learner.train(spec_of(learner), TASK, torn)
    assert weights(torn) == weights(whole)
    assert untimed(torn) == untimed(whole)
    assert dataclasses.replace(resumed, seconds=cost.seconds) == cost
    assert not (torn / "checkpoint").exists()


def test_the_method_trains_with_the_engine_that_the_learner_names(tmp_path):
    method = METHODS.build({"name": "modpo", "labels": "hard"})
    grpo = {"trainer": "grpo", "kl_in": "loss", "kl_estimator": "k3", "ratio": "token", "epochs": 1}
    for learner in (Trl(**SMALL, settings={"dataset_num_proc": 1}), Trl(**SMALL, **grpo), TrlModpo(**SMALL)):
        spec = method.plan(TASK, learner, {}, 0)[0]
        assert (spec.learner["name"], spec.learner["labels"], spec.learner["samples"]) == ("trl-modpo", "hard", SMALL["samples"])
        assert spec.learner["settings"] == learner.settings
        assert isinstance(LEARNERS.build(spec.learner), TrlModpo)
    for learner in (PolicyGradient(**SMALL), quick_learner()):
        assert method.plan(TASK, learner, {}, 0)[0].learner["name"] == "modpo"
    with pytest.raises(ConfigError, match=r"(?s)labels='expected'.*method: \{name: modpo, labels: drawn\}"):
        METHODS.build("modpo").plan(TASK, Trl(**SMALL), {}, 0)


@pytest.mark.parametrize(
    ("fields", "essential"),
    [
        ({"labels": "expected"}, "needs a better response in every pair"),
        ({"trainer": "rloo"}, "learner trl-modpo, trainer='rloo'"),
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"epochs": 2}, "epochs=2"),
        ({"kl_in": "loss", "kl_estimator": "k3"}, "kl_in='reward'"),
        ({"normalize": "batch"}, "no advantages to normalize"),
        ({"micro_tokens": 100}, "use micro_batch"),
    ],
)
def test_what_it_cannot_be(fields, essential):
    with pytest.raises(ConfigError) as error:
        LEARNERS.build({"name": "trl-modpo", **SMALL, **fields})
    assert essential in str(error.value)


@pytest.mark.parametrize(
    ("spec", "fields", "essential"),
    [
        ({"preference": None}, {}, "one fresh adapter at one preference"),
        ({"preference": None}, {"labeled": 0}, "sampled preferences"),
        ({"preference": (0.0, 1.0)}, {"labeled": 0}, "must be above 0"),
        ({"frozen_adapters": ("a",)}, {}, "one fresh adapter at one preference"),
        ({"weighting": {"name": "exp3"}}, {}, "with the preference itself"),
        ({}, {"settings": {"beta": 0.3}}, "learner trl-modpo sets beta itself"),
        ({}, {"settings": {"use_vlm": True}}, "further arguments of DPOConfig"),
    ],
)
def test_trainings_that_it_refuses(spec, fields, essential, tmp_path):
    learner = TrlModpo(**SMALL, **fields)
    with pytest.raises(ConfigError) as error:
        learner.train(spec_of(learner, **spec), TASK, tmp_path)
    assert essential in str(error.value)


def test_it_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    learner = TrlModpo(**SMALL)
    with pytest.raises(ConfigError, match="2 processes"):
        learner.train(spec_of(learner), TASK, tmp_path)


def test_too_much_unscored_stops_it_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(ExactTask, "observe", lambda task, prompts, texts, *, streams: np.full((len(texts), 2), np.nan))
    learner = TrlModpo(**SMALL)
    with pytest.raises(RewardError, match="scores at least 90%"):
        learner.train(spec_of(learner), TASK, tmp_path)
    assert not (tmp_path / "train.jsonl").exists()
