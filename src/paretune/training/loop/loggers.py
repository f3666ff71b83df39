"""Loggers of other projects: TensorBoard, trackio, and Weights & Biases get every figure and response of a training's log.

`report_to` of a learner names them, as TRL spells it. What is sent is what goes to train.jsonl; a run that is watched is the same training,
with the same key. Of a `Reporter` everything else sees a `Progress` callback.

Each is told where it got to: ROOT/logs/report_to/<key>.json holds the last step that it has. A training that was killed and goes on from a
checkpoint makes some lines of its log again, and those are not sent again; lines that one has not, because it was named later, are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from paretune.errors import ConfigError, nearest, raised_by, shown
from paretune.files import disk_errors, note, write_json
from paretune.training.cost import LOG
from paretune.types import last_words

__all__ = ["LOGGERS", "Logger", "Loggers", "Reporter", "figures_of", "named_loggers", "read_log", "reporting"]

PROJECT = "paretune"  # as trackio and W&B call a collection of runs


class Logger(ABC):
    """What one training is shown on: made at its first figure, in the process that trains."""

    @abstractmethod
    def __init__(self, folder: Path, *, key: str, label: str, config: Mapping[str, Any]):
        """`folder` is ROOT/logs; `config` the TrainSpec as JSON."""

    @abstractmethod
    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Numbers by name, such as rewards/polite."""

    @abstractmethod
    def responses(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Responses to fixed prompts, each with its prompt."""

    @abstractmethod
    def close(self) -> None:
        """The training has ended, or was stopped."""


class TensorBoard(Logger):
    """Event files under ROOT/logs/tensorboard: `tensorboard --logdir ROOT/logs/tensorboard`."""

    def __init__(self, folder: Path, *, key: str, label: str, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._to = SummaryWriter(str(folder / "tensorboard" / f"{_plain(label)}-{key[:8]}"))

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._to.add_scalar(name, value, step)
        self._to.flush()

    def responses(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        for place, row in enumerate(rows):
            self._to.add_text(f"responses/{place}", "\n\n".join(f"**{name}**: {text}" for name, text in row.items()), step)
        self._to.flush()

    def close(self) -> None:
        self._to.close()


class Trackio(Logger):
    """A run of the project "paretune" in trackio's own folder (TRACKIO_DIR): `trackio show`."""

    def __init__(self, folder: Path, *, key: str, label: str, config: Mapping[str, Any]):
        import trackio

        self._module, name = trackio, f"{label} {key[:8]}"
        settings: dict[str, Any] = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        self._run = trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow", **settings)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def responses(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        self._run.log({"responses": self._module.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])}, step=step)

    def close(self) -> None:
        self._module.finish()


class WandB(Logger):
    """A run of the project WANDB_PROJECT, or "paretune". Without a key, and with WANDB_MODE=offline, in ROOT/logs for `wandb sync`."""

    def __init__(self, folder: Path, *, key: str, label: str, config: Mapping[str, Any]):
        os.environ.setdefault("WANDB_SILENT", "true")  # what it says of other packages heeds no setting of a run
        import wandb

        offline = not (os.environ.get("WANDB_MODE") or wandb.api.api_key)  # else it asks for one in the middle of a training
        self._table = wandb.Table
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(folder),
            id=key,
            name=label,
            config=dict(config),
            resume="allow",
            reinit="create_new",
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False),
        )

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def responses(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        self._run.log({"responses": self._table(columns=list(rows[0]), data=[list(row.values()) for row in rows])}, step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}  # the names are those of the packages


def named_loggers(given: str | Sequence[str]) -> tuple[str, ...]:
    """The loggers that `report_to` names, each once; ConfigError for one that is not known or not installed."""
    names = [given] if isinstance(given, str) else list(given)
    names = [] if names == ["none"] else names
    if unknown := [name for name in names if name not in LOGGERS]:
        raise ConfigError("report_to names loggers, or none", found=shown(unknown[0]), remedy=nearest(unknown[0], ["none", *LOGGERS]))
    for name in names:
        if importlib.util.find_spec(name) is None:
            remedy = f"pip install 'paretune[{name}]', or leave it out of report_to"
            raise ConfigError(f"report_to {name} needs the package {name}", found="not installed", remedy=remedy)
    return tuple(dict.fromkeys(names))


def _checked(given: str | tuple[str, ...]) -> str | tuple[str, ...]:
    named_loggers(given)
    return given


Loggers = Annotated[str | tuple[str, ...], AfterValidator(_checked)]  # of the field `report_to`


class Reporter:
    """A `Progress` callback that sends every record to the loggers of a training, and passes it on.

    A logger that fails, in opening or later, is warned of once, as the training's warnings are, and left alone; the training goes on.
    """

    def __init__(
        self,
        names: str | Sequence[str],
        *,
        work: Path,
        folder: Path,
        key: str,
        label: str,
        config: Mapping[str, Any],
        progress: Callable[[Mapping[str, Any]], None] | None = None,
    ):
        """`work` is where the training writes its log, `folder` ROOT/logs."""
        given = [] if names == "none" else [names] if isinstance(names, str) else list(names)  # checked where they were given
        self._waiting = {name: LOGGERS[name] for name in given}
        self._open: dict[str, Logger] = {}
        self._failed: dict[str, str] = {}
        self._work, self._folder, self._progress = work, folder, progress
        self._about: dict[str, Any] = {"key": key, "label": label, "config": config}
        self._state = folder / "report_to" / f"{key}.json"
        self._told: dict[str, int] = {}
        begun = (work / LOG).is_file() and (work / LOG).stat().st_size > 0
        if self._waiting and begun and self._state.is_file():
            with contextlib.suppress(ValueError, OSError):
                self._told = json.loads(self._state.read_text(encoding="utf-8"))

    def __call__(self, record: Mapping[str, Any]) -> None:
        self._failed = {}
        if (self._waiting or self._open) and "step" in record:
            self._send(record)
        if self._progress is not None:
            said = {**record.get("warnings", {}), **self._failed}
            self._progress({**record, "warnings": said} if said else record)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._failed = {}
        for name, logger in list(self._open.items()):
            with self._watched(name):
                logger.close()
        for text in self._failed.values():
            note(text)

    def _send(self, record: Mapping[str, Any]) -> None:
        earlier = [line for line in read_log(self._work) if line["step"] < record["step"]] if self._waiting else []
        for name in list(self._waiting):
            with self._watched(name):
                self._open[name] = self._waiting[name](self._folder, **self._about)
        self._waiting = {}
        for name in list(self._open):
            with self._watched(name):
                for line in (*earlier, record):
                    if line["step"] > self._told.get(name, -1):
                        _tell(self._open[name], line)
                        self._told[name] = line["step"]
        with disk_errors(self._folder):
            self._state.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._state, self._told)

    @contextlib.contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """What the logger prints is left out; where it fails, it is done with."""
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        except (Exception, SystemExit) as error:
            self._open.pop(name, None)
            self._failed[f"report_to {name}"] = f"{name} failed ({raised_by(error)}): it gets no more of this training, which goes on"


