"""Every file that Paretune writes, and every fault: what is damaged is made again with a warning, or one clear error; nothing is published.

Faults are a flipped bit, a truncated, an empty and a missing file, a directory in its place, a file that cannot be read, a full disk at
every write, and a power cut at every operation.
"""

import builtins
import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from kill import LEARNER, TASK, without_clock
from learner_cases import Stop, log_of, weights
from paretune.errors import ConfigError, ParetuneError, StoreError
from paretune.policy.family import Family
from paretune.registry import LEARNERS, TASKS, describe
from paretune.report.comparison import write_rows
from paretune.report.data import load
from paretune.report.page import write_page
from paretune.runs import jobs
from paretune.runs.store import ARTIFACTS, CELLS, Store
from paretune.runs.suite import fit, run_suite
from paretune.serve.export import export
from paretune.training.spec import TrainSpec

SUITE = {"name": "faults", "tasks": [TASK], "learner": LEARNER, "methods": [{"name": "experts", "mixing": "parameter"}], "seeds": [0]}
SPECIAL = "/proc/self/mem"  # a file that exists and whose reading fails, for root, too
FAULTS = ("flipped", "truncated", "empty", "missing", "directory", "unreadable")


def damage(path: Path, fault: str, *, place: float = 0.5) -> None:
    content = path.read_bytes()
    path.unlink()
    if fault == "flipped":
        at = int(place * (len(content) - 1))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "directory":
        path.mkdir()
    elif fault == "unreadable":
        if not os.path.exists(SPECIAL):
            pytest.skip("no file that cannot be read")
        path.symlink_to(SPECIAL)


