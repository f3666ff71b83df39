"""Jobs: train one adapter, or measure one method on one task, from a JSON file to a published directory.

    ROOT/logs/jobs/train-<key>.json   {"kind": "train", "label", "plugins", "spec": a TrainSpec, "unkeyed": fields of the learner}
    ROOT/logs/jobs/cell-<key>.json    {"kind": "cell", "label", "plugins", "spec": {method, task, learner, seed, evaluation}, "waves"}

A worker, this process, and `python -m paretune.runs.executors.local FILE` by hand do the same and publish the same. A job that was done
before does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import platform
import subprocess
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import paretune
from paretune import errors
from paretune.errors import ConfigError, ParetuneError, StoreError, TrainingError, printable, redacted, refuse_exit
from paretune.files import disk_errors, is_disk_full, no_room, note, read_json, write_json
from paretune.objectives.terms import brief
from paretune.progress import State, heard
from paretune.registry import LEARNERS, METHODS, TASKS, describe, load_plugin, loaded_plugins, unkeyed
from paretune.runs.store import ARTIFACTS, CELL_FORMAT, CELLS, DONE, WIP, Store
from paretune.training.cost import as_if_alone, keep_finished, read_cost, write_cost
from paretune.training.loop.loggers import Reporter
from paretune.training.loop.watch import read_warnings
from paretune.training.spec import Artifact, TrainSpec
from paretune.types import Cost, canonical_json, key_of

if TYPE_CHECKING:
    from paretune.evaluation.evaluate import Evaluation

__all__ = [
    *("CELL", "KIND", "TRAIN", "Job", "Outcome", "Tasks", "as_error", "attempt", "cell_job", "evaluation_settings", "failure"),
    *("label_in", "label_of", "read_job", "run_job", "train_along", "train_job", "training_label", "waits"),
]

TRAIN, CELL = "train", "cell"
KIND = {TRAIN: ARTIFACTS, CELL: CELLS}  # where in the store
EVALUATION = 2  # raise when evaluating the same family would give other numbers: it is part of every cell's key
PACKAGES = (
    *("paretune", "numpy", "scipy", "torch", "transformers", "peft", "safetensors", "tokenizers"),
    *("moocore", "datasets", "accelerate", "trl"),
)

Progress = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """One file under ROOT/logs/jobs. Jobs with the same `task` share what a worker has loaded."""

    kind: str  # TRAIN or CELL
    key: str
    label: str
    task: str
    path: Path


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `error` is the content of FAILED.json, or None where it was done; `cause` the exception, where it is at hand."""

    job: Job
    seconds: float
    error: Mapping[str, Any] | None = None
    cause: BaseException | None = None


def train_job(store: Store, spec: TrainSpec, *, learner: Any = None) -> Job:
    """Write the job that trains `spec`; the fields of `learner` that no key knows (`registry.unkeyed`) hold for its own."""
    more = {"unkeyed": unkeyed(learner)} if learner is not None else {}
    return _write(store, TRAIN, spec.key, training_label(spec), spec.to_json(), **more)


def cell_job(store: Store, spec: Mapping[str, Any], label: str, waves: Sequence[Sequence[str]]) -> Job:
    """Write the job that measures a method whose trainings, the keys in `waves`, are published."""
    return _write(store, CELL, key_of(spec), label, dict(spec), waves=[list(wave) for wave in waves])


def _write(store: Store, kind: str, key: str, label: str, spec: Mapping[str, Any], **more: Any) -> Job:
    path = store.root / "logs" / "jobs" / f"{kind}-{key}.json"
    with disk_errors(store.root):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"kind": kind, "label": label, "plugins": loaded_plugins(), "spec": spec, **more})
    return Job(kind=kind, key=key, label=label, task=canonical_json(spec["task"]), path=path)


def evaluation_settings(splits: Sequence[str], samples: int) -> dict[str, Any]:
    """What a cell's key says about how it was measured."""
    return {"version": EVALUATION, "splits": list(splits), "samples": samples}


def label_of(description: Mapping[str, Any], registry: Any) -> str:
    """A short name for people: `exact-v1(rho=-0.8, seed=100)`: what differs from the class's defaults."""
    cls = registry[description["name"]]
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    changed = [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in description.items()
        if name in defaults and isinstance(value, str | int | float) and value != defaults[name]
    ]
    changed += [f"terms={brief(terms)}"] if (terms := description.get("terms")) else []
    return description["name"] + (f"({', '.join(changed)})" if changed else "")


