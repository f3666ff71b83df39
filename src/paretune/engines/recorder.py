"""What a training by TRL leaves behind while it runs: the lines of train.jsonl, and which of its checkpoints are whole."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.checkpoint import FOLDER, TrainLog
from paretune.engines.drop_in import STATE, MultiObjectiveReward
from paretune.errors import TrainingError
from paretune.policy_gradient import CHECKPOINT_SECONDS, _not_finite
from paretune.store import write_json
from paretune.tasks import Task
from paretune.types import TrainSpec

__all__ = ["newest", "recorder"]

MARK = "paretune.json"  # in a checkpoint of TRL's: it is whole


@dataclass
class _Done:
    """What a line of the log says of the training so far; see `PolicyGradient._record`."""

    step: int
    samples: int
    tokens: int
    validations: tuple[float, ...] = ()


def recorder(learner: Any, spec: TrainSpec, task: Task, work: Path, reward: MultiObjectiveReward, progress: Any, world: int) -> Any:
    """A callback that writes train.jsonl as the embedded learner does, and says when a checkpoint is whole."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.log: TrainLog | None = None
            self.kl = 0.0  # nats per response, of the newest batch
            self.window: list[dict[str, Any]] = []
            self.began = self.saved = time.monotonic()

        @property
        def seconds(self) -> float:
            return time.monotonic() - self.began

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kept = {"log_length": 0, "seconds": 0.0}
            if state.global_step:
                kept = json.loads((work / FOLDER / f"checkpoint-{state.global_step}" / MARK).read_text())
                if STATE in state.stateful_callbacks:
                    reward.load_state_dict(state.stateful_callbacks[STATE])
            self.began -= kept["seconds"]
            if state.is_world_process_zero:
                length, path = int(kept["log_length"]), work / "train.jsonl"
                self.log = TrainLog(path, length=length, began=self.began, tokens=reward.tokens, progress=progress)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "grad_norm" not in logs:
                return
            loss, norm, step = float(logs["loss"]), float(logs["grad_norm"]), state.global_step // learner.epochs
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _not_finite(f"loss {loss:g}, gradient norm {norm:g}", state.global_step, learner.lr)
            kl = learner.logged_kl(logs, spec, task)
            self.kl = self.kl if kl is None else kl
            if state.global_step % learner.epochs:
                return
            self.window.append({"rewards_NM": reward.rewards_NM, "kl": self.kl, "loss": loss, "gradient_norm": norm})
            if step == learner.steps or step % learner.log_every == 0:
                done: Any = _Done(step, reward.samples, reward.tokens)
                if self.log is not None:
                    self.log.write(learner._record(task, done, self.window), steps=learner.steps)
                self.window = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            late = time.monotonic() - self.saved > CHECKPOINT_SECONDS
            if world == 1 and late and state.global_step % learner.epochs == 0:  # several processes would not agree on the time
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.saved = time.monotonic()
            if self.log is not None:
                mark = {"key": spec.key, "log_length": self.log.length, "seconds": self.seconds}
                write_json(work / FOLDER / f"checkpoint-{state.global_step}" / MARK, mark)

        def close(self) -> None:
            if self.log is not None:
                self.log.__exit__()

    return Recorder()


def newest(work: Path, key: str) -> Path | None:
    """The newest whole checkpoint of this training."""
    found = sorted((work / FOLDER).glob(f"checkpoint-*/{MARK}"), key=lambda mark: int(mark.parent.name.split("-")[1]))
    if not found:
        return None
    other = json.loads(found[-1].read_text())["key"]
    if other != key:
        raise TrainingError(
            "a training resumes from its own checkpoint",
            found=f"{found[-1].parent} belongs to {other}, not to {key}",
            remedy=f"delete {work / FOLDER}, or train in another directory",
        )
    return found[-1].parent
