"""One GPU: a training step beside TRL's, decoding beside `generate`, and the memory of a 7 B step. At most 8 minutes in all.

    python benchmarks/gpu.py --fill .gpu --python 3.12    # with a network: packages for a machine without one, about 40 MiB
    python benchmarks/gpu.py --carry .gpu --out gpu.json  # on the GPU machine, from a bare checkout
    python benchmarks/gpu.py --tiny --device cpu          # a few tokens of a small model, as a test of this script

The GPU machine has torch, transformers and what these require; 2.11 and 5.17 are enough. `--carry` unpacks the packages of the folder that
this machine lacks, or has in an older version, into a temporary directory. TRL needs pandas and pyarrow beside them (60 MiB), which are not
carried: without them TRL's figures are null. No model and no data is downloaded. No figure of a GPU has been committed yet.

The model is a Llama of Qwen2.5-0.5B's shape (SHAPE) with random weights in bfloat16; adapters are LoRA of rank 16 on every linear layer but
the head, in float32. EOS is one of 151,936 equally likely tokens, so that responses have full length. Sections, and their seconds at most:

training  steps of `pg` on 64 responses (8 prompts of 128 tokens, groups of 8, 128 new tokens), three rewards that count token ids, AdamW's
          update without decay, KL to the reference, no activation checkpointing. Timed are 5 steps after one, with the device waited for
          around each part: `sampling` (with rewards and advantages), `reference`, `forward`, `backward`, `optimizer`, and `bound`, the
          look at what an update moved. TRL's GRPOTrainer has the same shapes, base, adapters and rewards; pairs are alternated. Peak
          memory is what torch allocated beyond what it held before (on a CPU: of the whole process, and no measure).
decoding  64 tokens after prompts of 128, at batch 1, 8 and 64. `generate` is transformers' on the plain model; `plain` is Paretune's loop
          on it; `gated` mixes three experts' parameters, weights of its own in every row; `logit` mixes their predictions.
static    `generate` with a static cache, which transformers compiles on a GPU (CUDA graphs), against `generate` with the usual one. A
          compilation is not timed. Paretune's decoder uses neither: this is what it could gain.
large     the memory of one step with Qwen2.5-7B's shape in bfloat16, with activation checkpointing, the same responses.

A section that would not end in time is not begun, one that overruns is stopped, and one that fails does not keep the others from running.
`--out` is written after each section. `skipped` there says what is missing and why; the exit status is 1 where something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
LIMIT, SPARE = 480, 10  # seconds of the whole, and what is kept of them for the end
# What this script imports, and neither torch nor transformers requires. Versions are those of pyproject.toml.
CARRIED = ("accelerate", "datasets", "peft", "scipy", "trl")
THEIRS = ("dill", "multiprocess", "psutil", "xxhash")  # what those import; pydantic's own are found by pip
PLATFORMS = [f"--platform=manylinux{kind}_x86_64" for kind in ("_2_28", "_2_27", "_2_17", "2014", "2010", "1")]
MOST_MIB = 64
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"  # the version of Python
MIB = 2**20
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LARGE = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
LARGE_GIB = 40  # of free memory
TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
AIMS = ("even", "low", "varied")
RANK, ALPHA, BETA, LR = 16, 32, 0.04, 1e-6  # so low a rate that all sample the untrained model
WARM, TIMED = 1, 5  # steps; in one of the timed ones `pg` looks at what an update moved, as it does in one of five


@dataclass(frozen=True)
class Sizes:
    shape: Mapping[str, Any] = field(default_factory=lambda: SHAPE)
    large: Mapping[str, Any] = field(default_factory=lambda: LARGE)
    rows: int = 64
    group: int = 8
    prompt: int = 128
    new: int = 128
    decoded: int = 64
    batches: tuple[int, ...] = (1, 8, 64)
    pairs: int = 3
    rounds: int = 5


SMALL = Sizes(shape=TINY, large=TINY, rows=4, group=2, prompt=6, new=4, decoded=3, batches=(1, 2, 3), pairs=1, rounds=1)


class Skip(Exception):
    """A section cannot be measured here, and why."""


# Packages


def requirements(names: Sequence[str]) -> list[str]:
    """As pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = [*project["dependencies"], *project["optional-dependencies"]["trl"]]
    return [line for line in known if re.split("[<>=]", line)[0] in names]


