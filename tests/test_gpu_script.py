"""`benchmarks/gpu.py` on a CPU: that it runs, also beside torch and transformers alone, and that its figures are the right ones.

What only a GPU can tell is not here. `Late` is a device that works on while Python goes on, with a clock of its own: who does not wait for
it reads no time at all.
"""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from paretune.policy.mixing.parameter import ParameterMix, ReferencePolicy
from paretune.policy.mixing.predictions import LogitMix
from paretune.training.learners.embedded import EmbeddedLearner
from paretune.training.learners.policy_gradient import PolicyGradient

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("sampling", "reference", "forward", "backward", "optimizer", "bound")
BATCHES = (1, 2, 3)  # of --tiny


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


class Late:
    def __init__(self, monkeypatch):
        self.now = self.given = 0.0
        self.cuda, self.device = True, "cuda"
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def give(self, seconds):
        self.given += seconds

    def wait(self):
        self.now, self.given = self.now + self.given, 0.0


def run(*given, command=(sys.executable,), **env):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [*command, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--device", "cpu", *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**clean, "HF_HUB_OFFLINE": "1", **env})


def test_every_figure_is_there_and_positive(tmp_path):
    done = run("--out", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    full = json.loads((tmp_path / "gpu.json").read_text())
    figures = json.loads(line)["figures"]
    assert figures == full["figures"]
    assert full["skipped"] == {}
    assert full["machine"]["torch"] == full["versions"]["torch"] == torch.__version__
    expected = {f"gpu_step_{part}_seconds" for part in PARTS}
    expected |= {"gpu_step_seconds", "gpu_step_mib", "gpu_step_speed_vs_trl", "gpu_step_memory_vs_trl"}
    expected |= {"gpu_7b_step_mib", "gpu_7b_first_step_seconds"}
    for b in BATCHES:
        expected |= {f"gpu_{path}_tokens_per_second_b{b}" for path in ("generate", "plain", "gated", "logit", "static")}
        expected |= {f"gpu_{path}_vs_generate_b{b}" for path in ("plain", "gated", "logit", "static")}
        expected |= {f"gpu_{path}_vs_plain_b{b}" for path in ("gated", "logit")}
    assert set(figures) == expected
    assert all(value > 0 for value in figures.values()), figures
    parts = sum(figures[f"gpu_step_{part}_seconds"] for part in PARTS)
    assert 0.6 * figures["gpu_step_seconds"] < parts < 1.01 * figures["gpu_step_seconds"]  # of steps of 20 ms, the log counts
    assert sum(full["seconds"].values()) < 15


def closure(*names):
    """The distributions with all that they require here."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            stack = [metadata.distribution(name)]
            while stack:
                one = stack.pop()
                if (key := re.sub("[-_.]+", "-", one.name).lower()) in found:
                    continue
                found[key] = one
                needs = [Requirement(line) for line in one.requires or ()]
                for need in needs:
                    if need.marker is None or need.marker.evaluate({"extra": ""}):
                        with contextlib.suppress(metadata.PackageNotFoundError):
                            stack.append(metadata.distribution(need.name))
    return found


def test_a_machine_with_torch_transformers_and_what_is_carried_has_all_that_it_needs(gpu, tmp_path):
    """Without paretune's other requirements, and without pandas and pyarrow: TRL's figures are null then, and it is no failure."""
    carried = {name: metadata.distribution(name) for name in (*gpu.CARRIED, *gpu.THEIRS)}
    allowed = {**closure("torch", "transformers", "pydantic"), **carried}
    assert not {"pandas", "pyarrow", "moocore", "plotly", "datasets"} & set(closure("torch", "transformers", "pydantic"))
    site = tmp_path / "site"
    site.mkdir()
    for one in allowed.values():
        for top in {file.parts[0] for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(one.locate_file(top))
    done = run("--sections", "training", "--out", tmp_path / "gpu.json", command=(sys.executable, "-S"), PYTHONPATH=str(site))
    full = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, done.stderr
    assert full["figures"]["gpu_step_speed_vs_trl"] is full["figures"]["gpu_step_memory_vs_trl"] is None
    assert full["figures"]["gpu_step_seconds"] > 0
    assert re.fullmatch("not measured: ModuleNotFoundError: No module named '(pandas|pyarrow)'", full["training"]["trl"])
    assert full["skipped"] == dict.fromkeys(("decoding", "static", "large"), "not asked for")


def test_what_is_carried_is_named_by_pyproject(gpu):
    names = [Requirement(line).name for line in gpu.requirements((*gpu.CARRIED, "pydantic"))]
    assert sorted(names) == sorted((*gpu.CARRIED, "pydantic"))


def wheel(folder, name, body="value = 2"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr(f"{name.split('-')[0]}.py", body)


def test_packages_are_unpacked_where_they_are_missing_or_older(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("only_carried-2.0", "numpy-0.1", "pytest-9999.0"):
        wheel(tmp_path / "carried", f"{name}-py3-none-any.whl")
    assert gpu.carry(tmp_path / "carried", tmp_path / "home") == ["only-carried 2.0", "pytest 9999.0"]
    assert sorted(file.name for file in (tmp_path / "home").iterdir()) == ["only_carried.py", "pytest.py"]
    import only_carried

    assert only_carried.value == 2


def test_a_folder_for_another_python_or_without_packages_is_refused(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    wheel(tmp_path / "old", "only_carried-2.0-cp27-cp27m-manylinux1_x86_64.whl")
    with pytest.raises(SystemExit, match=r"fits this Python; found: only_carried-2\.0-cp27.*Fill the folder with --python 3"):
        gpu.carry(tmp_path / "old", tmp_path / "home")
    with pytest.raises(SystemExit, match="holds packages; found: none in"):
        gpu.carry(tmp_path, tmp_path / "home")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script would measure it")
def test_without_a_gpu_it_says_so(gpu, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="found: no CUDA device"):
        gpu.main([])


def test_speeds_are_of_what_was_waited_for_and_ratios_of_their_pairs(gpu, monkeypatch):
    late = Late(monkeypatch)
    cost = {"generate": 4.0, "plain": 2.0, "gated": 2.5, "logit": 5.0}  # seconds per row
    monkeypatch.setattr(gpu, "paths", lambda sizes, place: {n: lambda rows, s=s: late.give(s * rows) for n, s in cost.items()})
    figures, notes = {}, {}
    gpu.decoding(dataclasses.replace(gpu.SMALL, rounds=3), late, lambda: 1000.0, figures, notes)
    for b in BATCHES:
        for name, seconds in cost.items():
            assert figures.pop(f"gpu_{name}_tokens_per_second_b{b}") == gpu.SMALL.decoded / seconds
        assert figures.pop(f"gpu_plain_vs_generate_b{b}") == 2.0
        assert figures.pop(f"gpu_gated_vs_generate_b{b}") == 1.6
        assert figures.pop(f"gpu_gated_vs_plain_b{b}") == 0.8
        assert figures.pop(f"gpu_logit_vs_generate_b{b}") == 0.8
        assert figures.pop(f"gpu_logit_vs_plain_b{b}") == 0.4
    assert figures == {}
    assert notes == {"rounds": [3, 3, 3]}


def test_another_round_is_begun_only_where_it_fits(gpu, monkeypatch):
    late, names = Late(monkeypatch), ("generate", "plain", "gated", "logit")
    monkeypatch.setattr(gpu, "paths", lambda sizes, place: {name: lambda rows: late.give(1.0) for name in names})
    notes = {}
    gpu.decoding(dataclasses.replace(gpu.SMALL, rounds=9), late, lambda: 40.0 - late.now, {}, notes)
    assert notes["rounds"] == [2, 2, 3]  # of 4 s, after 4 s unmeasured: in 40 / 3 s, in 28 / 2, and in the 16 that are left
    assert late.now == 40


def test_what_the_paths_run(gpu, monkeypatch):
    """The same prompts and lengths for all; the plain model's `generate` without adapters; weights of its own for every row."""
    from transformers import GenerationMixin

    import decode

    ran, asked = [], []
    inner, generate = decode.rollout_decode, GenerationMixin.generate
    monkeypatch.setattr(decode, "rollout_decode", lambda policy, *a, **k: ran.append((policy, a[0], k)) or inner(policy, *a, **k))
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, **k: asked.append((self, k)) or generate(self, **k))
    runs = gpu.paths(gpu.SMALL, gpu.Place("cpu"))
    for name in ("generate", "plain", "gated", "logit"):
        runs[name](3)
    assert [type(policy) for policy, _, _ in ran] == [ReferencePolicy, ParameterMix, LogitMix]
    assert [policy.K for policy, _, _ in ran] == [0, 3, 3]
    ((model, given),) = asked
    assert not [name for name, _ in model.named_modules() if "lora" in name]
    assert {model.dtype, *(policy.model.dtype for policy, _, _ in ran)} == {torch.bfloat16}
    assert given["max_new_tokens"] == given["min_new_tokens"] == gpu.SMALL.decoded
    assert given["do_sample"]
    for policy, ids_NT, chosen in ran:
        assert torch.equal(ids_NT, given["input_ids"])
        assert (chosen["max_new_tokens"], chosen["suppress_eos"]) == (gpu.SMALL.decoded, True)
        assert len(set(map(tuple, chosen["gates_NK"].tolist()))) == (3 if policy.K else 1)
    assert all(
        float(b.abs().max()) > 0 for k in range(3) for b in ran[1][0].bank.parameters_of(k)
    )  # adapters that do nothing prove nothing


def test_seconds_of_a_step_go_to_their_parts(gpu, monkeypatch):
    late = Late(monkeypatch)

    def logp(self, *given, gates_NK, **settings):
        late.give(3.0 if gates_NK is None else 7.0 if torch.is_grad_enabled() else 11.0)

    def collect(self):
        late.give(5.0)
        self.logp(gates_NK=None)

    def gradient(self):
        self.logp(gates_NK=1)
        late.give(13.0)

    def update(self):
        self.gradient()
        late.give(2.0)

    for owner, method in ((EmbeddedLearner, logp), (PolicyGradient, collect), (PolicyGradient, gradient), (EmbeddedLearner, update)):
        monkeypatch.setattr(owner, method.__name__, method)
    split = gpu.Split(late)
    learner = gpu.timed(split)()
    late.give(100.0)  # from before: not of the step
    for _ in range(2):
        learner.collect()
        learner.update()
        with torch.inference_mode():
            learner.logp(gates_NK=1)
    assert split.parts(2) == {"sampling": 5.0, "reference": 3.0, "forward": 7.0, "backward": 13.0, "optimizer": 2.0, "bound": 11.0}


def test_a_step_is_timed_without_the_first_and_counts_the_bound(gpu, monkeypatch):
    """Of the timed steps one in five looks at what it moved, as in a long training."""
    found = gpu.ours(dataclasses.replace(gpu.SMALL, rows=4), gpu.Place("cpu"), gpu.TINY)
    assert found["bound"] > 0
    assert (gpu.WARM, gpu.TIMED) == (1, 5)
    assert set(found) == {"step", "mebibytes", *PARTS}


def test_training_is_compared_in_the_right_direction(gpu):
    fast, slow = {"step": 2.0, "mebibytes": 10.0, "forward": 1.0}, {"step": 6.0, "mebibytes": 40.0}
    made = gpu.summary({"paretune": [fast, {**fast, "step": 3.0}, fast], "trl": [slow] * 3})
    assert made["gpu_step_speed_vs_trl"] == 3.0
    assert made["gpu_step_memory_vs_trl"] == 0.25
    assert (made["gpu_step_seconds"], made["gpu_step_mib"], made["gpu_step_forward_seconds"]) == (2.0, 10.0, 1.0)
    assert "gpu_step_speed_vs_trl" not in gpu.summary({"paretune": [fast], "trl": []})


def test_pairs_are_alternated_and_what_was_measured_is_kept_when_time_is_up(gpu, monkeypatch):
    ran = []

    def side(name, **numbers):
        def measure(*_):
            ran.append(name)
            if len(ran) == 6:
                raise TimeoutError("took more than its 170 s")
            return numbers

        return measure

    monkeypatch.setattr(gpu, "ours", side("ours", step=1.0, mebibytes=2.0))
    monkeypatch.setattr(gpu, "theirs", side("theirs", step=5.0, mebibytes=1.0))
    figures = {}
    with pytest.raises(TimeoutError):
        gpu.training(dataclasses.replace(gpu.SMALL, pairs=3), gpu.Place("cpu"), lambda: 100.0, figures, {})
    assert ran == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (figures["gpu_step_speed_vs_trl"], figures["gpu_step_memory_vs_trl"]) == (5.0, 2.0)


def test_the_whole_ends_in_time_and_says_what_is_missing(gpu, monkeypatch, capsys, tmp_path):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    def section(name, seconds, error=None):
        def work(sizes, place, left, figures, notes):
            assert left() == 170
            figures[name] = 1.0
            clock.now += seconds
            if error:
                raise error

        return work, 170

    sections = {"broken": section("broken", 100, ValueError("no kernel\nat all")), "long": section("long", 150)}
    sections |= {"late": section("late", 170), "never": section("never", 1)}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert gpu.measure(gpu.SMALL, gpu.Place("cpu"), list(sections), tmp_path / "out.json", clock.now) == 1
    assert clock.now - 1000 <= gpu.LIMIT == 480
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"figures": {"broken": 1.0, "long": 1.0, "late": 1.0}}
    skipped = json.loads((tmp_path / "out.json").read_text())["skipped"]
    assert skipped == {"broken": "ValueError: no kernel", "never": "may take 170 s; found: 50 s left of 480"}


def test_a_section_that_overruns_is_stopped(gpu):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="took more than"), gpu.stopped_after(0.2):
        time.sleep(20)
    assert time.monotonic() - start < 5


def test_sections_fit_into_the_whole(gpu):
    assert sum(allowance for _, allowance in gpu.SECTIONS.values()) + 30 <= gpu.LIMIT - gpu.SPARE  # 30 s to start
