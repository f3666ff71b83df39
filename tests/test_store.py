"""The run directory: what is published is whole and stays, whatever ends the process that publishes, at whatever moment."""

import errno
import json
import os
import subprocess
import sys

import pytest

from paretune.errors import BusyError, StoreError
from paretune.files import disk_errors, is_disk_full, write_json
from paretune.runs import store as store_module
from paretune.runs.store import ARTIFACTS, CELLS, Store
from paretune.training.spec import TrainSpec
from paretune.types import key_of

SPEC = TrainSpec(task={"name": "t"}, learner={"name": "l"}, preference=(1.0, 0.0), seed=3)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 4, "samples/0.txt": b"hello"}


def fill(work, files=FILES):
    """What a learner leaves when it has finished: its files, and the checkpoint that they were made of."""
    for name, content in files.items():
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_bytes(content)
    (work / "checkpoint").mkdir(exist_ok=True)
    (work / "checkpoint" / "state.json").write_text("{}")
    write_json(work / "spec.json", SPEC.to_json())


def published(root):
    store = Store(root)
    with store.lock():
        work = store.begin(SPEC.key)
        fill(work)
        return store.publish(work)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_published_whole_without_its_checkpoint(tmp_path):
    final = published(tmp_path)
    store = Store(tmp_path)
    artifact = store.artifact(SPEC.key)
    assert artifact.path == final == tmp_path / "artifacts" / SPEC.key
    assert artifact.spec == SPEC
    assert set(tree(final)) == {*FILES, "spec.json", "DONE"}
    assert {name: tree(final)[name] for name in FILES} == FILES
    assert store.published(ARTIFACTS) == [SPEC.key]
    assert store.check() == []


def test_unfinished_work_is_invisible(tmp_path):
    store = Store(tmp_path)
    with store.lock():
        fill(store.begin(SPEC.key))
    assert store.artifact(SPEC.key) is None
    assert store.published(ARTIFACTS) == []
    assert store.check() == []
    with store.lock():
        assert (store.begin(SPEC.key) / "checkpoint" / "state.json").exists(), "a second attempt goes on from the first"


def test_what_is_published_never_changes(tmp_path):
    final = published(tmp_path)
    before = tree(final)
    store = Store(tmp_path)
    with store.lock():
        work = store.begin(SPEC.key)
        fill(work, {**FILES, "adapter_model.safetensors": b"other"})
        assert store.publish(work) == final
    assert tree(final) == before
    assert not work.exists()


# A crash at every moment: an audit hook refuses the n-th operation on files, and all later ones, as if the process were gone.


class Crash(BaseException):
    pass


left = None  # operations until the crash; None: no crash
OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def hook(event, _):
    global left
    if left is not None and event in OPERATIONS:
        if left == 0:
            raise Crash
        left -= 1


sys.addaudithook(hook)


def survives(n, action):
    """Run `action` with a crash before its n-th operation; True where it came to its end."""
    global left
    left = n
    try:
        action()
    except Crash:
        return False
    finally:
        left = None
    return True


def train(root, log):
    """A run with one training: as the bench does it, with a learner that counts how often it trains from scratch."""
    store = Store(root)
    with store.lock():
        store.recover(SPEC.key)
        if store.artifact(SPEC.key) is None:
            work = store.begin(SPEC.key)
            if not (work / "checkpoint").exists():
                log.append("from scratch")
                fill(work)
            store.publish(work)


def test_crash_before_any_operation_loses_nothing(tmp_path):
    log: list[str] = []
    for n in range(500):
        root, log = tmp_path / str(n), []
        with Store(root).lock():
            fill(Store(root).begin(SPEC.key))  # trained, and about to be published
        ended = survives(n, lambda: train(root, log))  # noqa: B023 (called at once)
        store = Store(root)
        assert store.check() == [], f"a reader sees half of something after a crash at operation {n}"
        visible = store.artifact(SPEC.key)
        assert visible is None or {name: tree(visible.path)[name] for name in FILES} == FILES
        train(root, log)
        assert store.artifact(SPEC.key) is not None
        assert log == [], f"trained again after a crash at operation {n}"
        assert tree(store.artifact(SPEC.key).path).keys() == {*FILES, "spec.json", "DONE"}
        assert not list((root / "artifacts").glob(".wip-*"))
        if ended:
            break
    assert 15 < n < 499, f"{n} operations: the hook saw them all"


def test_recovery_can_crash_too(tmp_path):
    for n in range(500):
        root = tmp_path / str(n)
        final = published(root)
        before = tree(final)
        work = final.with_name(f".wip-{SPEC.key}")
        final.rename(work)  # killed between DONE and the rename
        (work / "checkpoint").mkdir()
        ended = survives(n, lambda: train(root, []))  # noqa: B023
        train(root, [])
        assert tree(final) == before
        if ended:
            break
    assert 5 < n < 499


def test_done_before_a_power_cut_is_not_trusted(tmp_path):
    """DONE reached the disk and a file did not: it is made again, not published."""
    final = published(tmp_path)
    work = final.with_name(f".wip-{SPEC.key}")
    final.rename(work)
    (work / "adapter_model.safetensors").write_bytes(b"")
    with Store(tmp_path).lock():
        assert Store(tmp_path).artifact(SPEC.key) is None
        assert not (work / "DONE").exists()


