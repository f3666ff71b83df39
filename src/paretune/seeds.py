"""Randomness by purpose: every stream is named by a path, so that draws do not depend on order or workers.

`seed_for(7, "rollout", step, prompt_hash, occurrence, g)` is the same number in every process and on every platform.
Code that draws takes a `seed` or a generator; module-level random state is banned by lint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator

import numpy as np

__all__ = ["forked_torch", "generator", "seed_for", "uniforms"]


def seed_for(root: int, *path: str | int) -> int:
    """A 63-bit seed for the stream `path` under the experiment seed `root`."""
    text = json.dumps([int(root), *path], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(root: int, *path: str | int) -> np.random.Generator:
    """A NumPy generator for the stream `path`."""
    return np.random.Generator(np.random.Philox(key=seed_for(root, *path)))


def uniforms(n: int, root: int, *path: str | int) -> np.ndarray:
    """(n,) float64 uniforms in [0, 1) of the stream `path`."""
    return generator(root, *path).random(n)


@contextlib.contextmanager
def forked_torch(seed: int) -> Iterator[None]:
    """Run library code that draws from torch's global state (LoRA initialization, dropout) under `seed`, then restore it."""
    import torch

    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        yield