def training_label(spec: TrainSpec) -> str:
    """`exact at (1, 0) on exact-v1(rho=-0.8, seed=100)`."""
    weights = "" if spec.preference is None else f" at ({', '.join(f'{w:.3g}' for w in spec.preference)})"
    seed = "" if "seed" in spec.task else f", seed {spec.seed}"
    return f"{spec.learner['name']}{weights} on {label_of(spec.task, TASKS)}{seed}"


class Tasks:
    """The last few tasks that were built, by description, so that tables and models are not made again for every job."""

    def __init__(self, keep: int = 3):
        self._keep = keep
        self._built: OrderedDict[str, Any] = OrderedDict()
        self._truths: dict[tuple[str, str], dict[str, Any]] = {}

    def put(self, task: Any) -> None:
        """Use this very instance for its description."""
        self._built[canonical_json(describe(task))] = task

    def get(self, description: Mapping[str, Any]) -> Any:
        name = canonical_json(description)
        if name not in self._built:
            self._built[name] = _rebuild(TASKS, description)
        self._built.move_to_end(name)
        while len(self._built) > self._keep:
            gone, _ = self._built.popitem(last=False)
            self._truths = {which: truth for which, truth in self._truths.items() if which[0] != gone}
        return self._built[name]

    def truth(self, description: Mapping[str, Any], splits: Sequence[str]) -> dict[str, Any]:
        """What is known about an exact task, for cell.json: {"fronts": split -> points, "verified": dials,
        "known": split -> line -> attainments}, None where a dial is unknown; empty where it is not exact."""
        from paretune.evaluation.metrics import plain

        task = self.get(description)
        if not task.is_exact:
            return {}
        which = (canonical_json(description), ",".join(splits))
        if which not in self._truths:
            lines = {split: {name: found_W.tolist() for name, found_W in task.known_W(task.judged(), split).items()} for split in splits}
            fronts = {split: _front(task, split) for split in splits}
            self._truths[which] = {"fronts": fronts, "verified": plain(task.verified()), "known": lines}
        return self._truths[which]


def read_job(path: Path) -> dict[str, Any]:
    """What the file says, with its plugins loaded."""
    job = read_json(path, rule="a job is a file that can be read", remedy="run the same command again, which writes it anew")
    for plugin in job["plugins"]:
        load_plugin(plugin)
    return job


@refuse_exit()
def run_job(path: Path, *, tasks: Tasks | None = None, progress: Progress | None = None, doing: Progress | None = None) -> None:
    """Do what the file says and publish it. Raises what went wrong; a full disk is always a StoreError.

    `progress` gets every record of a training's log, `doing` {"doing": what is loaded, searched or measured, n of m}.
    """
    store, tasks, state = Store(path.resolve().parents[2]), tasks or Tasks(), State()

    def hear(what: str, done: int, of: int) -> None:
        state.hear(what, done, of)
        if doing is not None and done < of:
            doing({"doing": state.text()})

    try:
        job = read_job(path)
        with heard(hear):
            if job["kind"] == TRAIN:
                _train(store, path, job, tasks, progress)
            else:
                _measure(store, job["spec"], job["waves"], tasks)
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, StoreError):
            raise no_room(store.root, error) from error
        raise


def attempt(path: Path, *, tasks: Tasks, progress: Progress) -> dict[str, Any]:
    """Do a job in a worker and say how it ended: {"error": content of FAILED.json or None, "full": was it the disk?}.

    `progress` gets what `run_job` tells both of its listeners.
    """
    try:
        run_job(path, tasks=tasks, progress=progress, doing=progress)
    except Exception as error:
        return {"error": failure(error, label=label_in(path)), "full": is_disk_full(error)}
    return {"error": None, "full": False}


