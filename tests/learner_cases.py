"""What the tests of the learner, its batches and its checkpoints share: one tiny exact task and a way to look at a training."""

import json
import os
import signal

import pytest
import torch

from paretune.registry import describe
from paretune.seeds import forked_torch
from paretune.tasks.exact.task import ExactTask
from paretune.training.spec import TrainSpec

TASK = ExactTask(alphabet=3, length=2, prompt_count=2, width=16, layers=1)
SMALL = {"rank": 2, "alpha": 4, "samples": 64, "batch": 16, "group": 4, "lr": 1e-2, "log_every": 2, "checkpoint_every": 2}
W = (0.3, 0.7)


def spec_of(learner, preference=W, task=TASK, **settings):
    return TrainSpec(task=describe(task), learner=describe(learner), preference=preference, seed=11, **settings)


def moved(learner, task=TASK, preference=W, size=0.5):
    """A policy away from the reference, so that every term of the gradient is at work."""
    policy = learner.start(spec_of(learner, preference, task), task, {})
    with torch.no_grad(), forked_torch(12):
        for parameter in policy.bank.parameters():
            parameter.copy_(size * torch.randn(parameter.shape))
    return policy


def flat(policy, *, values=False):
    """The trained parameters' gradients, or the parameters themselves."""
    return torch.cat([(p.detach() if values else p.grad).flatten() for p in policy.bank.parameters()]).double().numpy()


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def log_of(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def killed(learner, spec, task, folder, step):
    """Train in a process of its own that SIGKILL ends as soon as the record of `step` is written."""

    def die(record):
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        learner.train(spec, task, folder, progress=die)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


class Stop(Exception):
    """What ends a training from its `progress`."""


def whole_and_cut(learner, spec, task, folder, *, at):
    """Train in `folder`/whole, and in `folder`/cut, where it is stopped after the log's line of step `at`, and goes on."""

    def stop(record):
        if record["step"] == at:
            raise Stop

    learner.train(spec, task, folder / "whole")
    with pytest.raises(Stop):
        learner.train(spec, task, folder / "cut", progress=stop)
    learner.train(spec, task, folder / "cut")