def clear(error: ParetuneError) -> None:
    """Three parts, each of one line or two."""
    assert all(part and "\n" not in part.strip() for part in (error.rule, error.found, error.remedy)), str(error)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory with trainings, a result and a family."""
    root = tmp_path_factory.mktemp("faults") / "root"
    run_suite(SUITE, root, executor="in-process", progress=False)
    fit(TASKS.build(TASK), SUITE["methods"][0], learner=LEARNER, root=root, progress=False).save(root / "families" / "mine")
    return root


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "root"))


ARTIFACT = ("spec.json", "env.json", "ledger.json", "train.jsonl", "adapter_config.json", "adapter_model.safetensors", "DONE")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_training_is_one_clear_error_and_is_named_by_check(root, fault):
    key = Store(root).published(ARTIFACTS)[0]
    folder = root / ARTIFACTS / key
    assert {p.name for p in folder.iterdir()} == set(ARTIFACT)
    for name in ARTIFACT:
        whole = shutil.copytree(folder, root / "whole")
        damage(folder / name, fault)
        shutil.rmtree(root / CELLS, ignore_errors=True)  # the suite needs the training
        with pytest.raises(StoreError) as caught:
            _suite_or_failure(root, key)
        clear(caught.value)
        assert key in caught.value.found
        assert "remove" in caught.value.remedy
        assert any(problem.startswith(f"artifacts/{key}/{name}: ") for problem in Store(root).check())
        shutil.rmtree(folder)
        shutil.move(whole, folder)
    assert Store(root).artifact(key) is not None


def _suite_or_failure(root, key):
    run_suite(SUITE, root, executor="in-process", progress=False)
    raise jobs.as_error(Store(root).failures(ARTIFACTS)[key], "")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["cell.json", "env.json", "curve.npz", "DONE"])
def test_a_damaged_result_is_not_reported(root, name, fault):
    (key,) = Store(root).published(CELLS)
    damage(root / CELLS / key / name, fault)
    assert any(problem.startswith(f"cells/{key}/{name}: ") for problem in Store(root).check())
    with pytest.raises(ParetuneError) as caught:
        (load(root), Store(root).read(key, "curve.npz"))
    clear(caught.value)
    assert caught.value.exit_code == (2 if name == "DONE" and fault in ("missing", "directory") else 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_family_is_one_clear_error(root, fault):
    folder = root / "families" / "mine"
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(files) == 5
    for name in files:
        whole = shutil.copytree(folder, root / "whole")
        damage(folder / name, fault)
        with pytest.raises(ConfigError) as caught:
            Family.load(folder)
        clear(caught.value)
        if not (name.name == "family.json" and fault in ("missing", "directory")):
            assert any(problem.startswith(f"families/mine/{name}: ") for problem in Store(root).check())
        shutil.rmtree(folder)
        shutil.move(whole, folder)
    Family.load(folder)


def test_every_bit_of_a_family_counts(root):
    """A digit of a gate, of the base, of a hash: JSON that is JSON and says something else."""
    folder = root / "families" / "mine"
    text = (folder / "family.json").read_text()
    for place in range(0, len(text), 97):
        (folder / "family.json").write_bytes((text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]).encode())
        assert len(Store(root).check()) == 1, place


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_list_or_failure_blocks_no_report(root, fault):
    store = Store(root)
    store.fail(ARTIFACTS, "0" * 20, {"label": "one", "error": "RewardError", "message": "no"})
    damage(root / ARTIFACTS / (".wip-" + "0" * 20) / "FAILED.json", fault, place=0.0)
    damage(root / "suites" / "faults.json", fault)
    results = load(root)
    assert len(results.cells) == 1
    if fault != "missing":
        assert [line.split(": ")[0] for line in results.skipped] == ["suites/faults.json"]
        (failure,) = results.failures
        assert "cannot be read" in failure["message"]
        assert {problem.split(": ")[0] for problem in store.check()} == {
            "suites/faults.json",
            f"artifacts/.wip-{'0' * 20}/FAILED.json",
        }
        with pytest.raises(StoreError, match=r"faults\.json"):
            load(root, suite="faults")
    write_page(results, root / "reports" / "faults")


# Trainings that were stopped

LEARNERS_TRIED = {
    "pg": {"lr": 1e-2},
    "exact": {"name": "exact", "steps": 8, "rank": 2, "log_every": 3, "checkpoint_every": 2},
    "distill": {"name": "distill"},
    "modpo": {"name": "modpo"},
}
SAMPLED = {**LEARNER, "samples": 64}


def job_of(root, fields):
    """A training's store, specification and job file."""
    own = fields if fields.get("name") == "exact" else {**SAMPLED, **fields}
    rule = {"rule": describe(_rule()), "fresh": (2,)} if fields.get("name") == "distill" else {}
    spec = TrainSpec(task=describe(TASKS.build(TASK)), learner=describe(LEARNERS.build(own)), preference=(0.3, 0.7), seed=3, **rule)
    store = Store(root)
    with store.lock():
        return store, spec, jobs.train_job(store, spec).path


def _rule():
    from paretune.registry import GATE_RULES

    return GATE_RULES.build({"name": "constant", "gates_K": [1.0]})


TASKS_KEPT = jobs.Tasks()


def stopped(root, fields, *, at=5):
    """A training that ended after the log's line of step 6 (or `at`), two steps after its checkpoint; returns its wip directory."""
    store, spec, path = job_of(root, fields)

    def stop(record):
        if record["step"] >= at:
            raise Stop

    with store.lock(), pytest.raises(Stop):
        jobs.run_job(path, tasks=TASKS_KEPT, progress=stop)
    return store.root / ARTIFACTS / f".wip-{spec.key}"