def label_in(path: Path) -> str:
    """The label of the job in the file, or the file's name where it cannot be read."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["label"])
    except (OSError, ValueError, KeyError):
        return path.stem


def failure(error: BaseException, *, label: str = "") -> dict[str, Any]:
    """The content of FAILED.json."""
    parts = {"rule": error.rule, "found": error.found, "remedy": error.remedy} if isinstance(error, ParetuneError) else {}
    text = redacted("".join(traceback.format_exception(error)))
    record = {"label": label, "error": type(error).__name__, "message": redacted(str(error)) or "no message", **parts, "traceback": text}
    return {name: printable(said) for name, said in record.items()}  # half a surrogate pair cannot be written


def as_error(record: Mapping[str, Any], where: str) -> ParetuneError:
    """The error that a FAILED.json tells of, to be raised in another process; `where` is that file."""
    kind = getattr(errors, record["error"], None)
    if isinstance(kind, type) and issubclass(kind, ParetuneError) and "rule" in record:
        return kind(record["rule"], found=record["found"], remedy=record["remedy"])
    found = f"{record['error']}: {record['message']}"
    return TrainingError(f"{record['label'] or 'a job'} ends without an error", found=found, remedy=f"the traceback is in {where}")


def _train(store: Store, path: Path, job: Mapping[str, Any], tasks: Tasks, progress: Progress | None) -> None:
    from paretune.training.processes import Late, Lost, ranks, together  # loads torch

    spec = TrainSpec.from_json(job["spec"])
    store.recover(spec.key)
    if ranks().shared(store.artifact(spec.key) is not None):
        return
    with ranks().in_turn():
        learner, task, parents = _given(store, job, spec, tasks)
    work = store.begin(spec.key)
    with disk_errors(store.root):
        write_json(work / "spec.json", spec.to_json())
    about: dict[str, Any] = {"key": spec.key, "label": job["label"], "config": spec.to_json(), "progress": progress}
    for last in (False, True):
        try:
            with (
                together(path, count=getattr(learner, "processes", 1), **waits(learner)),
                Reporter(getattr(learner, "report_to", "none"), work=work, folder=store.root / "logs", **about) as reporter,
            ):
                cost = _agreed(learner, spec, task, parents, work, reporter)
            break
        except Lost as error:
            if last or isinstance(error, Late) or ranks().size > 1:
                raise
            note(f"{job['label']}: {error.found}; it starts once more, from its last checkpoint")
    if not cost.storage_bytes:
        cost = dataclasses.replace(cost, storage_bytes=sum(p.stat().st_size for p in work.glob("*.safetensors")))
    with disk_errors(store.root):
        write_json(work / "env.json", _environment())
        keep_finished(work)
        write_cost(work, cost)
    store.publish(work)


def train_along(path: Path) -> None:
    """This process's part of a training that it shares with another one, which is process 0 and does `run_job`. Writes nothing."""
    from paretune.training.processes import ranks

    store, job = Store(path.resolve().parents[2]), read_job(path)
    spec = TrainSpec.from_json(job["spec"])
    if ranks().shared(None):  # it was done before
        return
    with ranks().in_turn():
        learner, task, parents = _given(store, job, spec, Tasks())
    _agreed(learner, spec, task, parents, store.root / ARTIFACTS / (WIP + spec.key))


def waits(learner: Any) -> dict[str, Any]:
    """How long the processes of a training wait for each other, seconds, and where it is computed."""
    return {"timeout": getattr(learner, "processes_timeout", 1800.0), "device": getattr(learner, "device", "auto")}


def _given(store: Store, job: Mapping[str, Any], spec: TrainSpec, tasks: Tasks) -> tuple[Any, Any, dict[str, Artifact]]:
    """The learner, the task and the parents of a training."""
    task, learner = tasks.get(spec.task), _rebuild(LEARNERS, spec.learner)
    has = unkeyed(learner)
    learner = dataclasses.replace(learner, **{name: value for name, value in job.get("unkeyed", {}).items() if name in has})
    return learner, task, _artifacts(store, spec.parents)


def _agreed(
    learner: Any, spec: TrainSpec, task: Any, parents: Mapping[str, Artifact], work: Path, progress: Progress | None = None
) -> Cost:
    """Train, once all processes have found the same: what is hashed in the spec was compared when the task was built."""
    from paretune.training.processes import ranks

    if (here := ranks()).size > 1:
        found = {f"the training {key}": (parent.path / DONE).read_text(encoding="utf-8") for key, parent in parents.items()}
        here.agree("files and packages", {"the training": spec.key, **found, **_installed()["packages"]})
    return learner.train(spec, task, work, parents=parents, progress=progress)


