"""Shared set-up: one torch thread, no network, and a cache folder of the test run's own."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Reference models are pre-trained once per test run, never taken from the user's cache."""
    if "PARETUNE_CACHE" not in os.environ:
        os.environ["PARETUNE_CACHE"] = str(tmp_path_factory.getbasetemp().parent / "paretune-cache")
    return os.environ["PARETUNE_CACHE"]