def trained(root, fields):
    """Train to the end; what it left, without clocks, and the first step that was logged now."""
    store, spec, path = job_of(root, fields)
    steps = []
    with store.lock():
        jobs.run_job(path, tasks=TASKS_KEPT, progress=lambda record: steps.append(record["step"]))
    folder = store.artifact(spec.key).path
    assert store.check() == []
    assert not list(root.rglob(".aside-*")) + list(root.rglob(".wip-*"))
    return (weights(folder), [without_clock(line) for line in log_of(folder)]), steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an undisturbed training leaves."""
    known = {}

    def of(name):
        if name not in known:
            known[name] = trained(tmp_path_factory.mktemp("whole"), LEARNERS_TRIED[name])[0]
        return known[name]

    return of


@pytest.mark.parametrize("name", ["pg", "exact", "modpo"])
def test_a_line_of_the_log_averages_the_steps_before_the_checkpoint_too(name, tmp_path, whole):
    """A checkpoint at 4, lines at 3 and 6: the line of 6 is about the steps 4, 5 and 6, also where 4 was before the kill."""
    stopped(tmp_path, LEARNERS_TRIED[name])
    result, steps = trained(tmp_path, LEARNERS_TRIED[name])
    assert steps == [6, 8], "from the checkpoint at step 4"
    assert result == whole(name)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "DONE", "train.jsonl"])
def test_a_damaged_checkpoint_is_discarded_and_the_training_starts_over(file, fault, tmp_path, whole):
    wip = stopped(tmp_path, LEARNERS_TRIED["pg"])
    (checkpoint,) = (wip / "checkpoint").glob("[0-9]*")
    damage(wip / file if file == "train.jsonl" else checkpoint / file, fault, place=0.2)
    if file == "train.jsonl" and fault in ("directory", "unreadable"):  # cannot be written either
        with pytest.warns(UserWarning, match="damaged checkpoint"), pytest.raises(StoreError) as caught:
            trained(tmp_path, LEARNERS_TRIED["pg"])
        clear(caught.value)
        return
    with pytest.warns(UserWarning, match="damaged checkpoint"):
        result, steps = trained(tmp_path, LEARNERS_TRIED["pg"])
    assert steps == [3, 6, 8]
    assert result == whole("pg"), "no NUL and no line twice"


@pytest.mark.parametrize("fault", ["flipped", "missing"])
@pytest.mark.parametrize("done", [True, False])
def test_a_finished_training_that_was_damaged_before_it_was_published_is_trained_again(done, fault, tmp_path, whole, monkeypatch):
    """Killed before the rename, with DONE or without: the hash of the damaged file is not taken anew."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "train.jsonl", *(("ledger.json",) if done else ())):
        root = tmp_path / name
        _, spec, path = job_of(root, LEARNERS_TRIED["pg"])

        def dies(*_):
            raise Stop

        monkeypatch.setattr(Store, "_finish" if done else "publish", dies)
        with Store(root).lock(), pytest.raises(Stop):
            jobs.run_job(path, tasks=TASKS_KEPT)
        monkeypatch.undo()
        wip = root / ARTIFACTS / f".wip-{spec.key}"
        assert (wip / "DONE").exists() == done
        damage(wip / name, fault)
        with pytest.warns(UserWarning, match="again"):
            result, steps = trained(root, LEARNERS_TRIED["pg"])
        assert steps == [3, 6, 8], name
        assert result == whole("pg")


# A full disk


class Full:
    """Lets `left` writes pass, and then none; also those of safetensors."""

    def __init__(self, monkeypatch, left, code=errno.ENOSPC):
        self.left, self.code = left, code
        opened = io.open

        def guarded(file, mode="r", *args, **kwargs):
            handle = opened(file, mode, *args, **kwargs)
            if isinstance(file, int) or not set(mode) & set("wax+") or "/dev/" in str(file):
                return handle
            write = handle.write

            def checked(data):
                self.take(file)
                return write(data)

            handle.write = checked
            return handle

        import safetensors.torch

        saved = safetensors.torch.save_file

        def save_file(tensors, file, metadata=None):
            self.take(file)
            return saved(tensors, file, metadata=metadata)

        for module in (io, builtins):
            monkeypatch.setattr(module, "open", guarded)
        monkeypatch.setattr(safetensors.torch, "save_file", save_file)

    def take(self, file):
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code), str(file))


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("what", ["report", "rows", "family", "export"])
def test_a_full_disk_at_any_write_is_one_clear_error_and_leaves_what_was_there(what, code, root, tmp_path, monkeypatch):
    results, family = load(root), Family.load(root / "families" / "mine")
    place = tmp_path / "out"
    place.mkdir()
    action = {
        "report": lambda: write_page(results, place / "report"),
        "rows": lambda: write_rows(results, place / "rows.json"),
        "family": lambda: family.save(place / "family"),
        "export": lambda: export(family, place / "export", (0.5, 0.5), kind="adapter"),
    }[what]
    if what in ("report", "rows"):
        action()
        for file in [p for p in place.rglob("*") if p.is_file()]:
            file.write_text("an earlier one")
    before, errors = tree(place), 0
    once = 9 if what == "report" else 1  # a page takes a while
    for left in range(0, 1000, once if code == errno.ENOSPC else 4 * once):
        with monkeypatch.context() as patch:
            Full(patch, left, code)
            try:
                action()
                break
            except StoreError as error:
                caught = error
        clear(caught)
        assert ("room" in caught.rule) == (code in (errno.ENOSPC, errno.EDQUOT))
        assert tree(place) == before, f"after {left} writes"
        errors += 1
    assert errors, "the disk was full at least once"
    assert tree(place) != before


