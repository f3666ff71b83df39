"""What the benchmark scripts share: timing in alternated pairs, and one JSON line at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def paired_medians(a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median seconds of `a`, of `b`, and the median over pairs of seconds(b) / seconds(a): how many times as fast `a` is as `b`.

    Both run once unmeasured. Pairs are alternated (a b, b a, ...), so that what else the machine does falls on both.
    """
    a()
    b()
    seconds_a, seconds_b = [], []
    for pair in range(rounds):
        for run, seconds in ((a, seconds_a), (b, seconds_b))[:: 1 if pair % 2 == 0 else -1]:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    ratios = [y / x for x, y in zip(seconds_a, seconds_b, strict=True)]
    return statistics.median(seconds_a), statistics.median(seconds_b), statistics.median(ratios)


def machine() -> dict[str, Any]:
    """What a timing depends on; no host names and no paths."""
    import torch

    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # over the last minute: 1 is one busy core
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def emit(figures: Mapping[str, float], out: str | Path | None = None, **context: Any) -> None:
    """Print `{"figures": {...}}` as the last line; with `out`, write it to that file together with the machine and `context`."""
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    if out is not None:
        full = {"figures": rounded, "machine": machine(), **context}
        Path(out).write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"figures": rounded}), flush=True)
