"""Several processes in one training: two learn what one learns, whatever one of them does to the others is said, and nothing is lost.

Two real processes over gloo, forked once for all comparisons. Adam, because Muon makes of a rounding another step: see docs/scale.md.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from learner_cases import SMALL, TASK, W, flat, log_of, moved, spec_of
from paretune.errors import ConfigError, RewardError
from paretune.objectives.base import refuse_unscored
from paretune.registry import LEARNERS, METHODS, describe
from paretune.runs import jobs
from paretune.runs.executors import launch
from paretune.runs.store import Store
from paretune.tasks.exact.task import ExactTask
from paretune.training import processes
from paretune.training.cost import TIMED, read_cost
from paretune.training.learners.modpo import Modpo
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.loop import checkpoint
from paretune.training.processes import joined, launched, ranks
from paretune.training.spec import Artifact
from paretune.types import Objectives
from processes import together

SAME = 1e-5
ADAM = {
    **SMALL,
    "optimizer": "adam",
    "micro_batch": 4,
    "samples": 36,
    "batch": 12,
    "log_every": 1,
}  # three prompts, of which two processes have 2 and 1
METHODS_RUN = ("bridge", "conditioned", "router", "distilled", "extended")
calls: list[str] = []  # of this process, one name per completion


@dataclass(frozen=True)
class Watched(ExactTask):
    """Looked at on its test prompts, with a guard; counts what it scores."""

    guards = Objectives(("first",), (0.0,), (1.0,))

    def validation(self):
        return self.prompts("test")

    def observe(self, prompts, completions, *, streams):
        calls.extend(["reward"] * len(completions))
        return super().observe(prompts, completions, streams=streams)

    def score_guards(self, prompts, completions):
        calls.extend(["guard"] * len(completions))
        return self.score(prompts, completions)[:, :1]


def as_task(kind):
    return kind(**{field.name: getattr(TASK, field.name) for field in fields(TASK)})


WATCHED = as_task(Watched)
LOOKED = {"validate_every": 2, "look_samples": 16, "step_kl": 1e-3, "lr": 0.05}
CASES = {
    "shared spreads, clipped": (PolicyGradient(**ADAM, normalize="batch", clip_norm=0.01), TASK, {}),
    "several epochs": (PolicyGradient(**{**ADAM, "epochs": 2, "lr": 0.1}), TASK, {}),
    "KL in the loss": (PolicyGradient(**{**ADAM, "micro_batch": 3}, kl_in="loss", kl_estimator="k3", length="token_mean"), TASK, {}),
    "balanced": (PolicyGradient(**ADAM), TASK, {"preference": None, "weighting": {"name": "balanced"}}),
    "gradients": (PolicyGradient(**ADAM), TASK, {"weighting": {"name": "gradient", "aggregator": "nash_mtl"}}),
    "returns": (PolicyGradient(**ADAM), TASK, {"weighting": {"name": "multipliers", "utility": {"name": "max-min"}}}),
    "one pass": (PolicyGradient(**{**ADAM, "micro_batch": None}), TASK, {}),
    "tokens": (PolicyGradient(**{**ADAM, "micro_batch": None, "micro_tokens": 24}), TASK, {}),
    "pairs": (Modpo(**ADAM), TASK, {}),
    "looks": (PolicyGradient(**{**ADAM, **LOOKED}), WATCHED, {}),
    "stops": (PolicyGradient(**ADAM, stop_cv=1.0, stop_window=2, validate_every=1, validation_samples=6), TASK, {}),
}


def _all(root):
    """Every case and method, in this process or in its share; what it scored in the case "looks"."""
    here = ranks()
    for name, (learner, task, more) in CASES.items():
        calls.clear()
        learner.train(spec_of(learner, task=task, **{"preference": W, **more}), task, root / name)
        if name == "looks":
            scored = list(calls)
    for name in METHODS_RUN:
        method, learner, done = METHODS.build(name), PolicyGradient(**ADAM), {}
        while wave := [spec for spec in method.plan(TASK, learner, done, 11) if spec.key not in done]:
            for spec in wave:
                folder = root / name / spec.key
                LEARNERS.build(spec.learner).train(spec, TASK, folder, parents=done)
                here.shared(None)  # process 0 has written it
                done[spec.key] = Artifact(spec.key, folder, spec)
    return scored


def _share(function, *given, timeout=60.0):
    store, rank, size = launched()
    with joined(rank, size, store, timeout=timeout):
        return function(*given)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders of one process and of two, and what each process scored."""
    torch.set_num_threads(1)
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    return one, two, [_all(one)], together(_share, _all, two)