# A power cut


class Disk:
    """What a disk would hold after a power cut: content as it was last forced, and names either as they are now or as last forced."""

    def __init__(self, root, monkeypatch):
        self.root, self.content, self.names, self.kept = root, {}, {}, {}
        self.states: list[tuple[str, dict[str, bytes]]] = []
        self._list(root)
        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir"):
            monkeypatch.setattr(os, name, self._before(getattr(os, name)))
        fsync = os.fsync

        def forced(handle):
            fsync(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path.is_relative_to(root):
                self._hold()
                if path.is_dir():
                    self._list(path)
                else:
                    self.content[path.stat().st_ino] = path.read_bytes()
                self.cut()

        monkeypatch.setattr(os, "fsync", forced)

    def _before(self, operation):
        def watched(*args, **kwargs):
            self._hold()
            self.cut()
            return operation(*args, **kwargs)

        return watched

    def _list(self, path):
        self.names[path.stat().st_ino] = {p.name: p.stat().st_ino for p in path.iterdir() if not p.is_symlink()}

    def _hold(self):
        """Keep every file open, so that no number of a removed one is given to another."""
        for path in self.root.rglob("*"):
            number = path.stat().st_ino
            if number not in self.kept:
                self.kept[number] = (os.open(path, os.O_RDONLY), path.is_dir())

    def cut(self):
        now = {p.relative_to(self.root).as_posix(): self.content.get(p.stat().st_ino, b"") for p in self.root.rglob("*") if p.is_file()}
        then: dict[str, bytes] = {}
        self._walk(self.root.stat().st_ino, "", then)
        for kind, state in (("names now", now), ("names as forced", then)):
            if (kind, state) not in self.states:
                self.states.append((kind, state))

    def _walk(self, number, prefix, found):
        for name, inner in self.names.get(number, {}).items():
            if self.kept[inner][1]:
                self._walk(inner, f"{prefix}{name}/", found)
            else:
                found[prefix + name] = self.content.get(inner, b"")


@pytest.mark.skipif(sys.platform != "linux", reason="finds a file's name by its descriptor")
def test_a_power_cut_at_any_moment_loses_no_checkpoint_and_damages_nothing(tmp_path, monkeypatch):
    """After each cut the training goes on, from the checkpoint that was there or a later one, and ends with the same bits."""
    fields = {**LEARNERS_TRIED["exact"], "steps": 4}
    expected, _ = trained(tmp_path / "whole", fields)
    root = tmp_path / "root"
    store, _, path = job_of(root, fields)
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        with store.lock():
            jobs.run_job(path, tasks=TASKS_KEPT)
        disk.cut()
    for handle, _ in disk.kept.values():
        os.close(handle)
    assert len(disk.states) > 20
    begins = {"names now": [0], "names as forced": [0]}
    for place, (kind, state) in enumerate(disk.states):
        again = tmp_path / str(place)
        for name, content in state.items():
            (again / name).parent.mkdir(parents=True, exist_ok=True)
            (again / name).write_bytes(content)
        with pytest.MonkeyPatch.context() as quiet:
            quiet.setattr("warnings.warn", lambda *_, **__: None)
            result, steps = trained(again, fields)
        assert result == expected, (place, kind)
        begins[kind].append(min(steps, default=5))
    for kind, began in begins.items():
        assert began == sorted(began), f"{kind}: {began}: nothing that was on the disk is lost"
        assert began[-1] == 5, "what was published stays"


# A family moves


def test_a_family_moves_with_its_base_or_says_where_that_is(tmp_path, monkeypatch):
    from paretune.policy.lora.bank import LoraBank
    from paretune.policy.mixing.parameter import ParameterMix
    from paretune.policy.rules import Identity
    from paretune.tasks.pretrained import load_pretrained
    from paretune.types import Objectives
    from recipe_files import tiny_model

    project = tmp_path / "project"
    base = shutil.copytree(tiny_model(), project / "base")
    model, tokenizer = load_pretrained(str(base))
    bank = LoraBank.attach(model, names=["a", "b"], rank=2, seed=3)
    objectives = Objectives(("a", "b"), (0.0, 0.0), (1.0, 1.0))
    monkeypatch.chdir(project)
    made = Family(ParameterMix(bank, tokenizer), Identity(), objectives, {"model": "./base"})
    made.save(project / "out" / "family")
    wanted = made.sample(["a b"], (0.5, 0.5), max_new_tokens=4)
    monkeypatch.chdir(tmp_path)
    assert Family.load(project / "out" / "family").sample(["a b"], (0.5, 0.5), max_new_tokens=4) == wanted
    moved = tmp_path / "moved"
    project.rename(moved)
    found = Family.load(moved / "out" / "family")
    assert found.base["model"] == str(moved / "base")
    assert found.sample(["a b"], (0.5, 0.5), max_new_tokens=4) == wanted
    (moved / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="finds its reference model") as caught:
        Family.load(moved / "out" / "family")
    clear(caught.value)
    assert "--model" in caught.value.remedy
    assert Family.load(moved / "out" / "family", model=tmp_path / "elsewhere").sample(["a b"], (0.5, 0.5), max_new_tokens=4) == wanted


def test_the_commands_say_what_they_looked_at_and_where_a_base_is(root, tmp_path):
    from typer.testing import CliRunner

    from paretune.cli import app

    def run(*arguments):
        found = CliRunner().invoke(app, [str(one) for one in arguments])
        return found.exit_code, found.output

    (tmp_path / "ssl" / "certs").mkdir(parents=True)
    code, said = run("check", tmp_path / "ssl")
    assert (code, "none of them in" in said, "remedy" in said) == (2, True, True)
    code, said = run("check", root)
    assert (code, "1 families, 2 trainings and 1 results hashed: all as published" in said) == (0, True)
    assert run("check", root / "families" / "mine")[0] == 0
    victim = next((root / "families" / "mine").glob("adapters/*/adapter_model.safetensors"))
    damage(victim, "flipped")
    for place in (root, root / "families" / "mine"):
        code, said = run("check", place)
        assert (code, f"{victim.parent.name}/{victim.name}: the content is not what was published" in said) == (1, True)
    code, said = run("sample", root / "families" / "mine", "a", "--preference", "objective_1=1", "--model", tmp_path)
    assert code == 2
    damage(root / "suites" / "faults.json", "truncated")
    code, said = run("report", root, "--rows", tmp_path / "rows.json")
    assert (code, "left out: suites/faults.json" in said) == (0, True)


def test_a_base_that_is_a_task_does_not_move(root):
    with pytest.raises(ConfigError, match="a base that moves is a model"):
        Family.load(root / "families" / "mine", model="elsewhere")
    assert "beside" not in json.loads((root / "families" / "mine" / "family.json").read_text())["base"]
