"""Ray as an executor, on a cluster of this machine with two CPUs: the same numbers, whatever is killed, and a way out of every mistake."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from bench_fixture import Bench, all_gone, children, fakes_loaded, kill, results
from paretune.cli import app
from paretune.errors import ConfigError, StoreError, TrainingError
from paretune.runs.display import Display
from paretune.runs.executors import ray as ray_cluster
from paretune.runs.executors.ray import Ray, RayWorkers, Remote
from paretune.runs.jobs import CELL, Job, train_job
from paretune.runs.plan import next_wave
from paretune.runs.store import ARTIFACTS, Store
from paretune.runs.suite import fit, load_suite, members_of, run_suite
from test_cli import COMMANDS
from test_killed_suite import SUITE as REAL
from test_killed_suite import numbers

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SUITE = {
    "tasks": [{"name": "fake-task", "level": [0, 1]}],
    "methods": ["fake-method", {"name": "fake-method", "stages": 1}],
    "learner": {"name": "fake", "steps": 5, "pause": 0.05},
}
ENV = ("FAKE_LOG", "FAKE_LIGHT")
ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def quiet():
    """Ray's own files stay in the tests' folder, and in short paths: a socket's has 107 bytes."""
    folder = Path("/dev/shm") / f"rt{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # with it, Ray writes a token to the home directory
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture(scope="module")
def cluster(quiet, tmp_path_factory):
    """The address of a cluster that outlives its drivers, as a real one does; this process is connected to it."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_LIGHT", "1")
        patch.setenv("FAKE_LOG", str(tmp_path_factory.mktemp("outside")))
        patch.setenv("PYTHONPATH", os.pathsep.join(path or os.getcwd() for path in sys.path))
        head = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False}
        started = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
        yield started.address
    finally:
        ray.shutdown()
        started.shutdown()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "outside"))
    monkeypatch.setenv("FAKE_LIGHT", "1")
    with fakes_loaded(monkeypatch) as fakes:
        yield Bench(tmp_path, fakes)


def ray_workers() -> list[int]:
    """Ids of the processes that run our actors."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::Worker"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(true, limit=60.0):
    deadline = time.monotonic() + limit
    while not true():
        assert time.monotonic() < deadline, "not within the limit"
        time.sleep(0.01)


def test_real_trainings_on_ray_give_the_bytes_of_this_process_also_when_a_worker_is_killed(cluster, tmp_path):
    """A log with a step computed twice, or from elsewhere, would differ."""
    suite = {**REAL, "tasks": [{**REAL["tasks"][0], "rho": [-0.5]}], "methods": [{"name": "linear", "points": 3}]}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run_suite(suite, tmp_path / "here", executor="in-process", progress=False)
    finally:
        torch.set_num_threads(threads)
    root, killed = tmp_path / "ray", []

    def murder():
        def steps():
            return sum(path.read_text().count("\n") for path in root.glob("artifacts/.wip-*/train.jsonl"))

        wait_until(lambda: steps() >= 3, limit=120.0)
        killed.extend(ray_workers()[:1])
        kill(killed[0])

    thread = threading.Thread(target=murder)
    thread.start()
    summary = run_suite(suite, root, executor=Ray(address=cluster), workers=2, progress=False)
    thread.join()
    assert killed
    assert (summary.failed, summary.trained) == ([], 3)
    assert numbers(root) == numbers(tmp_path / "here")
    assert {json.loads(path.read_text())["threads"] for path in root.glob("*/*/env.json")} == {1}
    assert Store(root).check() == []
    assert not list(root.glob("*/.wip-*"))


def test_a_worker_lost_in_the_middle_of_a_job_costs_nothing(bench, cluster, tmp_path, capsys):
    bench.run(root=tmp_path / "here", **SUITE)
    (bench.outside / "log.txt").unlink()
    capsys.readouterr()
    bench.tell("once-1")  # SIGKILL before the fourth step of some training
    summary = bench.run(executor=Ray(address=cluster, env=ENV), **SUITE)
    assert (summary.failed, summary.count("new"), summary.trained) == ([], 4, 6)
    assert results(bench.root) == results(tmp_path / "here")
    assert bench.twice() == []
    assert sorted(line.split()[-1] for line in bench.log("complete")) == ["0"] * 5 + ["3"]
    assert "this goes to a log" in "".join(path.read_text() for path in (bench.root / "logs").glob("ray-*.log"))
    assert capsys.readouterr().out == "", "standard output is for results"
    wait_until(lambda: not bench.store.has_workers())