@pytest.mark.parametrize("name", [*FILES, "spec.json", "DONE"])
def test_check_names_the_damaged_file(tmp_path, name):
    final = published(tmp_path)
    whole = (final / name).read_bytes()
    for place in {0, len(whole) // 2, len(whole) - 1}:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (final / name).write_bytes(bytes(damaged))
        problems = Store(tmp_path).check()
        assert len(problems) == 1
        assert problems[0].startswith(f"artifacts/{SPEC.key}/{name}: "), (place, problems)
    (final / name).write_bytes(whole)
    assert Store(tmp_path).check() == []
    (final / name).unlink()
    assert [p.split(": ")[0] for p in Store(tmp_path).check()] == [f"artifacts/{SPEC.key}/{name}"]


def test_check_sees_what_was_added_or_renamed(tmp_path):
    final = published(tmp_path)
    (final / "notes.txt").write_text("mine")
    assert Store(tmp_path).check() == [f"artifacts/{SPEC.key}/notes.txt: added after publishing"]
    (final / "notes.txt").unlink()
    final.rename(final.with_name("0" * 20))
    assert Store(tmp_path).check() == ["artifacts/00000000000000000000/spec.json: describes something else than 00000000000000000000"]


def test_cells_are_named_by_what_they_depend_on(tmp_path):
    spec = {"method": {"name": "m"}, "task": {"name": "t"}, "learner": {"name": "l"}, "seed": 1, "evaluation": {"samples": 4}}
    store = Store(tmp_path)
    with store.lock():
        work = store.begin(key_of(spec), CELLS)
        write_json(work / "cell.json", {"format": 1, **spec, "metrics": {"a": 0.5}})
        store.publish(work)
    assert store.check() == []
    assert store.cell(key_of(spec)) == tmp_path / "cells" / key_of(spec)
    assert store.cell("0" * 20) is None


def test_a_copy_without_done_is_refused_before_training(tmp_path):
    final = published(tmp_path)
    (final / "DONE").unlink()
    store = Store(tmp_path)
    assert store.artifact(SPEC.key) is None
    with store.lock(), pytest.raises(StoreError, match=rf"without DONE.*\n.*{SPEC.key}.*\n.*remove it"):
        store.begin(SPEC.key)


def test_two_writers_are_one_too_many(tmp_path):
    holder = "import sys; from paretune.runs.store import Store\n"
    holder += "with Store(sys.argv[1]).lock():\n    print('held', flush=True); sys.stdin.readline()"
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"process {other.pid} works on") as caught, Store(tmp_path).lock():
            pass
        assert caught.value.exit_code == 1
        assert Store(tmp_path).check() == [], "readers need no lock"
        other.kill()
    with Store(tmp_path).lock():
        pass  # the lock of a killed process is no lock


def test_the_next_run_waits_for_workers_of_a_killed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "WAIT_FOR_WORKERS", 0.1)
    store = Store(tmp_path)
    with store.lock():
        pass
    two_workers = (store.worker_lock(), store.worker_lock())
    with two_workers[0], two_workers[1], pytest.raises(BusyError, match="workers of an earlier run"), store.lock():
        pass
    with store.lock():
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("operation", ["replace", "fsync"])
def test_full_disk_loses_nothing(tmp_path, monkeypatch, operation, code):
    """Every single write fails once; each time the message says what to do, and the work is still there."""
    real = getattr(os, operation)
    store = Store(tmp_path)
    failures: list[StoreError] = []
    with store.lock():
        work = store.begin(SPEC.key)
        fill(work)
        for n in range(100):
            calls = 0

            def full(*arguments, n=n):
                nonlocal calls
                calls += 1
                if calls == n + 1:
                    raise OSError(code, os.strerror(code))
                return real(*arguments)

            monkeypatch.setattr(os, operation, full)
            try:
                store.publish(work)
                break
            except StoreError as error:
                failures.append(error)
            finally:
                monkeypatch.undo()
            if not work.exists():
                break  # only the last fsync comes after the rename
            assert tree(work).keys() >= {*FILES, "spec.json"}
    for error in failures:
        assert error.rule == "the run directory has room on its disk"
        assert "every checkpoint is kept" in error.remedy
        assert is_disk_full(error)
    assert len(failures) >= 2
    assert store.artifact(SPEC.key) is not None
    assert store.check() == []


def test_other_trouble_with_the_disk_is_not_called_full(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="can be read and written") as caught, Store(blocked / "root").lock():
        pass
    assert "another --root" in caught.value.remedy
    assert not is_disk_full(caught.value)


def test_full_disk_is_known_in_every_wording():
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "full")
    assert is_disk_full(wrapped)
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))  # safetensors
    assert not is_disk_full(OSError(errno.EACCES, "no"))
    assert not is_disk_full(None)
    with pytest.raises(StoreError), disk_errors("root"):
        raise OSError(errno.ENOSPC, "full")


def test_failures_are_kept_until_the_next_attempt(tmp_path):
    store = Store(tmp_path)
    with store.lock():
        fill(store.begin(SPEC.key))
        store.fail(ARTIFACTS, SPEC.key, {"error": "RewardError", "message": "no"})
        store.fail(CELLS, "abc", {"error": "TrainingError", "message": "its training failed"})
    assert store.failures(ARTIFACTS) == {SPEC.key: {"error": "RewardError", "message": "no"}}
    assert set(store.failures(CELLS)) == {"abc"}
    with store.lock():
        work = store.begin(SPEC.key)
        assert store.failures(ARTIFACTS) == {}
        assert (work / "checkpoint").exists()
        final = store.publish(work)
    assert "FAILED.json" not in tree(final)


def test_damaged_spec_is_a_clear_error(tmp_path):
    final = published(tmp_path)
    for text in ("{", "{}", "[]"):
        (final / "spec.json").write_text(text)
        with pytest.raises(StoreError, match=r"spec\.json"):
            Store(tmp_path).artifact(SPEC.key)


def test_json_is_strict_and_readable_line_by_line(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2], "a": {"c": None}})
    assert (tmp_path / "a.json").read_text() == '{\n"b": [1, 2],\n"a": {"c": null}\n}\n'
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2], "a": {"c": None}}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"b": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
