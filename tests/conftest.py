"""Shared set-up: one torch thread unless OMP_NUM_THREADS says more, no network, and a cache folder of the test run's own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("COLUMNS", None)  # a test run's own terminal: tables are as wide as in a pipe
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two threads in each of two workers would spin for each other on two cores

import pytest
import torch

THREADS = int(os.environ["OMP_NUM_THREADS"])  # `make test-all` has two as well
torch.set_num_threads(THREADS)
if hasattr(os, "register_at_fork"):  # OpenMP's threads stay in the parent: a forked child that asks for more than one waits for ever
    os.register_at_fork(before=lambda: torch.set_num_threads(1))


@pytest.fixture(autouse=True)
def own_threads():
    """A test that forks leaves one thread; the next one has its own number again."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def one_thread():
    """For tests that compare bits of a forked process with bits of this one: sums in the same order in both."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Reference models are pre-trained once per test run, never taken from the user's cache."""
    if "PARETUNE_CACHE" not in os.environ:
        os.environ["PARETUNE_CACHE"] = str(tmp_path_factory.getbasetemp().parent / "paretune-cache")
    return os.environ["PARETUNE_CACHE"]
