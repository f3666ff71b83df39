"""What a running training leaves on disk: a checkpoint to resume from, its log, and the line that a person watches.

`checkpoint/<step>/` holds `state.safetensors` (parameters and optimizer moments), `state.json` and `DONE` with their hashes; a step's
directory appears by one rename, after everything in it and the log so far have reached the disk. One that is damaged, or whose log is, is
removed with a warning, and the training starts over. `train.jsonl` is cut back to the checkpoint on resume. When a training has ended,
its ledger gets the hashes of all that it left, and then the checkpoint goes. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import TrainingError
from paretune.files import (
    ASIDE,
    card_problems,
    changed,
    disk_errors,
    force,
    force_names,
    hashes_of,
    note,
    read_manifest,
    remove,
    seal,
)
from paretune.training.cost import FINISHED, LEDGER, LOG, Cost, write_cost
from paretune.training.spec import FOLDER

__all__ = [
    *("Progress", "TrainLog", "clear_checkpoint", "discard", "is_finished", "load_checkpoint", "log_damage", "mark_finished"),
    *("packed", "refuse_other", "save_checkpoint", "seal_damage", "unpacked"),
]

Progress = Callable[[Mapping[str, Any]], None]
"""Called with every record that goes to train.jsonl, plus `steps`, the number of steps planned."""

DONE = "DONE"


def save_checkpoint(
    work: Path,
    step: int,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    kept: Sequence[Tensor] | None = None,
) -> None:
    """Write `work/checkpoint/<step>` and drop older ones. `state` is JSON: everything that the next step depends on beside tensors.

    `kept` are other values of the parameters, which come back as `state["kept"]`.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {f"{i}.kept": tensor for i, tensor in enumerate(kept or ())}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}.parameter"] = parameter.detach()
        tensors.update({f"{i}.{name}": torch.as_tensor(value) for name, value in optimizer.state[parameter].items()})
    folder = work / FOLDER
    aside, final = folder / ".wip", folder / f"{step:08d}"
    with disk_errors(work):
        remove(aside)
        aside.mkdir(parents=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps(dict(state), allow_nan=False))
        seal(aside, DONE)
        aside.replace(final)
        force_names(folder)
        for other in folder.iterdir():
            if other != final:
                remove(other)


def load_checkpoint(
    work: Path, key: str, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, *, removes: bool = True
) -> dict[str, Any] | None:
    """Put the newest whole checkpoint into `parameters` and `optimizer` and return its state; None where there is none.

    A damaged one is removed, unless this process is one of several that only read (`removes`).
    Raises TrainingError for a checkpoint of another training (`state["key"]` is not `key`).
    """
    from safetensors.torch import load_file

    for found in sorted((work / FOLDER).glob("[0-9]*"), reverse=True):
        problems = seal_damage(found, DONE)
        state = {} if problems else json.loads((found / "state.json").read_text())
        if not problems:
            tensors = load_file(found / "state.safetensors")
            refuse_other(found, state["key"], key, same=len({name.split(".")[0] for name in tensors}) == len(parameters))
            problems = log_damage(work, state["log"])
        if not problems:
            break
        if removes:
            discard(found, problems)
    else:
        return None
    kept = [tensors.pop(f"{i}.kept").to(parameter.device) for i, parameter in enumerate(parameters) if f"{i}.kept" in tensors]
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors.pop(f"{i}.parameter"))
            moments = {name.split(".")[1]: value for name, value in tensors.items() if name.split(".")[0] == str(i)}
            optimizer.state[parameter] = {  # Adam keeps its count of steps on the CPU
                name: value if name == "step" else value.to(parameter.device) for name, value in moments.items()
            }
    return state | ({"kept": kept} if kept else {})


