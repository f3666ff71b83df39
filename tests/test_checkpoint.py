"""A training that is killed or interrupted: what is left, and that it goes on bitwise."""

import pytest

from learner_cases import SMALL, TASK, killed, log_of, spec_of, weights
from paretune.errors import TrainingError
from paretune.runs.display import progress_text
from paretune.training.cost import TIMED, read_cost
from paretune.training.learners.policy_gradient import PolicyGradient


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("when", "optimizer"), [(3, "muon"), (4, "adam"), (7, "muon")])
def test_a_killed_training_resumes_bitwise(tmp_path, when, optimizer):
    """SIGKILL before the checkpoint of its step is written (3, 4) and between two checkpoints (7)."""
    learner = PolicyGradient(
        **{**SMALL, "samples": 160, "log_every": 1, "checkpoint_every": 2}, stop_cv=1e-9, validate_every=3, optimizer=optimizer
    )
    spec = spec_of(learner)
    learner.train(spec, TASK, tmp_path / "whole")

    killed(learner, spec, TASK, tmp_path / "killed", when)
    left = [p.name for p in (tmp_path / "killed" / "checkpoint").iterdir()]
    assert f"{(when - 1) // 2 * 2:08d}" in left
    steps = []
    learner.train(spec, TASK, tmp_path / "killed", progress=lambda record: steps.append(record["step"]))
    assert steps == list(range((when - 1) // 2 * 2 + 1, 11)), "nothing is trained twice but what was after the checkpoint"
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    whole, resumed = log_of(tmp_path / "whole"), log_of(tmp_path / "killed")
    assert [{k: v for k, v in x.items() if k not in TIMED} for x in resumed] == [
        {k: v for k, v in x.items() if k not in TIMED} for x in whole
    ]
    assert read_cost(tmp_path / "killed").samples == 160


def test_ctrl_c_keeps_the_checkpoint_and_another_training_is_not_resumed_from_it(tmp_path):
    learner = PolicyGradient(**SMALL)

    def interrupt(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.train(spec_of(learner), TASK, tmp_path, progress=interrupt)
    assert (tmp_path / "checkpoint" / "00000002" / "state.safetensors").is_file()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(TrainingError, match="resumes from its own checkpoint"):
        learner.train(spec_of(learner, (0.5, 0.5)), TASK, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]


def test_the_line_that_a_person_watches():
    record = {"step": 1, "steps": 2, "rewards": {"polite": 0.5, "brief": None}, "kl": 0.25, "tokens_per_s": 5310.0}
    assert progress_text(record) == "polite 0.500 brief ? | KL 0.250 | 5,310 tokens/s"