def fill(folder: Path, python: str) -> None:
    """Download what a machine with torch and transformers alone lacks."""
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *PLATFORMS, f"--dest={folder}"]
    for wanted in (["--no-deps", *requirements(CARRIED), *THEIRS], requirements(["pydantic"])):
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *target, *wanted], check=True)
    size = sum(file.stat().st_size for file in folder.iterdir()) / MIB
    print(f"{folder}: {size:.0f} MiB")
    if size > MOST_MIB:
        raise SystemExit(f"what is carried has at most {MOST_MIB} MiB; found: {size:.0f} MiB in {folder}. Empty it and fill it again")


def carry(folder: Path, home: Path) -> list[str]:
    """Unpack into `home` what this machine lacks or has in an older version, and let Python look there first; returns the names."""
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename
    from packaging.version import Version

    unpacked, fits = [], set(sys_tags())
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, tags = parse_wheel_filename(wheel.name)
        if not tags & fits:
            here = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise SystemExit(
                f"what is carried fits this Python; found: {wheel.name} for Python {here}. Fill the folder with --python {here}"
            )
        try:
            older = Version(metadata.version(name)) < version
        except metadata.PackageNotFoundError:
            older = True
        if older:
            zipfile.ZipFile(wheel).extractall(home)
            unpacked.append(f"{name} {version}")
    if not any(folder.glob("*.whl")):
        raise SystemExit(f"a folder to carry holds packages; found: none in {folder}. Fill it with --fill {folder}")
    sys.path.insert(0, str(home))
    return unpacked


# The device


