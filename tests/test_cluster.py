"""Processes that are killed: whatever is hit, and whenever, the next run ends with the bytes of an undisturbed one.

Deterministic where it matters: which process is hit, and when, is drawn from a seeded stream; what must hold, must hold always.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bench_fixture import Bench, alive, all_gone, children, fakes_loaded, kill, results
from paretune.errors import BusyError, RewardError, StoreError
from paretune.runs.executors.local import Workers, main
from paretune.runs.jobs import run_job, train_job
from paretune.runs.plan import next_wave
from paretune.runs.store import ARTIFACTS, CELLS
from paretune.runs.suite import fit, load_suite, members_of, run_suite
from paretune.seeds import generator

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

ONE = {"name": "s", "tasks": ["fake-task"], "learner": "fake", "methods": ["fake-method"], "seeds": [1]}
SUITE = {
    "tasks": [{"name": "fake-task", "level": [0, 1]}],
    "methods": ["fake-method", {"name": "fake-method", "stages": 1}, {"name": "fake-method", "points": 3}],
    "learner": {"name": "fake", "steps": 5, "pause": 0.02},
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "outside"))
    monkeypatch.setenv("FAKE_LIGHT", "1")
    with fakes_loaded(monkeypatch) as fakes:
        yield Bench(tmp_path, fakes)


def test_killed_at_random_moments(bench, tmp_path):
    bench.run(root=tmp_path / "undisturbed", **SUITE)
    expected = results(tmp_path / "undisturbed")
    trained = len(bench.log("complete"))
    (bench.outside / "log.txt").unlink()

    rng = generator(0, "whom to kill, and when")
    kills = {"driver": 0, "worker": 0}
    seen: list[int] = []
    driver = bench.start(**SUITE)
    while sum(kills.values()) < 5 and bench.wait_for_steps(driver, more=int(rng.integers(1, 4))):
        time.sleep(rng.uniform(0.0, 0.04))
        workers = children(driver.pid)
        seen += workers
        if workers and rng.random() < 0.4:
            kill(int(rng.choice(workers)))
            kills["worker"] += 1
            continue
        kill(driver.pid)
        kills["driver"] += 1
        driver.wait()
        assert all_gone(workers), "workers end with their driver"
        assert bench.store.check() == [], "readers see only what is whole"
        driver = bench.start(**SUITE)
    out, err = driver.communicate(timeout=120)
    assert driver.returncode == 0, err
    assert min(kills.values()) >= 1, kills
    summary = json.loads(out)
    if summary["failed"]:  # the same job lost its worker twice within one run: that is a failure, and tried again
        assert all("SIGKILL" in row["message"] for row in summary["cells"] + summary["trainings"] if row["status"] == "failed")
        bench.run(executor="local", **SUITE)
    assert results(bench.root) == expected
    assert bench.store.check() == []
    assert bench.twice() == [], "no step was computed again"
    assert len([line for line in bench.log("complete") if line.endswith(" from 0")]) <= trained
    assert len({line.split()[1] for line in bench.log("complete")}) == trained
    assert not list(bench.root.glob("*/.wip-*"))
    assert not any(alive(pid) for pid in seen)


def test_workers_give_the_same_bytes_as_this_process(bench, tmp_path):
    bench.run(root=tmp_path / "here", **SUITE)
    summary = bench.run(executor="local", **SUITE)
    assert (summary.count("new"), summary.trained) == (6, 8)  # 2 tasks x (2 shared vertices, 1 stage, 1 in the middle)
    assert results(bench.root) == results(tmp_path / "here")
    text = "".join(path.read_text() for path in (bench.root / "logs").glob("worker-*.log"))
    assert "this goes to a log" in text


def test_a_worker_that_dies_twice_fails_its_job_only(bench):
    bench.tell("die-2")
    summary = bench.run(executor="local", seeds=[1, 2])
    assert [row.status for row in summary.cells] == ["new", "failed"]
    records = bench.store.failures(ARTIFACTS)
    assert len(records) == 2
    assert all("exit code 3, 2 times" in record["found"] for record in records.values())
    bench.tell()
    assert bench.run(executor="local", seeds=[1, 2]).count("done") == 1


def test_failures_in_workers_are_those_of_this_process(bench):
    bench.tell("fail-1")
    summary = bench.run(executor="local", seeds=[1, 2])
    assert [row.status for row in summary.cells] == ["failed", "new"]
    (record, _) = bench.store.failures(ARTIFACTS).values()
    assert record["error"] == "RewardError"
    assert record["label"].startswith("fake at (")
    assert "fakes.py" in record["traceback"]
    assert set(bench.store.failures(CELLS)) == {summary.cells[0].key}
    with pytest.raises(RewardError, match="a reward is a number"):
        fit("fake-task", "fake-method", learner="fake", root=bench.root, seed=1, workers=2, progress=False)


def test_a_worker_killed_once_costs_nothing(bench):
    """Its job goes on from the checkpoint in another worker, within the same run."""
    bench.tell("once-1")
    summary = bench.run(executor="local", seeds=[1, 2])
    assert summary.failed == []
    assert bench.twice() == []
    assert sorted(line.split()[-1] for line in bench.log("complete")) == ["0", "0", "0", "3"]


def test_a_job_cut_short_before_its_rename_is_not_done_again(bench):
    """A worker killed between DONE and the rename: the next attempt, in the same run, only renames."""
    bench.run()
    key = bench.store.published(ARTIFACTS)[0]
    final = bench.root / ARTIFACTS / key
    final.rename(final.with_name(f".wip-{key}"))
    run_job(bench.root / "logs" / "jobs" / f"train-{key}.json")
    assert bench.store.published(ARTIFACTS)[0] == key
    assert bench.twice() == []
    assert len(bench.log("complete")) == 2


def test_workers_in_the_middle_of_a_long_step_end_with_their_driver(bench):
    """Nothing is read or written during the step, so no closed pipe tells them."""
    driver = bench.start(learner={"name": "fake", "pause": 60.0})
    deadline = time.monotonic() + 60
    while len(list(bench.root.glob("artifacts/.wip-*/checkpoint"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children(driver.pid)
    assert len(workers) == 2
    kill(driver.pid)
    assert all_gone(workers, limit=5.0)
    driver.communicate()


def test_full_disk_in_a_worker_stops_the_run(bench):
    bench.tell("full-1")
    with pytest.raises(StoreError, match="every checkpoint is kept"):
        bench.run(executor="local")
    assert bench.store.failures(ARTIFACTS) == {}
    bench.tell()
    assert bench.run(executor="local").count("new") == 1
    assert bench.twice() == []


def test_ctrl_c_stops_the_workers_and_keeps_the_checkpoints(bench):
    slow = {"learner": {"name": "fake", "steps": 12, "pause": 0.02}}
    driver = bench.start(**slow)
    assert bench.wait_for_steps(driver, more=3)
    workers = children(driver.pid)
    assert all(os.getpgid(worker) != driver.pid for worker in workers), "the terminal interrupts the driver alone, which stops the workers"
    with pytest.raises(BusyError, match=f"process {driver.pid} works on"):
        bench.run()
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does it
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert err.splitlines()[-1] == f"stopped; finished work and checkpoints are kept in {bench.root}: the same command goes on from there"
    assert "Traceback" not in err
    assert workers
    assert all_gone(workers)
    assert list(bench.root.glob("artifacts/.wip-*/checkpoint/state.json"))
    assert bench.run(**slow).count("new") == 1
    assert bench.twice() == []


@pytest.mark.parametrize("name", ["foo.json", "train-0123.json", "logs/jobs/foo.json"])
def test_a_file_that_is_no_job_is_refused_and_its_folder_left_alone(tmp_path, capsys, name):
    path = tmp_path / "mine" / "deep" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert main([str(path)]) == 2
    assert "a job is a file ROOT/logs/jobs/train-<key>.json" in capsys.readouterr().err
    assert not list(tmp_path.rglob(".lock"))


def test_a_job_runs_by_hand(bench, tmp_path):
    (member,) = members_of(*load_suite(ONE))
    specs = next_wave(member)
    jobs = [train_job(bench.store, spec) for spec in specs.values()]
    command = [sys.executable, "-m", "paretune.runs.executors.local", str(jobs[0].path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert bench.store.published(ARTIFACTS) == [jobs[0].key]
    assert bench.run().reused == 1

    bench.tell("fail-7")
    failing = train_job(bench.store, type(specs[jobs[0].key])(**{**specs[jobs[0].key].to_json(), "seed": 7}))
    done = subprocess.run([*command[:-1], str(failing.path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("a reward is a number")
    assert set(bench.store.failures(ARTIFACTS)) == {failing.key}
    assert subprocess.run(command[:-1], capture_output=True, timeout=60).returncode == 2


def test_idle_workers_prefer_the_task_that_they_have_loaded(bench):
    with Workers(bench.store, 1) as pool:
        members = members_of(*load_suite({**ONE, "tasks": SUITE["tasks"]}))
        jobs = [train_job(bench.store, spec) for member in members for spec in next_wave(member).values()]
        for job in (jobs[0], jobs[2], jobs[1], jobs[3]):
            pool.submit(job)
        assert [pool._next(task).key for task in (None, jobs[0].task, jobs[0].task, jobs[2].task)] == [job.key for job in jobs]


def test_nothing_to_do_starts_no_worker(bench):
    bench.run()
    (bench.root / "logs").rename(bench.root / "old-logs")
    assert run_suite(ONE, bench.root).count("done") == 1
    assert not (bench.root / "logs").exists()