@contextlib.contextmanager
def reporting(learner: Any, spec: Any, work: Path, progress: Callable[[Mapping[str, Any]], None] | None) -> Iterator[Any]:
    """A callback that reports to what `learner` names: `progress` itself where a run made it, with its own label and folder.

    Where `train` is called directly it reports to `logs` beside `work`.
    """
    if isinstance(progress, Reporter) or learner.report_to == "none":
        yield progress
        return
    about: dict[str, Any] = {"key": spec.key, "label": learner.registered_name, "config": spec.to_json(), "progress": progress}
    with Reporter(learner.report_to, work=work, folder=work.resolve().parent / "logs", **about) as reporter:
        yield reporter


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """All numbers of a record of the log but its step, by their path: `rewards/polite`, `change/fluent/0`."""
    found: dict[str, float] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                collect(item, f"{name}/{key}" if name else str(key))
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                collect(item, f"{name}/{place}")
        elif isinstance(value, int | float):
            found[name] = float(value)

    left_out = ("step", "steps", "warnings", "looks", "responses")
    collect({key: value for key, value in record.items() if key not in left_out}, "")
    return found


def _tell(logger: Logger, record: Mapping[str, Any]) -> None:
    """A record, step by step: looks at validation prompts and responses have steps of their own, none later than the record's."""
    looks = [(look["step"], 0, figures_of({"look": {k: v for k, v in look.items() if k != "step"}})) for look in record.get("looks", ())]
    shown_ = [(one["step"], 1, one["answers"]) for one in record.get("responses", ())]
    for step, kind, content in sorted([*looks, *shown_, (record["step"], 2, figures_of(record))], key=lambda each: each[:2]):
        if kind == 1:
            logger.responses(step, [_row(answer) for answer in content])
        else:
            logger.figures(step, content)


def _row(answer: Mapping[str, Any]) -> dict[str, str]:
    return {"prompt": last_words(answer["prompt"]), "response": answer["response"]}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a training's log, whole lines only, also while it is written; none where there is no log."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / LOG).read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                found += [json.loads(line)] if line.endswith(b"\n") else []
    return found


def _plain(label: str) -> str:
    """A label as the name of a folder."""
    return "".join(c if c.isalnum() or c in ".-_" else "_" for c in label)[:120]
