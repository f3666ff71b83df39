"""Trainings whose responses the real vLLM draws: what it says of a row is what the trainer says, and kill -9 of it changes nothing.

PARETUNE_KILLS says how often it is killed, twice by default.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm")

from learner_cases import log_of
from paretune.registry import describe
from paretune.seeds import generator
from paretune.tasks.base import Task
from paretune.tasks.pretrained import load_pretrained
from paretune.training import rollouts
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec
from paretune.types import Objectives, Prompt
from vllm_families import saved

KILLS = int(os.environ.get("PARETUNE_KILLS", 2))
OPTIONS = "--enforce-eager --max-model-len 128 --block-size 32 --max-num-seqs 32"
TEXTS = ("where is my parcel?", "That is a funny joke", "a cat and a dog", "I have waited", "sorry, it is", "on its way")
SETTINGS = {"rank": 4, "samples": 128, "batch": 16, "group": 4, "lr": 2e-2, "temperature": 0.9, "log_every": 1, "checkpoint_every": 2}


@dataclass(frozen=True)
class Letters(Task):
    model: str
    objectives = Objectives(("early", "brief"), (0.0, 0.0), (1.0, 1.0))
    beta, max_new_tokens = 0.05, 8
    registered_name, version = "letters", 1

    def load(self):
        return load_pretrained(self.model, dtype="float32")

    def prompts(self, split):
        return [Prompt(text=text) for text in TEXTS]

    def score(self, prompts, completions):
        early = [sum(c < "n" for c in text) / max(1, len(text)) for text in completions]
        return np.array([early, [2 ** (-len(text) / 8) for text in completions]]).T

    def base(self):
        return {"model": self.model}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    path, _ = saved(tmp_path_factory.mktemp("rollouts"))
    return Letters(str(path.parent / "base"))


def trained(task, folder):
    """The server of a conditioned training, two adapters, and the policies that it had at the last step: it ends with the training."""
    learner = PolicyGradient(**SETTINGS, rollouts="vllm", rollouts_args=OPTIONS)
    spec = TrainSpec(task=describe(task), learner=describe(learner), preference=None, seed=5)
    server = rollouts.server_at(None, spec.key[:16], OPTIONS)
    names = []

    def ask(record):
        if record["step"] == record["steps"] and server.process.poll() is None:
            with contextlib.suppress(httpx2.HTTPError):
                names.extend(one["id"] for one in httpx2.get(server.url + "/v1/models", timeout=30).json()["data"] if one["parent"])

    learner.train(spec, task, folder, progress=ask)
    assert server.process is None
    return server, names


def test_kill_9_of_the_server_at_random_instants_changes_nothing(task, tmp_path):
    server, names = trained(task, tmp_path / "whole")
    whole = [load_file(tmp_path / "whole" / f"adapter-{k}" / "adapter_model.safetensors") for k in range(2)]
    records = log_of(tmp_path / "whole")
    assert len(records) == 8
    for record in records:
        assert record["logp_gap"] < 1e-4
        assert record["truncated"] == 0
        assert abs(record["weight"] - 1) < 1e-3
    assert max(float(t.abs().max()) for one in whole for name, t in one.items() if "lora_B" in name) > 1e-3  # else nothing was trained
    assert len(names) == 1  # earlier policies are gone

    rng, kills, runs = generator(0, "kills"), 0, 0
    while kills < KILLS:
        ended = threading.Event()
        done = []

        def kill(ended=ended, done=done):
            while not ended.wait(rng.uniform(0.2, 6.0)):
                process = server.process
                if process is None or process.poll() is not None or not server._answered or len(done) >= 2:
                    continue
                os.kill(process.pid, signal.SIGKILL)
                done.append(time.monotonic())

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        trained(task, tmp_path / f"run-{runs}")
        ended.set()
        killer.join()
        kills += len(done)
        for k, one in enumerate(whole):
            other = load_file(tmp_path / f"run-{runs}" / f"adapter-{k}" / "adapter_model.safetensors")
            for name, tensor in one.items():
                torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=0)
        print(f"run {runs}: {len(done)} kills, {kills} in all", flush=True)
        runs += 1
