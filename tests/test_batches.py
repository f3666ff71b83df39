"""Which prompts and which streams a batch has, and which policy it comes from."""

import numpy as np
import pytest
import torch

from learner_cases import SMALL, TASK, moved, spec_of
from paretune.training.batch import draw, prompt_order
from paretune.training.learners.policy_gradient import PolicyGradient


def test_prompts_come_round_in_a_seeded_order():
    order = prompt_order(1, 0, 12, 4)
    assert all(sorted(order[i : i + 4]) == [0, 1, 2, 3] for i in (0, 4, 8))
    assert order[3:9] == prompt_order(1, 3, 6, 4), "the order does not depend on where batches begin"
    assert order != prompt_order(2, 0, 12, 4)


def test_a_prompt_that_comes_twice_in_a_batch_gets_new_responses():
    learner = PolicyGradient(**SMALL)
    policy, spec = moved(learner), spec_of(learner)
    made = draw(policy, TASK, spec, step=0, first=0, prompts=40, group=2)
    order = np.array(prompt_order(spec.seed, 0, 40, 2)).repeat(2)
    rows = [tuple(row) for row in made.logp_NT[torch.from_numpy(order == 0)].numpy().round(6).tolist()]
    assert len(set(rows)) > 4, "40 copies of one response would mean shared streams"


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_it_samples_from_the_present_policy_and_leaves_the_base_weights_alone(monkeypatch, optimizer):
    """After every update: sampled log-probabilities are the scorer's, with merged weights and without, and the base comes back bitwise."""
    learner = PolicyGradient(**{**SMALL, "lr": 0.1}, optimizer=optimizer)
    policy, spec = moved(learner), spec_of(learner)
    base = [p.clone() for p in policy.model.parameters() if not p.requires_grad]
    steps = learner.new_optimizer(policy.bank.parameters())
    for step in range(3):
        batch = learner.collect(policy, TASK, spec, step)
        made = batch.responses
        with torch.no_grad():
            scored = learner.logp(policy, made, slice(0, learner.batch), gates_NK=made.gates_NK)
        torch.testing.assert_close((scored * made.mask_NT).double(), made.logp_NT, atol=1e-4, rtol=0)
        monkeypatch.setattr("paretune.training.batch.MERGE_LIMIT", 0)
        unmerged = learner.collect(policy, TASK, spec, step).responses
        monkeypatch.undo()
        assert unmerged.tokens_NT.tolist() == made.tokens_NT.tolist()
        torch.testing.assert_close(unmerged.logp_NT, made.logp_NT, atol=1e-4, rtol=0)
        learner.update(policy, steps, batch, beta=TASK.beta, step=step)
    monkeypatch.setattr("paretune.training.batch.generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learner.collect(policy, TASK, spec, 3)
    assert all(torch.equal(a, b) for a, b in zip(base, [p for p in policy.model.parameters() if not p.requires_grad], strict=True))