def packed(window: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What steps returned as strict JSON: an array with its type, NaN as None."""

    def pack(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        plain = value.astype(object)
        plain[np.isnan(value)] = None
        return {"dtype": str(value.dtype), "array": plain.tolist()}

    return [{name: pack(value) for name, value in step.items()} for step in window]


def unpacked(window: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The other way round, to the last bit."""

    def unpack(value: Any) -> Any:
        return np.array(value["array"], dtype=value["dtype"]) if isinstance(value, dict) and "dtype" in value else value

    return [{name: unpack(value) for name, value in step.items()} for step in window]


def refuse_other(place: Path, owner: str, key: str, *, same: bool = True) -> None:
    """TrainingError for a checkpoint of another training."""
    if owner != key or not same:
        raise TrainingError(
            "a training resumes from its own checkpoint",
            found=f"{place} belongs to {owner}, not to {key}",
            remedy=f"delete {place.parent}, or train in another directory",
        )


def seal_damage(folder: Path, name: str) -> list[str]:
    """What is not as it was when `folder` was sealed."""
    try:
        hashes = read_manifest(folder / name)
    except FileNotFoundError:
        return [f"{name}: missing"]
    return [f"{name}: damaged"] if hashes is None else changed(folder, hashes)


def discard(folder: Path, problems: Sequence[str]) -> None:
    """Remove a damaged checkpoint, and say so."""
    note(f"a damaged checkpoint is not resumed from: {folder}: {problems[0]}")
    with disk_errors(folder):
        remove(folder)


def mark_finished(work: Path, cost: Cost) -> None:
    """A training has written everything: force it to the disk, write the ledger with the hashes, and drop the checkpoint."""
    with disk_errors(work):
        force(work)
        found = [p for p in work.rglob("*") if p.is_file() and p.relative_to(work).parts[0] not in (LEDGER, FINISHED, FOLDER)]
        write_cost(work, cost, files=hashes_of(work, (p for p in found if not p.name.startswith(ASIDE))))
        remove(work / FINISHED)  # of an attempt that was damaged
        clear_checkpoint(work)


def clear_checkpoint(work: Path) -> None:
    """Drop it. It vanishes by one rename, so that half of one is never found."""
    with disk_errors(work):
        remove(work / FOLDER)


def is_finished(work: Path) -> bool:
    """True where a training ended, and all that it left is still what it was; where it is not, the training starts over."""
    card = next((work / name for name in (FINISHED, LEDGER) if os.path.lexists(work / name)), None)
    if card is None:
        return False
    problems = card_problems(card, must=True)
    if not problems:
        clear_checkpoint(work)
        return True
    note(f"a finished training is damaged and runs again: {work}: {problems[0]}")
    with disk_errors(work):
        remove(card)
    return False


class TrainLog:
    """Appends one JSON line per record to `work`/train.jsonl, first cut back to where `mark` was taken, and tells `progress`.

    `began` is when the training would have begun had it run without a break (`time.monotonic`); `tokens` were generated before.
    """

    def __init__(self, work: Path, *, mark: Mapping[str, Any] | None, began: float, tokens: int, progress: Progress | None):
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
            self._file = (work / LOG).open("a+b")
            self._file.truncate(mark["length"] if mark else 0)
            self._file.seek(0)
            written = self._file.read()
        self._hash = hashlib.sha256(written)
        self.records: list[dict[str, Any]] = [json.loads(line) for line in written.splitlines()]
        self._work, self._progress, self._began = work, progress, began
        self._last = (self.seconds, tokens)

    @property
    def seconds(self) -> float:
        """Wall time of this training, earlier runs of it included."""
        return time.monotonic() - self._began

    def mark(self) -> dict[str, Any]:
        """How much was written so far, and its hash, for `log_damage`; all of it is forced to the disk."""
        with disk_errors(self._work):
            self._file.flush()
            os.fsync(self._file.fileno())
        return {"length": self._file.tell(), "sha256": self._hash.hexdigest()}

    def write(self, record: Mapping[str, Any], *, steps: int) -> None:
        """`record` holds step, samples, tokens, and what else is worth a line; seconds and tokens_per_s are added."""
        before, tokens = self._last
        self._last = (self.seconds, record["tokens"])
        speed = (record["tokens"] - tokens) / max(self._last[0] - before, 1e-9)
        full = {**record, "tokens_per_s": round(speed, 1), "seconds": round(self._last[0], 3)}
        line = (json.dumps(full) + "\n").encode()
        self.records.append(full)
        self._hash.update(line)
        with disk_errors(self._work):
            self._file.write(line)
            self._file.flush()
        if self._progress is not None:
            self._progress({**full, "steps": steps})

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def log_damage(work: Path, mark: Mapping[str, Any]) -> list[str]:
    """What is wrong with the part of the log that was written when `mark` was taken."""
    try:
        with (work / LOG).open("rb") as file:
            known = file.read(mark["length"])
    except OSError as error:
        return [] if not mark["length"] and isinstance(error, FileNotFoundError) else [f"{LOG}: {error.strerror}"]
    if len(known) < mark["length"]:
        return [f"{LOG}: {len(known)} of {mark['length']} bytes"]
    return [] if hashlib.sha256(known).hexdigest() == mark["sha256"] else [f"{LOG}: the content is not what was written"]