def _apart(one, two):
    """The largest difference of any trained weight."""
    found = {path.relative_to(one): load_file(path) for path in sorted(one.rglob("*.safetensors"))}
    assert found
    other = {path.relative_to(two): load_file(path) for path in sorted(two.rglob("*.safetensors"))}
    assert set(found) == set(other)
    return max(float((found[path][name] - other[path][name]).abs().max()) for path in found for name in found[path])


@pytest.mark.parametrize("name", [*CASES, *METHODS_RUN])
def test_two_processes_learn_what_one_learns(both, name):
    one, two, _, scored = both
    assert isinstance(scored[0], list), scored[0]
    assert _apart(one / name, two / name) <= SAME


@pytest.mark.parametrize("name", CASES)
def test_the_log_and_the_cost_are_those_of_one_process(both, name):
    """Of the whole batch: a log of one process's half has other rewards, lengths and gaps."""
    one, two, *_ = both
    for ours, theirs in zip(log_of(one / name), log_of(two / name), strict=True):
        assert set(ours) == set(theirs)
        for field in set(ours) - set(TIMED):
            assert _numbers(ours[field]) == pytest.approx(_numbers(theirs[field]), rel=1e-3, abs=1e-5), field
    counted = [{k: v for k, v in read_cost(folder / name).to_json().items() if k != "seconds"} for folder in (one, two)]
    assert counted[0] == counted[1]


def _numbers(value):
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float | int) else []


def test_every_completion_is_scored_once(both):
    *_, alone, shared = both
    assert sorted([*shared[0], *shared[1]]) == sorted(alone[0])
    assert all(set(mine) == {"reward", "guard"} for mine in shared), "each has a part in both"


def _gradient(learner):
    """Of a batch that this process draws alone, as a part of those who are there."""
    policy, spec = moved(learner), spec_of(learner)
    batch = learner.collect(policy, TASK, spec, 0)
    store, rank, size = launched()
    with joined(rank, size, store, timeout=60):
        learner.gradient(policy, batch, beta=TASK.beta)
    return flat(policy)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("count", [2, 3])
def test_the_same_passes_give_the_same_bits(count):
    """Five passes over two or three processes: their gradients are added as one process adds them. Muon asks for no less."""
    learner = PolicyGradient(**{**SMALL, "batch": 20, "samples": 20}, micro_batch=4)
    policy, spec = moved(learner), spec_of(learner)
    learner.gradient(policy, learner.collect(policy, TASK, spec, 0), beta=TASK.beta)
    for found in together(_gradient, learner, count=count):
        np.testing.assert_array_equal(found, flat(policy))


# What goes wrong


@dataclass(frozen=True)
class Wrong(ExactTask):
    """From the third batch on, what one process scores comes to no end, or to none in time."""

    def observe(self, prompts, completions, *, streams):
        calls.append("batch")
        if len(calls) >= 3 and ranks().rank == 1:
            _does_wrong[0]()
        return super().observe(prompts, completions, streams=streams)


_does_wrong = [lambda: None]


def _train(how, learner, folder, timeout):
    calls.clear()
    _does_wrong[0] = how
    task = as_task(Wrong) if how else TASK
    _share(learner.train, spec_of(learner), task, folder, timeout=timeout)


def _raises():
    refuse_unscored(("first", "second"), [9, 0], 12, limit=0.1)


def _breaks():
    raise ZeroDivisionError("by zero")


def _dies():
    os.kill(os.getpid(), signal.SIGKILL)


def _sleeps():
    time.sleep(8)


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        (_raises, RewardError, "(in process 1)"),
        (_breaks, processes.TrainingError, "process 1: ZeroDivisionError: by zero"),
        (_dies, processes.Lost, "a process has ended, seen by process 0 of 2"),
        (_sleeps, processes.Late, "learner.processes_timeout"),
    ],
)
def test_process_0_says_what_another_did_and_nothing_is_lost(how, kind, said, tmp_path):
    """In one message, with its way out; then one process, and two, go on from the checkpoint to where an undisturbed training ends."""
    learner = PolicyGradient(**{**ADAM, "checkpoint_every": 1})
    first = together(_train, how, learner, tmp_path / "here", 3.0 if how is _sleeps else 60.0)[0]
    assert f"{kind.__module__}.{kind.__name__}: " in first.splitlines()[-3]
    assert said in "\n".join(first.splitlines()[-3:])
    assert first.splitlines()[-1].strip().startswith("remedy:")
    if how is _dies:
        learner.train(spec_of(learner), TASK, tmp_path / "whole")
        steps = [int(path.name) for path in (tmp_path / "here" / "checkpoint").iterdir()]
        assert steps == [2], "two steps were kept"
        subprocess.run(["cp", "-r", tmp_path / "here", tmp_path / "again"], check=True)
        learner.train(spec_of(learner), TASK, tmp_path / "here")
        assert together(_train, None, learner, tmp_path / "again", 60.0) == [None, None]
        assert _apart(tmp_path / "whole", tmp_path / "here") <= SAME
        assert _apart(tmp_path / "whole", tmp_path / "again") <= SAME