@dataclass(frozen=True)
class Place:
    """Where the models are."""

    device: str

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def peak(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What `work` returns, and the MiB that it needs at its highest beyond those in use before."""
        gc.collect()
        if not self.cuda:
            from memory import resident

            return work(), resident("VmHWM") / MIB
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = work()
        return made, (torch.cuda.max_memory_allocated() - before) / MIB


def plain_model(shape: Mapping[str, Any], place: Place) -> Any:
    import torch

    from decode import fresh

    return fresh(shape, dtype=torch.bfloat16, device=place.device)


# Training


def tokenizer(vocabulary: int) -> Any:
    """A text is token ids in digits, with spaces between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<eos>": 0, **{str(i): i for i in range(1, vocabulary)}}, unk_token="1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", padding_side="left")


def rewards(vocabulary: int) -> list[Callable[..., list[float]]]:
    """Functions of completions: shares of even ids, of ids in the lower half, and of different ones."""

    def share(name: str, count: Callable[[list[int]], int]) -> Callable[..., list[float]]:
        def reward(completions: Sequence[str], **_: Any) -> list[float]:
            ids = [[int(word) for word in text.split()] for text in completions]
            return [count(row) / max(len(row), 1) for row in ids]

        reward.__name__ = name
        return reward

    counts = (lambda row: sum(i % 2 == 0 for i in row), lambda row: sum(i < vocabulary // 2 for i in row), lambda row: len(set(row)))
    return [share(name, count) for name, count in zip(AIMS, counts, strict=True)]


def task_of(sizes: Sizes, shape: Mapping[str, Any], place: Place) -> Any:
    import numpy as np

    from paretune.seeds import generator
    from paretune.tasks.base import Task
    from paretune.types import Objectives, Prompt

    vocabulary = shape["vocab_size"]
    given = rewards(vocabulary)

    @dataclass(frozen=True)
    class Numbers(Task):
        objectives = Objectives(AIMS, (0.0,) * 3, (1.0,) * 3)
        beta, max_new_tokens, registered_name, version = BETA, sizes.new, "numbers", 1

        def load(self) -> Any:
            return plain_model(shape, place), tokenizer(vocabulary)

        def prompts(self, split: str) -> list[Prompt]:
            ids_PT = generator(0, "prompts").integers(1, vocabulary, (sizes.rows, sizes.prompt))
            return [Prompt(text=" ".join(map(str, row))) for row in ids_PT]

        def score(self, prompts: Any, completions: Any) -> np.ndarray:
            return np.array([reward(completions) for reward in given]).T

    return Numbers()


@dataclass
class Split:
    """Seconds of the parts of a step; those within others count in both."""

    place: Place
    seconds: Counter[str] = field(default_factory=Counter)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.place.wait()
        start = time.perf_counter()
        yield
        self.place.wait()
        self.seconds[name] += time.perf_counter() - start

    def parts(self, steps: int) -> dict[str, float]:
        """Of one step, each second once."""
        s = self.seconds
        apart = {
            "sampling": s["collect"] - s["reference"],
            "reference": s["reference"],
            "forward": s["forward"],
            "backward": s["gradient"] - s["forward"],
            "optimizer": s["update"] - s["gradient"],
            "bound": s["bound"],
        }
        return {name: seconds / steps for name, seconds in apart.items()}


def timed(split: Split) -> type:
    """The `pg` learner with its parts measured."""
    import torch

    from paretune.training.learners.policy_gradient import PolicyGradient

    class Timed(PolicyGradient):
        def collect(self, *args: Any, **kwargs: Any) -> Any:
            with split.part("collect"):
                return super().collect(*args, **kwargs)

        def logp(self, *args: Any, gates_NK: Any, **settings: Any) -> Any:
            with split.part("reference" if gates_NK is None else "forward" if torch.is_grad_enabled() else "bound"):
                return super().logp(*args, gates_NK=gates_NK, **settings)

        def gradient(self, *args: Any, **kwargs: Any) -> Any:
            with split.part("gradient"):
                return super().gradient(*args, **kwargs)

        def update(self, *args: Any, **kwargs: Any) -> Any:
            with split.part("update"):
                return super().update(*args, **kwargs)

    return Timed


def ours(
    sizes: Sizes, place: Place, shape: Mapping[str, Any], *, warm: int = WARM, steps: int = TIMED, checkpointing: bool = False
) -> dict[str, float]:
    """Seconds of a step, of its parts, and peak MiB of the embedded loop."""
    from paretune.registry import describe
    from paretune.training.spec import TrainSpec

    split, stamps = Split(place), [0.0]

    def stamp(record: Mapping[str, Any]) -> None:
        place.wait()
        stamps.append(time.perf_counter())
        if record["step"] == warm:
            split.seconds.clear()

    budget = {"samples": sizes.rows * (warm + steps), "batch": sizes.rows, "group": sizes.group, "checkpointing": checkpointing}
    settings = {"rank": RANK, "alpha": ALPHA, "optimizer": "adam", "lr": LR, "device": place.device, **budget}
    learner = timed(split)(log_every=1, checkpoint_every=10**6, **settings)
    task = task_of(sizes, shape, place)
    spec = TrainSpec(task=describe(task), learner=describe(learner), preference=(1 / 3,) * 3, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        _, mebibytes = place.peak(lambda: learner.train(spec, task, Path(folder), progress=stamp))
    assert len(stamps) == 1 + warm + steps
    seconds = (stamps[-1] - stamps[warm]) / steps if warm else sum(split.parts(steps).values())
    return {"step": seconds, "mebibytes": mebibytes, **split.parts(steps)}


def theirs(sizes: Sizes, place: Place) -> dict[str, float]:
    """Seconds of a step and peak MiB of TRL's GRPOTrainer."""
    from common import grpo

    stamps: list[float] = []

    def stamp() -> None:
        place.wait()
        stamps.append(time.perf_counter())

    task = task_of(sizes, sizes.shape, place)
    settings = {"rows": sizes.rows, "group": sizes.group, "tokens": sizes.new, "steps": WARM + TIMED, "cpu": not place.cuda}

    def work() -> None:
        prompts = [prompt.text for prompt in task.prompts("train")]
        given = rewards(sizes.shape["vocab_size"])
        grpo(*task.load(), prompts=prompts, rewards=given, rank=RANK, alpha=ALPHA, beta=BETA, lr=LR, stamp=stamp, **settings)

    _, mebibytes = place.peak(work)
    return {"step": (stamps[-1] - stamps[WARM - 1]) / TIMED, "mebibytes": mebibytes}


Left = Callable[[], float]  # seconds
Figures = dict[str, float | None]


def training(sizes: Sizes, place: Place, left: Left, figures: Figures, notes: dict[str, Any]) -> None:
    sides = {"paretune": lambda: ours(sizes, place, sizes.shape), "trl": lambda: theirs(sizes, place)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    figures |= {"gpu_step_speed_vs_trl": None, "gpu_step_memory_vs_trl": None}
    for pair in range(sizes.pairs):
        began = left()
        for name in list(sides)[:: 1 if pair % 2 == 0 else -1]:
            try:
                found[name].append(sides[name]())
            except Exception as error:
                if name == "paretune" or isinstance(error, TimeoutError):
                    raise
                notes["trl"] = f"not measured: {brief(error)}"
                del sides["trl"]
            figures |= summary(found)
        notes["runs"] = found
        if began - left() > left():  # another pair takes as long
            break


def summary(found: Mapping[str, Sequence[Mapping[str, float]]]) -> Figures:
    """Medians of Paretune's runs, and of the ratios of pairs."""
    made: Figures = {}
    if own := found["paretune"]:
        median = {key: statistics.median(run[key] for run in own) for key in own[0]}
        made = {"gpu_step_seconds": median.pop("step"), "gpu_step_mib": median.pop("mebibytes")}
        made |= {f"gpu_step_{part}_seconds": value for part, value in median.items()}
    if pairs := list(zip(found["paretune"], found["trl"], strict=False)):
        made["gpu_step_speed_vs_trl"] = statistics.median(trl["step"] / mine["step"] for mine, trl in pairs)
        made["gpu_step_memory_vs_trl"] = statistics.median(mine["mebibytes"] / trl["mebibytes"] for mine, trl in pairs)
    return made


# Decoding


def generated(model: Any, rows: int, width: int, length: int, **more: Any) -> Any:
    """transformers' own sampling, on the prompts of `decode.decode`."""
    import torch

    from paretune.seeds import generator

    ids_NT = torch.from_numpy(generator(0, "decode").integers(1, model.config.vocab_size, (rows, width))).to(model.device)
    chosen = {"do_sample": True, "top_k": 0, "max_new_tokens": length, "min_new_tokens": length}
    made = model.generate(input_ids=ids_NT, attention_mask=torch.ones_like(ids_NT), **chosen, **more)
    assert made.shape == (rows, width + length)
    return made


def paths(sizes: Sizes, place: Place) -> dict[str, Callable[[int], Any]]:
    """What is compared, as functions of the batch."""
    from decode import EXPERTS, Tokenizer, adapters, decode
    from paretune.policy.lora.bank import LoraBank
    from paretune.policy.mixing.parameter import ParameterMix, ReferencePolicy
    from paretune.policy.mixing.predictions import LogitMix

    model, bank = plain_model(sizes.shape, place), adapters(EXPERTS, model=plain_model(sizes.shape, place))
    plain = ReferencePolicy(LoraBank.attach(plain_model(sizes.shape, place), names=[], seed=0), Tokenizer())
    policies = {"plain": plain, "gated": ParameterMix(bank, Tokenizer()), "logit": LogitMix(bank, Tokenizer())}

    def by_policy(policy: Any) -> Callable[[int], Any]:
        return lambda rows: decode(policy, rows, sizes.decoded, width=sizes.prompt)

    return {
        "generate": lambda rows: generated(model, rows, sizes.prompt, sizes.decoded),
        **{name: by_policy(policy) for name, policy in policies.items()},
    }


def compared(
    runs: Mapping[str, Callable[[int], Any]], against: Mapping[str, Sequence[str]], sizes: Sizes, place: Place, left: Left
) -> Iterator[tuple[Figures, int]]:
    """For each batch: tokens per second of `runs`, how many times as fast those of `against` are as others, and the count of rounds."""
    from common import alternated, times_as_fast

    for i, batch in enumerate(sizes.batches):
        end = left() * (1 - 1 / (len(sizes.batches) - i))  # each batch has an equal part of the time
        here = {name: partial(run, batch) for name, run in runs.items()}
        seconds = alternated(here, sizes.rounds, wait=place.wait, left=lambda end=end: left() - end)
        speed = {name: batch * sizes.decoded / statistics.median(rounds) for name, rounds in seconds.items()}
        figures: Figures = {f"gpu_{name}_tokens_per_second_b{batch}": value for name, value in speed.items()}
        figures |= {f"gpu_{a}_vs_{b}_b{batch}": times_as_fast(seconds, a, b) for a, others in against.items() for b in others}
        yield figures, len(seconds["generate"])


def decoding(sizes: Sizes, place: Place, left: Left, figures: Figures, notes: dict[str, Any]) -> None:
    against = {"plain": ("generate",), "gated": ("generate", "plain"), "logit": ("generate", "plain")}
    notes["rounds"] = []
    for found, rounds in compared(paths(sizes, place), against, sizes, place, left):
        figures |= found
        notes["rounds"].append(rounds)


def static(sizes: Sizes, place: Place, left: Left, figures: Figures, notes: dict[str, Any]) -> None:
    from transformers import CompileConfig

    model, shape = plain_model(sizes.shape, place), (sizes.prompt, sizes.decoded)
    fixed = {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}
    runs = {"generate": lambda rows: generated(model, rows, *shape), "static": lambda rows: generated(model, rows, *shape, **fixed)}
    notes |= {"compiled": place.cuda, "used_by_paretune": False, "rounds": []}
    for found, rounds in compared(runs, {"static": ("generate",)}, sizes, place, left):
        figures |= {name: value for name, value in found.items() if "static" in name}
        notes["rounds"].append(rounds)


def large(sizes: Sizes, place: Place, left: Left, figures: Figures, notes: dict[str, Any]) -> None:
    if place.cuda:
        import torch

        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < LARGE_GIB:
            raise Skip(f"needs {LARGE_GIB} GiB of free memory on the device; found: {free:.0f}")
    one = ours(sizes, place, sizes.large, warm=0, steps=1, checkpointing=True)
    figures |= {"gpu_7b_step_mib": one["mebibytes"], "gpu_7b_first_step_seconds": one["step"]}


# The whole

SECTIONS: dict[str, tuple[Callable[[Sizes, Place, Left, Figures, dict[str, Any]], None], int]] = {
    "training": (training, 170),
    "decoding": (decoding, 120),
    "static": (static, 90),
    "large": (large, 60),
}


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again and again: somebody may catch it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(sizes: Sizes, place: Place, wanted: Sequence[str], out: Path | None = None, began: float | None = None) -> int:
    """Run the sections in their order; returns how many failed. `began` is when the time that may be spent began."""
    from common import emit, write

    began = time.monotonic() if began is None else began
    figures: Figures = {}
    context: dict[str, Any] = {"versions": versions(), "skipped": {}, "seconds": {}}
    failed = 0
    for name, (section, allowance) in SECTIONS.items():
        start = time.monotonic()
        rest, notes = LIMIT - SPARE - (start - began), context.setdefault(name, {})
        try:
            if name not in wanted:
                raise Skip("not asked for")
            if rest < allowance:
                raise Skip(f"may take {allowance} s; found: {max(rest, 0):.0f} s left of {LIMIT}")
            with stopped_after(allowance), contextlib.redirect_stdout(sys.stderr):
                section(sizes, place, lambda end=start + allowance: end - time.monotonic(), figures, notes)
        except Exception as error:
            failed += not isinstance(error, Skip)
            context["skipped"][name] = str(error) if isinstance(error, Skip) else brief(error)
            print(f"{name}: {context['skipped'][name]}", file=sys.stderr, flush=True)
        context["seconds"][name] = round(time.monotonic() - start, 1)
        if out is not None:
            write(figures, out, **context)
    emit(figures, out, **context)
    return failed


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "trl")
    return {name: metadata.version(name) for name in names if any(True for _ in metadata.distributions(name=name))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="a few tokens of a small model")
    parser.add_argument("--carry", type=Path, help="a folder that --fill has filled")
    parser.add_argument("--fill", type=Path, help="download into this folder what the GPU machine lacks, and stop")
    parser.add_argument("--python", default=HERE, help="of the GPU machine, for --fill")
    given = parser.parse_args(argv)
    if given.fill:
        fill(given.fill, given.python)
        return
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL would spread over all of them
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    with tempfile.TemporaryDirectory() as home:
        unpacked = carry(given.carry, Path(home)) if given.carry else []
        print(f"carried: {', '.join(unpacked) or 'nothing'}", file=sys.stderr)
        import torch
        import transformers

        if given.device.startswith("cuda") and not torch.cuda.is_available():
            raise SystemExit("a GPU is measured on a GPU; found: no CUDA device. --tiny --device cpu tries the script out")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        faulthandler.dump_traceback_later(LIMIT - (time.monotonic() - BEGAN), exit=True)  # a device that hangs hears no signal
        failed = measure(SMALL if given.tiny else Sizes(), Place(given.device), given.sections, given.out, BEGAN)
        faulthandler.cancel_dump_traceback_later()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
