"""Shared set-up: one torch thread unless OMP_NUM_THREADS says more, no network, and a cache folder of the test run's own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two threads in each of two workers would spin for each other on two cores

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # `make test-all` has two as well


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Reference models are pre-trained once per test run, never taken from the user's cache."""
    if "PARETUNE_CACHE" not in os.environ:
        os.environ["PARETUNE_CACHE"] = str(tmp_path_factory.getbasetemp().parent / "paretune-cache")
    return os.environ["PARETUNE_CACHE"]