def test_a_killed_driver_is_followed_by_the_next_one(bench, cluster, tmp_path):
    """The cluster goes on; the driver's workers do not."""
    bench.run(root=tmp_path / "here", **SUITE)
    (bench.outside / "log.txt").unlink()
    for more in (3, 6):
        driver = bench.start(ray=cluster, **SUITE)
        assert bench.wait_for_steps(driver, more=more), driver.communicate()
        assert bench.store.has_workers()
        kill(driver.pid)
        driver.communicate()
        wait_until(lambda: not bench.store.has_workers())
        steps = len(bench.log("step"))
        assert bench.store.check() == [], "readers see only what is whole"
        time.sleep(0.2)
        assert len(bench.log("step")) == steps, "nobody computes without a driver"
    summary = bench.run(executor=Ray(address=cluster, env=ENV), **SUITE)
    assert summary.failed == []
    assert results(bench.root) == results(tmp_path / "here")
    assert bench.twice() == [], "no step was computed again"
    assert len({line.split()[1] for line in bench.log("complete")}) == 6
    assert len([line for line in bench.log("complete") if line.endswith(" from 0")]) <= 6


def test_ctrl_c_ends_the_workers_and_a_cluster_of_its_own_ends_with_its_driver(bench, cluster):
    slow = {"learner": {"name": "fake", "steps": 60, "pause": 0.1}}  # a cluster goes on for some seconds after a driver was killed
    for stop, code, address in ((signal.SIGINT, 130, cluster), (signal.SIGKILL, -9, "local")):
        driver = bench.start(ray=address, **slow)
        assert bench.wait_for_steps(driver, more=3), driver.communicate()
        ours = children(driver.pid)
        os.killpg(driver.pid, stop)  # as a terminal does it
        _, err = driver.communicate(timeout=60)
        assert driver.returncode == code, err
        if stop == signal.SIGINT:
            assert err.splitlines()[-1].startswith("stopped; finished work and checkpoints are kept in")
            assert "Traceback" not in err
        assert (address == "local") == bool(ours)
        assert all_gone(ours)
        wait_until(lambda: not bench.store.has_workers())
    assert list(bench.root.glob("artifacts/.wip-*/checkpoint/state.json"))
    assert bench.run(**slow).count("new") == 1
    assert bench.twice() == []


def test_failures_deaths_and_a_full_disk(bench, cluster):
    executor = Ray(address=cluster, env=ENV)
    bench.tell("fail-1", "die-2")
    few = {"seeds": [1, 2, 3], "methods": [{"name": "fake-method", "points": 1}]}
    summary = bench.run(executor=executor, **few)
    assert [row.status for row in summary.cells] == ["failed", "failed", "new"]
    records = {record["label"]: record for record in bench.store.failures(ARTIFACTS).values()}
    assert [record["error"] for label, record in records.items() if "seed=1" in label] == ["RewardError"]
    lost = [record for label, record in records.items() if "seed=2" in label]
    assert len(lost) == 1
    assert all("2 times, last with" in record["message"] for record in lost)
    assert all("--memory-per-job" in record["remedy"] for record in lost)
    bench.tell("full-2")
    with pytest.raises(StoreError, match="every checkpoint is kept"):
        bench.run(executor=executor, **few)
    bench.tell()
    assert bench.run(executor=executor, **few).failed == []
    assert bench.twice() == []


def test_progress_arrives_and_idle_workers_leave(bench, cluster, monkeypatch):
    """A worker is ended after every job here, and a new one does the next."""
    monkeypatch.setattr(ray_cluster, "IDLE", 0.0)
    for name in ("LOOK_EVERY", "PROGRESS_EVERY"):
        monkeypatch.setattr(ray_cluster, name, 0.05)
    suite = {"name": "s", "tasks": ["fake-task"], "learner": {"name": "fake", "pause": 0.2}, "methods": ["fake-method"], "seeds": [1]}
    (member,) = members_of(*load_suite(suite))
    jobs = [train_job(bench.store, spec) for spec in next_wave(member).values()]
    seen = []

    class Recorder(Display):
        def progress(self, job, record):
            seen.append((job.key, record["step"]))

    display = Recorder(cells=0)
    with bench.store.lock(), RayWorkers(bench.store, Ray(address=cluster, env=ENV), display=display) as executor:
        for job in jobs:
            executor.submit(job)
        assert sorted(outcome.job.key for outcome in executor.outcomes() if outcome.error is None) == sorted(job.key for job in jobs)
        assert list(executor.outcomes()) == []
    assert display.forecast.side_by_side == 2
    assert {key for key, _ in seen} == {job.key for job in jobs}
    assert len(seen) == len(set(seen)), "nothing is told twice"


