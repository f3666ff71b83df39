"""What a running training leaves on disk: a checkpoint to resume from, its log, and the line that a person watches.

`checkpoint/<step>/` holds `state.safetensors` (parameters and optimizer moments) and `state.json`; a step's directory appears by one
rename, so one that exists is whole. `train.jsonl` is cut back to the checkpoint on resume. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paretune.errors import TrainingError

__all__ = ["Progress", "TrainLog", "clear_checkpoint", "is_finished", "load_checkpoint", "progress_text", "refuse_other", "save_checkpoint"]

Progress = Callable[[Mapping[str, Any]], None]
"""Called with every record that goes to train.jsonl, plus `steps`, the number of steps planned."""

FOLDER = "checkpoint"


def save_checkpoint(
    work: Path, step: int, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Write `work/checkpoint/<step>` and drop older ones. `state` is JSON: everything that the next step depends on beside tensors."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}.parameter"] = parameter.detach()
        tensors.update({f"{i}.{name}": torch.as_tensor(value) for name, value in optimizer.state[parameter].items()})
    folder = work / FOLDER
    aside = folder / ".wip"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside / "state.safetensors")
    (aside / "state.json").write_text(json.dumps(dict(state), allow_nan=False))
    for file in aside.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    aside.replace(folder / f"{step:08d}")
    for old in sorted(folder.glob("[0-9]*"))[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(work: Path, key: str, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put the newest checkpoint into `parameters` and `optimizer` and return its state; None where there is none.

    Raises TrainingError for a checkpoint of another training (`state["key"]` is not `key`).
    """
    from safetensors.torch import load_file

    found = sorted((work / FOLDER).glob("[0-9]*"))
    if not found:
        return None
    state = json.loads((found[-1] / "state.json").read_text())
    tensors = load_file(found[-1] / "state.safetensors")
    refuse_other(found[-1], state["key"], key, same=len({name.split(".")[0] for name in tensors}) == len(parameters))
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors.pop(f"{i}.parameter"))
            moments = {name.split(".")[1]: value for name, value in tensors.items() if name.split(".")[0] == str(i)}
            optimizer.state[parameter] = {  # Adam keeps its count of steps on the CPU
                name: value if name == "step" else value.to(parameter.device) for name, value in moments.items()
            }
    return state


def refuse_other(place: Path, owner: str, key: str, *, same: bool = True) -> None:
    """TrainingError for a checkpoint of another training."""
    if owner != key or not same:
        raise TrainingError(
            "a training resumes from its own checkpoint",
            found=f"{place} belongs to {owner}, not to {key}",
            remedy=f"delete {place.parent}, or train in another directory",
        )


def clear_checkpoint(work: Path) -> None:
    """Drop it: the training is finished and everything is written. It vanishes by one rename, so that half of one is never found."""
    aside = work / f".{FOLDER}"
    shutil.rmtree(aside, ignore_errors=True)
    if (work / FOLDER).is_dir():
        (work / FOLDER).replace(aside)
        shutil.rmtree(aside, ignore_errors=True)


def is_finished(work: Path) -> bool:
    """True where a training wrote its ledger and dropped its checkpoint."""
    if not (work / "ledger.json").is_file() or (work / FOLDER).is_dir():
        return False
    clear_checkpoint(work)
    return True


class TrainLog:
    """Appends one JSON line per record to `path`, first cut back to its first `length` bytes, and tells `progress`.

    `began` is when the training would have begun had it run without a break (`time.monotonic`); `tokens` were generated before.
    """

    def __init__(self, path: Path, *, length: int, began: float, tokens: int, progress: Progress | None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(length)
        self._progress, self._began = progress, began
        self._last = (self.seconds, tokens)

    @property
    def seconds(self) -> float:
        """Wall time of this training, earlier runs of it included."""
        return time.monotonic() - self._began

    @property
    def length(self) -> int:
        """Bytes written, on disk."""
        self._file.flush()
        return self._file.tell()

    def write(self, record: Mapping[str, Any], *, steps: int) -> None:
        """`record` holds step, samples, tokens, and what else is worth a line; seconds and tokens_per_s are added."""
        before, tokens = self._last
        self._last = (self.seconds, record["tokens"])
        speed = (record["tokens"] - tokens) / max(self._last[0] - before, 1e-9)
        full = {**record, "tokens_per_s": round(speed, 1), "seconds": round(self._last[0], 3)}
        self._file.write((json.dumps(full) + "\n").encode())
        self._file.flush()
        if self._progress is not None:
            self._progress({**full, "steps": steps})

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def progress_text(record: Mapping[str, Any]) -> str:
    """`polite .61 brief .40 | KL .52 | 5,310 tokens/s` from a record of the log."""
    rewards = " ".join(f"{name} {'?' if value is None else format(value, '.3f')}" for name, value in record["rewards"].items())
    return f"{rewards} | KL {record['kl']:.3f} | {record['tokens_per_s']:,.0f} tokens/s"
