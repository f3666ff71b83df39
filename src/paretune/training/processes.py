"""Several processes in one training: torch.distributed over gloo, with NCCL for gradients where each process has a GPU of its own.

All processes run the same loop, from the same seeds and with the same weights. What is expensive is split: prompts are sampled and scored
by one process each, and so is every pass of the reference and of the backward. What came of it is gathered in the order in which one
process would have made it, so that whatever a step decides from (baselines, weightings, Gramians, logs) sees the whole batch. The
gradients of passes are added in the order of the passes. Process 0 has the last word on weights and on what the loop remembers, and it
alone writes.

`ranks()` is where this process stands. In one process each function is the identity, and torch.distributed is not imported.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from paretune import errors
from paretune.errors import ConfigError, ParetuneError, TrainingError, first_line
from paretune.files import disk_errors

__all__ = [
    *("ENDS_WITHIN", "RESUMES", "TOGETHER", "WITH", "GradientSum", "Late", "Lost", "Ranks"),
    *("joined", "last_word", "launched", "ranks", "together", "without_defaults"),
]

TOGETHER = "a training goes on while all of its processes do"
RESUMES = "the last checkpoint is kept: the same command goes on from there"
LAST_WORD = 60.0  # seconds that process 0 gets to say what went wrong, before the others end and a launcher ends it
ENDS_WITHIN = 10.0  # seconds that started processes get to end by themselves
HERE = "paretune came"  # in the store: how many of the others have come
WITH = "PARETUNE_WITH"  # the process with which a started one ends
GLOO = "GLOO_SOCKET_IFNAME"  # by which network gloo talks

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together: number `rank` of `size`. `store` is torch's, for what is not part of the training."""

    rank: int = 0
    size: int = 1
    store: Any = None
    on_device: bool = False  # gradients are exchanged from GPU to GPU

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def shared(self, value: T) -> T:
        """Process 0's value."""
        return self.gathered(value)[0]

    def gathered(self, value: T) -> list[T]:
        """The value of each process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._exchange():
            _dist().all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Process 0 first, then all others: it fills caches, which transformers writes in no other one."""
        if not self.first:
            self.shared(None)
        yield
        if self.first:
            self.shared(None)

    def shares(self, count: int) -> list[slice]:
        """`count` things in as many runs as there are processes, as even as can be; fewer where there are fewer things."""
        ends = np.linspace(0, count, min(self.size, count) + 1).round().astype(int).tolist()
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def mapped(
        self,
        items: Sequence[T],
        function: Callable[[T], R],
        *,
        device: torch.device | str = "cpu",
        each: Callable[[], None] = lambda: None,
        along: Callable[[T], object] | None = None,
    ) -> list[R]:
        """What the function says of each item, in their order: item i is asked in process i modulo `size`. Tensors come to `device`.

        `each` is called in every process after every turn, in which a process has had one item at most. A process that has none in a
        turn calls `along` with the last one: what is sharded computes in all processes, or in none.
        """
        if self.size == 1:
            return [function(item) for item in items]
        mine: list[Any] = []
        for turn in range(0, len(items), self.size):
            if turn + self.rank < len(items):
                mine.append(_moved(function(items[turn + self.rank]), "cpu"))
            elif along is not None:
                along(items[-1])
            each()
        by_rank = self.gathered(mine)
        return [_moved(by_rank[i % self.size][i // self.size], device) for i in range(len(items))]

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give the tensors process 0's values."""
        if self.size == 1:
            return
        flat = self._flat(tensors)
        with self._exchange():
            _dist().broadcast(flat, src=0)
        with torch.no_grad():
            for tensor, value in zip(tensors, _parts(flat, tensors), strict=True):
                tensor.copy_(value)

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all processes, added in their order; the same bits in each."""
        if self.size == 1:
            return list(tensors)
        return [part.to(tensor) for part, tensor in zip(_parts(self.added(self._flat(tensors)), tensors), tensors, strict=True)]

    def added(self, mine: Tensor, before: Tensor | None = None) -> Tensor:
        """`before`, then the `mine` of process 0, then that of process 1, ...: each process adds one piece of it, in this order."""
        piece = None if before is None else self._padded(before).view(self.size, -1)[self.rank]
        padded = self._padded(mine)
        theirs, whole = torch.empty_like(padded), torch.empty_like(padded)
        with self._exchange():
            _dist().all_to_all_single(theirs, padded)
            for part in theirs.view(self.size, -1):
                piece = part if piece is None else piece + part
            assert piece is not None, "there are processes"
            _dist().all_gather(list(whole.view(self.size, -1)), piece)
        return whole[: len(mine)]

    def agree(self, what: str, value: Mapping[str, Any]) -> None:
        """ConfigError, in every process, where an entry is not the same in each of them."""
        first, *others = self.gathered(dict(value))
        for rank, other in enumerate(others, start=1):
            if differs := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
                name = differs[0]
                raise ConfigError(
                    f"the processes of a training see the same {what}",
                    found=f"{name}: {first.get(name)} in process 0, {other.get(name)} in process {rank}",
                    remedy="give them one run directory on one file system, the same data files, and the same packages",
                )

    def _padded(self, flat: Tensor) -> Tensor:
        return torch.nn.functional.pad(flat, (0, -len(flat) % self.size))

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        return flat if self.on_device else flat.cpu()

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Around computations in which a sharded model exchanges its weights."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
                raise self._why(error) from error
            raise

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """What breaks an exchange is another process, which may have said why; then it is that error."""
        try:
            yield
        except RuntimeError as error:
            raise self._why(error) from error

    def _why(self, error: RuntimeError) -> ParetuneError:
        with contextlib.suppress(RuntimeError):  # the store is gone where process 0 is
            for wait in (0.0, 0.1, 0.3, 0.6):  # what was said may come after what was closed
                time.sleep(wait)
                if self.store.check(["failed"]):
                    return _as_error(json.loads(self.store.get("failed")))
        said = str(error).partition("]")[2].partition(". This is typically")[0].strip() or str(error)
        late = "timed out" in said.lower()
        remedy = "raise learner.processes_timeout where a process needs so long" if late else "often the system ran out of memory"
        what = "a process did not answer in time" if late else "a process has ended"
        found = f"{what}, seen by process {self.rank} of {self.size}: {said}"
        return (Late if late else Lost)(TOGETHER, found=found, remedy=f"{remedy}; {RESUMES}")


class GradientSum:
    """The gradients of the passes of all processes, added in the order of the passes, as one process adds them up."""

    def __init__(self, here: Ranks, parameters: Sequence[Tensor]):
        self._here, self._parameters, self._total = here, parameters, cast("Tensor | None", None)

    def add(self) -> None:
        """After a turn: what a pass left in `.grad` of each process goes to the sum."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        known = torch.tensor([float(p.grad is not None) for p in self._parameters]).to(grads[0])
        self._total = self._here.added(self._here._flat([*grads, known]), self._total)
        self.clear()

    def clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def settle(self) -> None:
        """Leave the sum in `.grad` of each process; None where no pass had one."""
        if self._here.size == 1:
            return
        assert self._total is not None, "a batch has a pass"
        *grads, known = _parts(self._total, [*self._parameters, torch.empty(len(self._parameters))])
        for parameter, grad, has in zip(self._parameters, grads, known.tolist(), strict=True):
            parameter.grad = grad.to(parameter) if has else None


class Lost(TrainingError):
    """Another process of the training has ended."""


class Late(Lost):
    """Another process of the training does not answer in time."""


ALONE = Ranks()
_here: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def ranks() -> Ranks:
    """Where this process stands; alone, where it has not `joined` others."""
    return _here.get()


@contextlib.contextmanager
def joined(rank: int, size: int, store: Any, *, timeout: float, device: str = "auto") -> Iterator[Ranks]:
    """Be one of `size` processes while the context is open. What ends it in one of them is told to process 0, which has the last word."""
    import torch.distributed as dist

    cards = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if cards:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % cards)
    own = dist.PrefixStore("paretune", store)
    has_one = cards >= int(os.environ.get("LOCAL_WORLD_SIZE", size))
    with _started(dist, has_one, rank, size, own, timeout) as on_device:
        token = _here.set(here := Ranks(rank, size, own, on_device))
        try:
            yield here
        except BaseException as error:
            if not here.first and (isinstance(error, Late) or not isinstance(error, Lost)):
                with contextlib.suppress(RuntimeError):  # of several the first one, which the others repeat
                    own.compare_set("failed", "", json.dumps(_as_record(error, rank)))
            raise
        finally:
            _here.reset(token)


def without_defaults() -> None:
    """Before there is a process group: have torch's functions take None as their default group.

    Those of torch.distributed.nn take the group that there is when they are imported, which torch._dynamo does at some later time. They
    would keep it, and its threads, when it is destroyed; one that lets go of a tensor while the interpreter ends aborts the process.
    """
    import torch.distributed.nn  # noqa: F401


@contextlib.contextmanager
def _started(dist: Any, has_one: bool, rank: int, size: int, store: Any, timeout: float) -> Iterator[bool]:
    """A process group, on GPUs where every process has one of its own; that others do not come is said like everything else."""
    without_defaults()
    names, limit = [f"has a GPU {other}" for other in range(size)], timedelta(seconds=timeout)
    try:
        store.set(names[rank], str(has_one))
        store.wait(names, limit)
        on_device = all(store.get(name) == b"True" for name in names)
        backend = "cpu:gloo,cuda:nccl" if on_device else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        raise Lost(TOGETHER, found=f"process {rank} of {size} does not reach the others: {error}", remedy=RESUMES) from error
    try:
        yield on_device
    finally:
        dist.destroy_process_group()


def last_word(store: Any) -> None:
    """Wait until process 0 has ended, or this process is ended: a launcher that sees one end stops the others at once."""
    with contextlib.suppress(RuntimeError):
        store.wait(["never"], timedelta(seconds=LAST_WORD))


@contextlib.contextmanager
def together(job: Path, *, count: int, timeout: float, device: str = "auto") -> Iterator[None]:
    """Start the other processes of a training, of which this one is process 0: `python -m paretune.launch JOB` in each of them.

    Nothing is started for one process, or where this one has been started with others by a launcher.
    """
    if count == 1 or ranks().size > 1:
        yield
        return
    import torch.distributed as dist

    listening = socket.create_server(("127.0.0.1", 0))  # of this machine alone
    port, handle = listening.getsockname()[1], listening.detach()
    limits: dict[str, Any] = {"wait_for_workers": False, "timeout": timedelta(seconds=timeout)}
    store = dist.TCPStore("127.0.0.1", port, count, is_master=True, master_listen_fd=handle, **limits)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    before, children = torch.get_num_threads(), dict[Path, subprocess.Popen[bytes]]()
    threads = max(1, before // count)
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    given = os.environ.get(GLOO)
    if loopback is not None:
        os.environ.setdefault(GLOO, loopback)
    environment = {**os.environ, **place, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), WITH: str(os.getpid())}
    try:
        for rank in range(1, count):
            log = job.parents[1] / f"{job.stem}-process-{rank}.log"  # several trainings may run side by side
            with disk_errors(job.parents[2]), open(log, "ab") as output:
                ranked = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
                command = [sys.executable, "-P", "-m", "paretune.launch", str(job)]
                children[log] = subprocess.Popen(command, **pipes, env=ranked, start_new_session=True)
        _await(store, children, timeout)
        torch.set_num_threads(threads)
        with joined(0, count, store, timeout=timeout, device=device) as here:
            here.shared(False)  # under a launcher: whether the training was done before
            with here.in_turn():  # the task has been built
                pass
            yield
        for child in children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(ENDS_WITHIN)
    finally:
        torch.set_num_threads(before)
        if given is None:
            os.environ.pop(GLOO, None)
        for child in children.values():
            child.kill()
            child.wait()


def _await(store: Any, children: Mapping[Path, subprocess.Popen[bytes]], timeout: float) -> None:
    """Until every started process has come; Lost where one ends before."""
    deadline = time.monotonic() + timeout
    while store.add(HERE, 0) < len(children):
        for log, child in children.items():
            if child.poll() is not None or time.monotonic() > deadline:
                how = f"ended with {child.returncode}" if child.poll() is not None else f"did not come within {timeout:g} s"
                raise Lost(TOGETHER, found=f"a process {how} before the first step", remedy=f"see {log}; {RESUMES}")
        time.sleep(0.05)


def launched() -> tuple[Any, int, int]:
    """The store, the rank and the number of processes that a launcher gave this one: torchrun, accelerate launch, or `together`."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://")))
        store.add(HERE, 1)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            "a launcher gives each process its rank, their number, and where process 0 is reached",
            found=first_line(error),
            remedy="start them by torchrun or accelerate launch, or let learner.processes start them",
        ) from error
    return store, rank, size


def _dist() -> Any:
    import torch.distributed as dist

    return dist


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [part.view(tensor.shape) for part, tensor in zip(flat.split([tensor.numel() for tensor in like]), like, strict=True)]


def _moved(value: Any, device: torch.device | str) -> Any:
    """The tensors of a tuple, or a tensor, on the device."""
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _as_record(error: BaseException, rank: int) -> dict[str, str]:
    kind, found = type(error).__name__, f"process {rank}: {type(error).__name__}: {error}"
    if not isinstance(error, ParetuneError):
        return {"kind": kind, "rule": TOGETHER, "found": found, "remedy": RESUMES}
    found = error.found if isinstance(error, Late) else f"{error.found} (in process {rank})"  # which says who saw it
    return {"kind": kind, "rule": error.rule, "found": found, "remedy": error.remedy}


def _as_error(record: Mapping[str, str]) -> ParetuneError:
    kind: Any = Late if record["kind"] == Late.__name__ else getattr(errors, record["kind"], None)
    known = isinstance(kind, type) and issubclass(kind, ParetuneError)
    return (kind if known else TrainingError)(record["rule"], found=record["found"], remedy=record["remedy"])