def _meet(waits, failing, timeout):
    """Exchange something after so many seconds, process by process; `failing` raises instead."""
    store, rank, size = launched()
    with joined(rank, size, store, timeout=timeout) as here:
        here.shared(None)
        time.sleep(waits[rank])
        if rank == failing:
            _breaks()
        here.gathered(rank)


def test_what_one_of_three_did_is_said_as_it_was():
    """The second meets the error of the third before process 0 does, and passes it on unchanged."""
    said = together(_meet, (1.5, 0, 0), 2, 60.0, count=3)[0]
    assert "found:  process 2: ZeroDivisionError: by zero\n" in said


def test_process_0_that_is_late_says_so():
    """The others give up while it scores or writes; none of them has ended, and to start the training again would not help."""
    said = together(_meet, (4.0, 0), None, 1.5)[0]
    assert "processes.Late: " in said
    assert "a process did not answer in time, seen by process 1 of 2" in said
    assert "learner.processes_timeout" in said


def _exchanging(cards):
    """Whether gradients go from GPU to GPU, where each process sees so many GPUs (which are none)."""
    mine = cards[int(os.environ["RANK"])]
    torch.cuda.device_count, torch.cuda.set_device = lambda: mine, lambda device: None
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    store, rank, size = launched()
    with joined(rank, size, store, timeout=20) as here:
        return here.on_device, here.gathered(rank)


def test_a_process_without_a_gpu_has_all_talk_over_gloo():
    """Such as a machine whose driver is too old for torch: NCCL in one of them would wait for the other."""
    assert together(_exchanging, (0, 1)) == [(False, [0, 1])] * 2


def _launched(path, other=None):
    if other is not None and os.environ["RANK"] == "1":
        here = jobs._installed()
        jobs._installed = lambda: {**here, "packages": {**here["packages"], "torch": other}}
    launch.launch(path)


def test_launched_processes_publish_once(tmp_path):
    """A job that needs parents, whose unkeyed settings hold; launched again, nothing is done."""
    learner = PolicyGradient(**ADAM, processes=2, log_samples=1)
    assert spec_of(learner).key == spec_of(PolicyGradient(**ADAM)).key, "the result is the same"
    store = Store(tmp_path)
    job = jobs.train_job(store, spec_of(learner), learner=learner)
    assert together(_launched, job.path) == [None, None]
    assert store.published("artifacts") == [job.key]
    assert store.check() == []
    before = (tmp_path / "artifacts" / job.key / "DONE").stat().st_mtime_ns
    assert together(_launched, job.path) == [None, None]
    assert (tmp_path / "artifacts" / job.key / "DONE").stat().st_mtime_ns == before
    assert any("responses" in line for line in log_of(tmp_path / "artifacts" / job.key))