def _measure(store: Store, spec: Mapping[str, Any], waves: Sequence[Sequence[str]], tasks: Tasks) -> None:
    from paretune.evaluation.evaluate import evaluate  # loads torch: a driver, and a worker before its first job, do without

    key, seconds = key_of(spec), {}
    store.recover(key, CELLS)
    if store.cell(key) is not None:
        return
    start = time.perf_counter()
    task, method, learner = tasks.get(spec["task"]), _rebuild(METHODS, spec["method"]), _rebuild(LEARNERS, spec["learner"])
    truth = tasks.truth(spec["task"], spec["evaluation"]["splits"])
    seconds["task"] = time.perf_counter() - start
    done = _artifacts(store, [k for wave in waves for k in wave])
    family = method.policy(task, learner, done, spec["seed"])
    seconds["policy"] = time.perf_counter() - start - seconds["task"]
    settings = spec["evaluation"]
    measured = evaluate(task, family, splits=settings["splits"], samples=settings["samples"], seed=spec["seed"])
    seconds["evaluation"] = time.perf_counter() - start - seconds["policy"] - seconds["task"]
    costs = {k: read_cost(artifact.path) for k, artifact in done.items()}
    ledger = as_if_alone([[costs[k] for k in wave] for wave in waves], measured.cost)
    work = store.begin(key, CELLS)
    record = {
        "format": CELL_FORMAT,
        **spec,
        "card": dataclasses.asdict(method.card),
        "metrics": measured.metrics,
        **truth,
        "trainings": list(done),
        "warnings": said_of(done),
        "waves": waves,
        "forwards_per_token": family.policy.forwards_per_token,
        "cost": {kind: cost.to_json() for kind, cost in {**ledger, "search": measured.cost}.items()},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    with disk_errors(store.root):
        write_json(work / "cell.json", record)
        write_json(work / "env.json", _environment())
        _write_curves(work / "curve.npz", measured)
    store.publish(work)


def said_of(done: Mapping[str, Artifact]) -> dict[str, str]:
    """Kind -> text of what was warned of while these trainings ran, the first of each kind."""
    found: dict[str, str] = {}
    for artifact in done.values():
        found = {**read_warnings(artifact.path), **found}
    return found


def _write_curves(path: Path, measured: Evaluation) -> None:
    """`<split>.<field of Curve>` for every split; only arrays, so that reading needs no pickle."""
    arrays = {}
    for split, curve in measured.curves.items():
        fields = {f.name: getattr(curve, f.name) for f in dataclasses.fields(curve) if f.name != "split"}
        arrays.update({f"{split}.{name}": np.asarray(value) for name, value in fields.items()})
    assert not any(array.dtype.hasobject for array in arrays.values())
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _front(task: Any, split: str) -> dict[str, Any]:
    front = task.front(split)
    reference_M = task.J_M(task.reference_logp_PR(split), split)
    return {"points": front.points_KM.tolist(), "w": front.w_KM.tolist(), "reference": reference_M.tolist(), "proof": front.proof}


def _rebuild(registry: Any, description: Mapping[str, Any]) -> Any:
    """The instance, refused where it no longer is what the description says (another version, or a file that changed since)."""
    built = registry.build(description)
    now = json.loads(canonical_json(describe(built)))
    if now != description:
        changed = [name for name in {**description, **now} if description.get(name) != now.get(name)]
        raise ConfigError(
            f"a {registry.kind} stays what it was when the run began",
            found=f"{description['name']}: other {', '.join(changed)}",
            remedy="run the same command again: what changed gets its own name, and nothing is mixed",
        )
    return built


def _artifacts(store: Store, keys: Sequence[str]) -> dict[str, Artifact]:
    found = {key: store.artifact(key) for key in keys}
    missing = [key for key, artifact in found.items() if artifact is None]
    if missing:
        raise StoreError(
            "a job's trainings are finished before it starts",
            found=f"no {store.root / ARTIFACTS / missing[0]}",
            remedy="run the suite, which trains them first",
        )
    return {key: artifact for key, artifact in found.items() if artifact is not None}


def _environment() -> dict[str, Any]:
    """What a result depends on beside its spec. No host names and no paths."""
    torch: Any = sys.modules.get("torch")
    device = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else platform.machine()
    return {**_installed(), "device": device, "threads": torch.get_num_threads() if torch else 1}


@functools.cache
def _installed() -> dict[str, Any]:
    packages: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {"python": platform.python_version(), "platform": platform.system(), **_commit(), "packages": packages}


def _commit() -> dict[str, Any]:
    """The commit of the checkout that Paretune runs from, and whether it was changed since; None where it is installed."""
    checkout = Path(paretune.__file__).parents[2]
    if not (checkout / ".git").exists():
        return {"commit": None}
    git = functools.partial(subprocess.run, cwd=checkout, capture_output=True, text=True, timeout=20)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        # Without the lock: a job that is killed in the middle would leave it behind, and block every commit.
        changed = bool(git(["git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no"]).stdout.strip())
    except (OSError, subprocess.SubprocessError):
        return {"commit": None}
    return {"commit": commit or None, "changed": changed}