def test_a_result_that_this_machine_does_not_see_yet_holds_nobody_up(bench, cluster, monkeypatch):
    """As NFS does it: the first training to end is hidden while the other one ends; hidden for good, it is an error."""
    suite = {"name": "s", "tasks": ["fake-task"], "learner": "fake", "methods": ["fake-method"], "seeds": [1]}
    (member,) = members_of(*load_suite(suite))
    jobs = [train_job(bench.store, spec) for spec in next_wave(member).values()]
    hidden, real = jobs[0].key, Store.artifact
    monkeypatch.setattr(Store, "artifact", lambda self, key: None if key == hidden else real(self, key))
    with bench.store.lock(), RayWorkers(bench.store, Ray(address=cluster, env=ENV), 1) as executor:
        for job in jobs:
            executor.submit(job)
        outcomes = executor.outcomes()
        assert next(outcomes).job.key == jobs[1].key
        assert executor._left() == 1
        hidden = None
        assert next(outcomes).job.key == jobs[0].key
        assert list(outcomes) == []
    monkeypatch.setattr(ray_cluster, "SEEN_WITHIN", 0.3)
    hidden = jobs[0].key
    with bench.store.lock(), RayWorkers(bench.store, Ray(address=cluster, env=ENV), 1) as executor:
        executor.submit(jobs[0])
        with pytest.raises(StoreError, match="what one machine publishes, all see"):
            list(executor.outcomes())


def test_a_family_is_fitted_on_ray(bench, cluster):
    family = fit("fake-task", "fake-method", learner="fake", root=bench.root, executor=Ray(address=cluster, env=ENV), progress=False)
    assert len(family.digests) == 2
    assert len(list((bench.root / "logs").glob("ray-*.log"))) >= 1


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"cpus_per_job": 64}, "64 CPU asked; machines: 2 CPU"),
        ({"gpus_per_job": 0.5}, "1 CPU, 0.5 GPU asked"),
        ({"memory_per_job": 1e4, "wait": 0.5}, "1e+04 GiB asked"),
    ],
)
def test_more_than_any_machine_has_is_refused(bench, cluster, asked, found):
    with pytest.raises(ConfigError, match="a job fits on one machine of the cluster") as refused:
        bench.run(executor=Ray(address=cluster, env=ENV, **asked))
    assert found in refused.value.found
    assert "--wait" in refused.value.remedy
    assert not bench.log("step")


def test_a_run_directory_that_workers_do_not_share_is_refused(bench, cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "write_json", lambda path, value: path.write_text("another directory of the same name"))
    with pytest.raises(StoreError, match="sees the run directory under the same path") as refused:
        bench.run(executor=Ray(address=cluster, env=ENV))
    assert "is another one there" in refused.value.found
    monkeypatch.undo()


def test_locks_that_do_not_reach_other_machines_are_refused(bench, cluster, monkeypatch):
    monkeypatch.setattr(Store, "has_workers", lambda self: False)
    with pytest.raises(StoreError, match="file locks of the run directory reach every machine"):
        bench.run(executor=Ray(address=cluster, env=ENV))
    assert not bench.log("step")


def test_a_machine_that_cannot_do_the_jobs_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "SHARED_WITHIN", 0.1)
    hello = {"root": str(tmp_path / "elsewhere"), "token": "t", "version": ray_cluster.paretune.__version__, "plugins": [], "env": {}}
    said = Remote().begin(hello)
    assert said["error"] == "StoreError"
    assert "ray.json: No such file or directory" in said["found"]
    assert "--root on a file system that all machines mount" in said["remedy"]
    said = Remote().begin({**hello, "version": "0.0.1"})
    assert said["rule"] == "all machines of a run have the same Paretune"
    assert "0.0.1 here" in said["found"]
    (tmp_path / "elsewhere" / "logs").mkdir(parents=True)
    (tmp_path / "elsewhere" / "logs" / "ray.json").write_text("t")
    said = Remote().begin({**hello, "plugins": [str(tmp_path / "plugin.py")]})
    assert said["rule"] == "every machine sees the plugins"
    monkeypatch.setitem(sys.modules, "paretune.runs.executors.ray", None)
    said = ray_cluster._worker()().begin(hello)
    assert said["rule"] == "Paretune is installed on every machine of the cluster"