LEFT = """
import os, sys
from pathlib import Path
from paretune.runs.executors import launch
launch.launch(Path(sys.argv[1]))
names = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
print("left:", [name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_thread_of_gloo_is_left_to_abort_a_process_that_ends(tmp_path):
    """In new processes: what is imported while there is a group would keep it."""
    job = jobs.train_job(Store(tmp_path), spec_of(learner := PolicyGradient(**ADAM)), learner=learner)
    (tmp_path / "left.py").write_text(LEFT)
    done = _by("torchrun", str(tmp_path / "left.py"), str(job.path))
    assert done.stdout.splitlines() == ["left: []", "left: []"], done.stderr


LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --standalone --nproc-per-node 2",
    # --multi_gpu, on a machine without one: with --cpu, accelerate starts one process unless MPI is there
    "accelerate": "-m accelerate.commands.launch --multi_gpu --gpu_ids 0,1 --num_processes 2 --main_process_port 0",
}


def _by(launcher, *what):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCHERS[launcher].split(), *what]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_peoples_launchers_start_two_processes(launcher, tmp_path):
    job = jobs.train_job(Store(tmp_path), spec_of(learner := PolicyGradient(**{**ADAM, "micro_batch": None})), learner=learner)
    done = _by(launcher, "-m", "paretune.launch", str(job.path))
    assert done.returncode == 0, done.stderr
    assert "2 processes do not share the backward" in done.stderr
    assert Store(tmp_path).published("artifacts") == [job.key]


def test_processes_that_see_different_files_are_refused(tmp_path):
    job = jobs.train_job(Store(tmp_path), spec_of(PolicyGradient(**ADAM)))
    for text in together(_launched, job.path, "0.1"):
        assert "the processes of a training see the same files and packages" in text
        assert "torch: " in text
        assert "0.1 in process 1" in text
    assert "files and packages" in Store(tmp_path).failures("artifacts")[job.key]["message"]


def _sees_damage(learner, folder):
    if os.environ["RANK"] == "1":
        checkpoint.seal_damage = lambda folder, name: ["state.json: damaged"]
    _share(learner.train, spec_of(learner), TASK, folder)


def test_only_process_0_removes_a_checkpoint(tmp_path):
    """Another one may see an earlier state of a network's file system: the training is refused, and goes on once it sees what is there."""
    learner = PolicyGradient(**{**ADAM, "checkpoint_every": 1})

    def interrupt(record):
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.train(spec_of(learner), TASK, tmp_path, progress=interrupt)
    for text in together(_sees_damage, learner, tmp_path):
        assert "the processes of a training see the same checkpoint" in text
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["00000001"]


def test_passes_that_are_too_few_are_said(tmp_path):
    learner = PolicyGradient(**{**ADAM, "micro_batch": 8})
    token = processes._here.set(processes.Ranks(0, 3))
    try:
        with (
            pytest.warns(UserWarning, match="a pass has 8 of 12 rows: 3 processes do not share the backward"),
            pytest.raises(ValueError, match="group"),
        ):
            learner.train(spec_of(learner), TASK, tmp_path)  # there is no group to talk to
    finally:
        processes._here.reset(token)


def _lonely():
    del os.environ["MASTER_ADDR"]
    return launched()


def test_a_launcher_says_where_the_others_are(capsys, tmp_path, monkeypatch):
    for text in together(_lonely):
        assert "MASTER_ADDR" in text
        assert "start them by torchrun" in text
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: sys.exit("stopped by the launcher"))
    monkeypatch.setenv("RANK", "0")
    assert launch.main([str(tmp_path / "none.json")]) == 2
    assert "a job is a file" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        launch.main([str(tmp_path / "none.json")])
    assert not capsys.readouterr().err, "process 0 has said it"
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    assert launch.main([str(tmp_path / "none.json")]) == 2
    assert "a job is a file" in capsys.readouterr().err, "process 0 has not: the file is on its machine"


def test_every_process_has_a_prompt():
    with pytest.raises(ConfigError, match="processes have a prompt of each batch at least") as caught:
        PolicyGradient(**{**SMALL, "batch": 8}, processes=3)
    assert "processes=3" in caught.value.found
    with pytest.raises(ConfigError, match="accelerate"):
        LEARNERS.build({"name": "trl", "processes": 2})


@pytest.mark.usefixtures("one_thread")
def test_a_started_process_that_is_killed_is_started_once_more(tmp_path, monkeypatch):
    """As `fit` does it: learner.processes starts the others; the training goes on from its checkpoint, and is published once."""
    children = []

    class Seen(subprocess.Popen):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            children.append(self)

    monkeypatch.setattr(processes.subprocess, "Popen", Seen)
    learner = PolicyGradient(**{**ADAM, "checkpoint_every": 1}, processes=2)
    store = Store(tmp_path)
    job = jobs.train_job(store, spec_of(learner), learner=learner)
    with pytest.warns(UserWarning, match="a process has ended.* it starts once more, from its last checkpoint"):
        jobs.run_job(job.path, progress=lambda record: children[0].kill())
    started = [child for child in children if "paretune.launch" in child.args]
    assert len(started) == 2
    assert started[0].returncode == -signal.SIGKILL
    assert store.published("artifacts") == [job.key]
    learner.train(spec_of(learner), TASK, tmp_path / "whole")
    assert _apart(tmp_path / "whole", tmp_path / "artifacts" / job.key) <= SAME
    assert describe(learner)["version"] == 4
    assert Path(tmp_path / "logs" / f"{job.path.stem}-process-1.log").exists(), "another worker's training has its own"
