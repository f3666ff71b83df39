"""What the benchmark scripts share: timing in alternated rounds, TRL's trainer, and one JSON line at the end."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def alternated(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    wait: Callable[[], Any] = lambda: None,
    left: Callable[[], float] = lambda: math.inf,
) -> dict[str, list[float]]:
    """Seconds of each run in each round. Rounds go forwards and backwards in turn, so that what else the machine does falls on all.

    All run once unmeasured. `wait` waits for a device that works on while Python goes on; it is called before each reading of the clock.
    After the first round there is another only where the longest one so far fits into the seconds that are `left`.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        if turn and left() < max(map(sum, zip(*seconds.values(), strict=True))):
            break
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            wait()
            start = time.perf_counter()
            runs[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def times_as_fast(seconds: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """How many times as fast `a` is as `b`: the median over rounds of seconds(b) / seconds(a)."""
    return statistics.median(y / x for x, y in zip(seconds[a], seconds[b], strict=True))


def paired_medians(a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median seconds of `a`, of `b`, and how many times as fast `a` is as `b`, from alternated pairs."""
    seconds = alternated({"a": a, "b": b}, rounds)
    return statistics.median(seconds["a"]), statistics.median(seconds["b"]), times_as_fast(seconds, "a", "b")


def grpo(model: Any, tokenizer: Any, *, prompts: Sequence[Any], group: int, cpu: bool, **shape: Any) -> None:
    """A training by TRL's GRPOTrainer with LoRA; the rest is as for `grpo_trainer`."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"num_generations": group, "temperature": 1.0, "top_k": 0, "use_cpu": cpu}
        grpo_trainer(folder, model, tokenizer, prompts=[{"prompt": prompt} for prompt in prompts], **shape, **settings).train()


def grpo_trainer(
    folder: str,
    model: Any,
    tokenizer: Any,
    *,
    prompts: Sequence[Mapping[str, Any]],
    rewards: Any,
    rows: int,
    tokens: int,
    steps: int,
    rank: int,
    alpha: int,
    beta: float,
    lr: float,
    stamp: Callable[[], Any],
    **settings: Any,
) -> Any:
    """TRL's GRPOTrainer with LoRA, which logs and saves nothing; `stamp` is called after each step, `settings` are more of GRPOConfig."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            stamp()

    shape = {"per_device_train_batch_size": rows, "max_completion_length": tokens, "max_steps": steps, "learning_rate": lr, "beta": beta}
    quiet = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    config = GRPOConfig(output_dir=folder, bf16=False, gradient_checkpointing=False, **shape, **quiet, **settings)
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list(list(prompts)),
        peft_config=LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )


def machine() -> dict[str, Any]:
    """What a timing depends on; no host names and no paths."""
    import torch

    gpu = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # over the last minute: 1 is one busy core
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **gpu,
    }


def emit(figures: Mapping[str, float | None], out: str | Path | None = None, **context: Any) -> None:
    """Print `{"figures": {...}}` as the last line; with `out`, write it to that file together with the machine and `context`.

    None is a figure that could not be measured.
    """
    if out is not None:
        write(figures, out, **context)
    print(json.dumps({"figures": rounded(figures)}), flush=True)


def write(figures: Mapping[str, float | None], out: str | Path, **context: Any) -> None:
    full = {"figures": rounded(figures), "machine": machine(), **context}
    Path(out).write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")


def rounded(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else float(f"{value:.4g}") for name, value in figures.items()}