def test_a_job_that_a_lost_machine_still_works_on_is_left_alone(bench, monkeypatch):
    (member,) = members_of(*load_suite({"name": "s", "tasks": ["fake-task"], "learner": "fake", "methods": ["fake-method"], "seeds": [1]}))
    job = train_job(bench.store, next(iter(next_wave(member).values())))
    monkeypatch.setattr(ray_cluster, "GONE_WITHIN", 0.2)
    with open(job.path, "r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        answer = Remote().run(str(job.path))
    assert "still holds" in answer["error"]["found"]
    assert not bench.log("step")
    assert Remote().run(str(job.path)) == {"error": None, "full": False}


@pytest.mark.parametrize(("address", "why"), [("nonsense", "neither local, auto"), ("ray://host", "neither"), ("127.0.0.1:1", "refused")])
def test_a_cluster_that_does_not_answer_is_refused(address, why, quiet, tmp_path):
    """In a process of its own: this one may be connected."""
    code = "import sys; from paretune.runs.executors.ray import _init; from paretune.errors import ParetuneError\n"
    code += "try: _init(sys.argv[1])\nexcept ParetuneError as error: print(error); sys.exit(error.exit_code)"
    env = {**os.environ, "RAY_TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("a Ray cluster answers at its address")
    assert why in done.stdout
    assert "ray start --head" in done.stdout


def test_what_ray_says_of_an_address_is_passed_on(monkeypatch):
    def init(**given):
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(ray_cluster, "_ray", lambda: SimpleNamespace(init=init))
    with pytest.raises(ConfigError, match="a Ray cluster answers at its address") as refused:
        ray_cluster._init("auto")
    assert refused.value.found == "auto: Could not find any running Ray instance."


def test_a_cluster_that_stops_answering_ends_the_run(monkeypatch):
    def wait(calls, **given):
        raise ray.exceptions.RaySystemError("the head is gone")

    monkeypatch.setattr(ray_cluster, "_ray", lambda: SimpleNamespace(wait=wait, exceptions=ray.exceptions))
    with pytest.raises(TrainingError, match="answers as long as the run lasts") as ended:
        ray_cluster._answered([object()])
    assert "the head is gone" in ended.value.found


class FakeRay:
    """Actors that answer at once, and a count of what the driver asks."""

    exceptions = ray.exceptions

    def __init__(self):
        self.counts, self.answers = Counter(), {}

    def wait(self, calls, *, num_returns, timeout):
        self.counts["wait"] += 1
        return calls[:num_returns], calls[num_returns:]

    def get(self, call):
        return self.answers.pop(call)

    def said(self, answer):
        call = object()
        self.answers[call] = answer
        return call

    def actor(self):
        run = SimpleNamespace(remote=lambda path, size: self.said({"error": None, "full": False}))
        return SimpleNamespace(run=run, last=SimpleNamespace(remote=lambda: self.counts.update(["last"]) or self.said(None)))

    def kill(self, actor):
        pass


def test_a_thousand_completions_are_not_served_one_by_one(tmp_path, monkeypatch):
    """All workers end at once, and a file server shows nothing of it for a while: then everything is handed over together."""
    fake, store, began = FakeRay(), Store(tmp_path), time.monotonic()
    monkeypatch.setattr(ray_cluster, "_ray", lambda: fake)
    monkeypatch.setattr(RayWorkers, "_connect", lambda self: None)
    monkeypatch.setattr(RayWorkers, "_look_for_room", lambda self: None)
    monkeypatch.setattr(RayWorkers, "_start", lambda self, log: ray_cluster._Place(log=log, ready=True, actor=fake.actor(), call=None))

    def shown(self, key):
        fake.counts["look"] += 1
        return tmp_path if time.monotonic() - began > 1.5 else None

    monkeypatch.setattr(Store, "cell", shown)
    count = 1000
    with RayWorkers(store, Ray(), count) as executor:
        for number in range(count):
            executor.submit(Job(kind=CELL, key=f"{number:020d}", label="a cell", task="a task", path=tmp_path / str(number)))
        keys = [outcome.job.key for outcome in executor.outcomes()]
    assert sorted(keys) == [f"{number:020d}" for number in range(count)]
    assert fake.counts["wait"] <= 20
    assert fake.counts["look"] <= 12 * count  # at once, and every LOOK_EVERY
    assert fake.counts["last"] <= 5 * count  # once a second
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "wrong",
    [{"cpus_per_job": 0}, {"gpus_per_job": 1.5}, {"gpus_per_job": -1}, {"memory_per_job": -1}, {"memory_per_job": 1e6}, {"wait": -1}],
)
def test_requests_that_no_cluster_serves_are_refused(bench, wrong):
    with pytest.raises(ConfigError, match="a share of one, or whole ones"):
        bench.run(executor=Ray(**wrong))


def test_ray_missing_names_the_extra(bench, monkeypatch):
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs Ray") as refused:
        bench.run(executor="ray")
    assert refused.value.remedy == 'pip install "paretune[ray]"'


def test_a_variable_that_is_not_set_here_cannot_be_passed(bench):
    with pytest.raises(ConfigError, match="a variable that workers get is set here"):
        bench.run(executor=Ray(env=("PARETUNE_NO_SUCH",)))


def test_options_of_ray_need_its_executor():
    for option, value in (("--gpus-per-job", "1"), ("--pass-env", "HOME"), ("--address", "auto")):
        for command in (["bench", "quick"], ["fit", "recipe.yaml"]):
            ran = CliRunner().invoke(app, [*command, option, value])
            assert ran.exit_code == 2
            assert f"{option} with --executor local" in ran.stderr


def test_options_reach_the_settings(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr("paretune.runs.suite.run_suite", lambda suite, root, **more: given.update(more) or sys.exit(0))
    options = "--executor ray --address auto --cpus-per-job 4 --gpus-per-job .5 --memory-per-job 16 --wait 60 --pass-env A --pass-env B"
    CliRunner().invoke(app, ["bench", "quick", "--workers", "3", *options.split()])
    assert given["executor"] == Ray("auto", cpus_per_job=4, gpus_per_job=0.5, memory_per_job=16.0, wait=60.0, env=("A", "B"))
    assert given["workers"] == 3


# docs/scale.md


def block(kind, mark):
    (found,) = [text for language, text in BLOCKS if language == kind and mark in text]
    return found


def test_the_example_of_the_page_runs(bench, cluster, monkeypatch, capsys):
    monkeypatch.chdir(bench.outside)
    Path("study.yaml").write_text(
        json.dumps({"name": "s", "tasks": ["fake-task"], "learner": "fake", "methods": ["fake-method"], "seeds": [1]})
    )
    exec(compile(block("python", "executor=Ray"), "docs/scale.md", "exec"), {})
    assert "suite s: 1 of 1 cells (0 were there), 2 trained" in capsys.readouterr().out


@pytest.mark.parametrize("mark", ["GPU-hours", "at rest"])
def test_the_arithmetic_of_the_page_gives_what_the_page_says(mark, capsys):
    exec(compile(block("python", mark), "docs/scale.md", "exec"), {})
    assert capsys.readouterr().out == block("text", mark)


def test_what_the_page_takes_from_results_is_there():
    quick = json.loads((ROOT / "benchmarks" / "results" / "quick.json").read_text())["cells"].values()
    stored = {cell["record"]["cost"]["total"]["storage_bytes"] for cell in quick if cell["record"]["method"]["name"] == "uniform"}
    assert stored == {278_528} == {4 * 69_632}
    decode = json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text())["figures"]
    assert f"costs {decode['logit_vs_plain_b16']:.2f} of the plain decoding speed" in PAGE
    assert f"one model {decode['gated_vs_plain_b16']:.2f}" in PAGE
    assert f"1 / {decode['logit_vs_plain_b16']:.3f}" in PAGE


def test_the_five_methods_need_six_trainings_a_seed():
    """Five at once, and the bridge's third after its experts."""
    named = re.search(r"Five methods \((.*?)\)", PAGE)[1]
    methods = [{"name": "linear", "points": 4} if name == "linear" else name for name in re.findall(r"`([\w-]+)`", named)]
    suite = {"name": "s", "tasks": ["exact-v1"], "learner": "pg", "methods": methods, "seeds": [0]}
    waves = {member.method.registered_name: next_wave(member) for member in members_of(*load_suite(suite))}
    assert len(waves) == 5
    specs = {key: spec for wave in waves.values() for key, spec in wave.items()}
    assert len(specs) == 5
    assert {spec.learner["samples"] for spec in specs.values()} == {40_000}
    assert len(waves["bridge"]) == 2


def test_commands_of_the_page_have_the_options_that_exist():
    lines = [line for _, text in BLOCKS for line in text.splitlines()] + re.findall(r"`([^`\n]+)`", PAGE)
    ours = [line.split("#")[0].split() for line in lines if line.startswith("paretune ")]
    assert len(ours) >= 6
    for _, command, *words in ours:
        options = {word for word in words if word.startswith("--")}
        assert options <= COMMANDS[command], command
    assert (
        set(re.findall(r"`(--[\w-]+)", PAGE)) - {"--block", "--address", "--max-restarts", "--rank", "--num_processes"} <= COMMANDS["bench"]
    )
