"""Learners that TRL's trainers run: `TrlLearner`, what all of them share, and `trl`, which trains by RLOOTrainer or GRPOTrainer.

What a `TrainSpec` asks for is handed to TRL through its public interface: prompts in the embedded learner's order, its fresh adapter, its
optimizer and schedule; the objectives are combined by the drop-in reward. TRL does the loop: generation (its own, or vLLM's),
log-probabilities, baseline, loss, checkpoints, and many processes.

    accelerate launch --config_file examples/accelerate/ddp.yaml -m paretune.launch ROOT/logs/jobs/train-KEY.json

Every process calls `train`; the first one writes the same files as the embedded learner. While a training runs its checkpoints are TRL's
own, with a `paretune.json` and then a `DONE` with the hashes of all its files: a checkpoint that is not whole is not resumed from.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from paretune.errors import ConfigError, TrainingError
from paretune.files import disk_errors, note, seal, write_json
from paretune.hub import is_gguf, local_or_hub, quietly
from paretune.objectives.base import refuse_unscored
from paretune.policy.lora.bank import lora_config
from paretune.policy.lora.files import WEIGHTS_FILE, write_adapter
from paretune.registry import LEARNERS
from paretune.seeds import forked_torch, seed_for
from paretune.tasks.base import Task
from paretune.tasks.exact.optimum import landmarks
from paretune.training.batch import prompt_order
from paretune.training.cost import Cost, read_cost
from paretune.training.learners.base import SampledLearner, check_cast
from paretune.training.learners.policy_gradient import PolicySettings
from paretune.training.loop.checkpoint import (
    TrainLog,
    discard,
    is_finished,
    log_damage,
    mark_finished,
    packed,
    refuse_other,
    seal_damage,
    unpacked,
)
from paretune.training.loop.loggers import reporting
from paretune.training.loop.record import log_record
from paretune.training.loop.run import CHECKPOINT_SECONDS, memory_explained, not_finite
from paretune.training.loop.watch import KL_ROSE, unsaid, warnings_of
from paretune.training.spec import FOLDER, TrainSpec
from paretune.training.trl.reward import STATE, MultiObjectiveReward

__all__ = ["Trl", "TrlLearner", "newest", "recorder"]

FREE = {"report_to": "none", "ddp_find_unused_parameters": False, "save_total_limit": 2, "disable_tqdm": True}
OF_TRL = {  # what a line of the log takes from TRL's, where its trainer says so: entropy is per token, exact
    "entropy_per_token": "entropy",
    "clipped": "clip_ratio/region_mean",
    "length": "completions/mean_length",
    "cut": "completions/clipped_ratio",
    "logp_gap": "sampling/sampling_logp_difference/mean",
}
MARK, DONE = "paretune.json", "DONE"  # in a checkpoint of TRL's: what Paretune knows of it; it is whole
SMALLER = (
    "lower micro_batch (rows per backward; the result stays the same), set checkpointing: true, "
    'lower batch, or load the base smaller (dtype "bfloat16", quantize "4bit"); the last checkpoint is kept'
)


@dataclass(frozen=True, kw_only=True)
class TrlLearner(SampledLearner):
    """Base of the learners whose loop is TRL's: one fresh adapter at a fixed preference, trained by the trainer that a subclass makes."""

    trainers: ClassVar[tuple[str, ...]]
    lacks: ClassVar[Mapping[str, tuple[str, str]]] = {
        **dict.fromkeys(
            ("processes", "processes_timeout"),
            ("TRL's processes are those of accelerate", "accelerate launch --num_processes 4 -m paretune.launch JOB; see docs/trl.md"),
        ),
        "micro_tokens": ("TRL splits a batch by rows", "use micro_batch, rows per process and backward"),
        **dict.fromkeys(
            ("stop_cv", "stop_window", "validate_every", "validation_samples", "look_samples", "keep", "guard_drop", "patience"),
            ("TRL trains a fixed number of steps", "leave the fields of validation and of the stopping rule out"),
        ),
        **dict.fromkeys(
            ("log_samples", "log_samples_every"),
            ("TRL's trainers show responses themselves", "settings: {log_completions: true} prints those of each step"),
        ),
    }

    trainer: Literal["rloo", "grpo", "dpo"] = "rloo"
    settings: Mapping[str, Any] = field(default_factory=dict)  # more arguments of TRL's configuration
    quantize: Literal["4bit"] | None = None  # loads the base in NF4 (QLoRA)

    def __post_init__(self):
        super().__post_init__()
        if self.trainer not in self.trainers:
            raise ConfigError(
                "learner trl samples from the policy: trainer is rloo or grpo; learner trl-modpo learns offline: trainer is dpo",
                found=f"learner {self.registered_name}, trainer={self.trainer!r}",
                remedy="choose the other learner, or leave trainer out; with learner trl, method modpo trains with trl-modpo",
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                "TRL trains on the device that accelerate chooses",
                found=f"device={self.device!r}",
                remedy='device is "auto", "cpu" or "cuda" (CUDA_VISIBLE_DEVICES says which)',
            )
        for name, wants in (("vllm", self.settings.get("use_vllm")), ("bitsandbytes", self.quantize)):
            if wants and importlib.util.find_spec(name) is None:
                asked, extra = ("use_vllm", "vllm") if name == "vllm" else ("quantize", "quantization")
                raise ConfigError(f"{asked} needs the package {name}", found="not installed", remedy=f"pip install 'trl[{extra}]'")

    @abstractmethod
    def _source(self, spec: TrainSpec, task: Task) -> Any:
        """What the trainer learns from, and what counts it: samples, tokens, rewards_NM of the newest step, recent unscored ones."""

    @abstractmethod
    def _arguments(self, spec: TrainSpec, task: Task, work: Path, world: int) -> Any:
        """The configuration of TRL's trainer in `world` processes."""

    @abstractmethod
    def _trainer(self, spec: TrainSpec, task: Task, args: Any, source: Any) -> Any:
        """TRL's trainer, made by `_built`."""

    @abstractmethod
    def _flops(self, count: int, tokens: int, source: Any) -> float:
        """Of a base with `count` parameters, whose trainer saw `tokens`, padding included."""

    @abstractmethod
    def logged_kl(self, logs: Mapping[str, Any], spec: TrainSpec, task: Task) -> float | None:
        """Nats per response in a line of TRL's logs; None where it has no KL."""

    def train(self, spec, task, work, *, parents=None, progress=None) -> Cost:
        if is_finished(work):  # by a process that was killed before it could publish
            return read_cost(work)
        self.accept(spec)
        self._sharded()
        if task.validation():
            note(f"learner {self.registered_name} does not look at prompts that are set apart (prompts.validation): TRL trains to the end")
        world = int(os.environ.get("WORLD_SIZE", 1))
        source = self._source(spec, task)
        main = int(os.environ.get("RANK", 0)) == 0  # of several processes, the one that writes the log
        with (
            forked_torch(seed_for(spec.seed, "trl")),
            _explained(self.lr),
            reporting(self, spec, work, progress) if main else nullcontext(progress) as told,
        ):
            args = self._arguments(spec, task, work, world)
            trainer = self._trainer(spec, task, args, source)
            record = recorder(self, spec, task, work, source, told, world)  # its clock begins once the model is there
            sizes = trainer.model.num_parameters(), sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            trainer.add_callback(record)
            resume = newest(work, spec.key)
            try:
                trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            finally:
                record.close()
            seen, *unscored_M = np.sum(source.recent, axis=0).tolist()
            refuse_unscored(task.objectives.names, unscored_M, seen, limit=self.max_unscored)
            return self._finish(trainer, sizes, work, source, record.seconds)

    def accept(self, spec: TrainSpec) -> None:
        plain = spec.preference is not None and not spec.parents and spec.fresh is None and spec.rule is None
        if not plain:
            found = "a preference for every prompt" if spec.preference is None else "frozen or earlier adapters, or a rule of gates"
            raise ConfigError(
                "learner trl trains one fresh adapter at one preference",
                found=found,
                remedy='use learner "pg", the embedded learner, for this method',
            )
        if importlib.util.find_spec("trl") is None:
            raise ConfigError("learner trl needs the package trl", found="not installed", remedy="pip install 'paretune[trl]'")

    def _loop(self, spec: TrainSpec, work: Path, rows: int, parts: int) -> dict[str, Any]:
        """What all of TRL's trainers are told: steps of `parts` times `rows`, the optimizer, logs and checkpoints."""
        return {
            "output_dir": str(work / FOLDER),
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": parts,
            "max_steps": self.steps * self.epochs,
            "max_grad_norm": 1e30 if self.clip_norm is None else self.clip_norm,  # the norm is logged only where it is clipped
            "seed": seed_for(spec.seed, "trl") % 2**31,
            "remove_unused_columns": False,
            "gradient_checkpointing": self.checkpointing,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "steps",
            "save_steps": self.checkpoint_every * self.epochs,
            "save_only_model": False,  # a killed training goes on with its optimizer
            "use_cpu": self.device == "cpu" or not torch.cuda.is_available(),
            "learning_rate": self.lr,
            "lr_scheduler_type": self.schedule,
            "warmup_steps": self.warmup * self.epochs,
            "optim": "adamw_torch",
            "weight_decay": 0.0,
            "adam_beta1": self.betas[0],
            "adam_beta2": self.betas[1],
        }

    def _configured(self, made: Any, own: Mapping[str, Any], free: Mapping[str, Any]) -> Any:
        """TRL's configuration: `free` and `FREE` may be replaced by `settings`, `own` may not."""
        known = {f.name for f in dataclasses.fields(made)}
        for name in self.settings:
            if name in own or name not in known:
                taken = f"learner {self.registered_name} sets {name} itself, from its own fields and the task's"
                raise ConfigError(
                    f"settings are further arguments of {made.__name__}",
                    found=repr(name),
                    remedy=taken if name in own else _instead(name, made, known - set(own)),
                )
        precision = {"bf16": self.dtype == "bfloat16", "fp16": self.dtype == "float16"}
        with self._taken_by_trl():
            return made(**{**FREE, **precision, **free, **own, **self.settings})

    @contextmanager
    def _taken_by_trl(self) -> Iterator[None]:
        """ConfigError where TRL or transformers cannot be made with the `settings`."""
        try:
            yield
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            if not self.settings or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                "TRL takes the settings of its learners",
                found=f"{type(error).__name__}: {error}",
                remedy=f"change it, or leave it out of settings ({', '.join(self.settings)})",
            ) from error

    def _built(self, made: Any, spec: TrainSpec, task: Task, **given: Any) -> Any:
        """The trainer `made` with the embedded learner's first adapter, optimizer and schedule."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        from transformers import PrinterCallback

        model, tokenizer = self._load(task)
        config = lora_config(model, rank=self.rank, alpha=self.alpha, targets=self.targets)
        with forked_torch(seed_for(spec.seed, "lora", "policy")):  # as LoraBank.add
            wrapped = get_peft_model(model, config)
        first = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()}
        with self._taken_by_trl():
            trainer = made(model=wrapped.unload(), processing_class=tokenizer, peft_config=config, **given)
        set_peft_model_state_dict(trainer.model, first)
        trainer.remove_callback(PrinterCallback)
        if not self._sharded():
            weights = [p for p in trainer.model.parameters() if p.requires_grad]
            trainer.optimizer = self.new_optimizer(weights)
            trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda n: self.pace(n // self.epochs))
        return trainer

    def _sharded(self) -> bool:
        """Whether FSDP or DeepSpeed owns parameters and optimizer; ConfigError where the optimizer needs whole matrices."""
        on = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true")]
        on += [name.upper() for name in ("fsdp", "deepspeed") if self.settings.get(name)]
        if on and self.optimizer != "adam":
            raise ConfigError(
                f"{on[0]} splits the parameters over processes, and Muon needs whole matrices",
                found=f"optimizer={self.optimizer!r}",
                remedy='use optimizer="adam" (lr about 3e-3 for adapters of small models, 1e-5 to 1e-4 for large ones), or DDP',
            )
        return bool(on)

    def _load(self, task: Task) -> tuple[Any, Any]:
        model, tokenizer = task.load()
        if self.quantize is None:
            check_cast(model, self.dtype)
            return (model if self.dtype is None else model.to(getattr(torch, self.dtype))), tokenizer
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        base = task.base()
        if "model" not in base or is_gguf(base["model"]):
            raise ConfigError(
                "quantize needs a base that is a model with safetensors weights, on disk or on the hub",
                found=base.get("model", f"task {task.registered_name}"),
                remedy="leave quantize out, or name a model with safetensors weights",
            )
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        ends = model.generation_config
        with quietly("loading the model"):
            where = local_or_hub(base["model"])
            loaded = AutoModelForCausalLM.from_pretrained(where, revision=base.get("revision"), quantization_config=nf4)
        loaded.generation_config = ends
        return loaded, tokenizer

    def _finish(self, trainer: Any, sizes: tuple[int, int], work: Path, source: Any, seconds: float) -> Cost:
        """The first process writes adapter and ledger, then drops the checkpoints; a kill in between loses nothing."""
        from safetensors.torch import load_file

        final = work / FOLDER / "final"
        trainer.save_model(str(final))  # every process: with FSDP they all have a part
        count, trainable = sizes  # before anything split them
        cost = Cost(
            samples=source.samples,
            tokens=source.tokens,
            steps=trainer.state.global_step,
            flops=self._flops(count, trainer.state.num_input_tokens_seen, source),
            seconds=seconds,
            memory_bytes=4 * count + 12 * trainable,
            storage_bytes=4 * trainable,
        )
        if trainer.is_world_process_zero():
            with disk_errors(work):
                write_adapter(work, trainer.model.peft_config["default"], load_file(final / WEIGHTS_FILE))
            mark_finished(work, cost)
        trainer.accelerator.wait_for_everyone()
        return cost


def _instead(name: str, made: Any, known: set[str]) -> str:
    """A remedy for a setting that TRL's configuration `made` does not have."""
    import trl

    others = [config for config in (trl.RLOOConfig, trl.GRPOConfig, trl.DPOConfig) if name in {f.name for f in dataclasses.fields(config)}]
    if others:
        return f"it is an argument of {' and '.join(config.__name__ for config in others)}: leave it out, or choose that trainer"
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"TRL's documentation lists the arguments of {made.__name__}"


@contextmanager
def _explained(lr: float) -> Iterator[None]:
    """Say which knob; be quiet about what TRL and transformers will change between themselves."""
    try:
        with warnings.catch_warnings(), memory_explained(SMALLER):
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise TrainingError(
            "a policy gives probabilities",
            found="a next-token distribution with NaN or infinities",
            remedy=f"lower lr (now {lr:g}), or train in float32; the last checkpoint is kept",
        ) from error


def recorder(learner: TrlLearner, spec: TrainSpec, task: Task, work: Path, source: Any, progress: Any, world: int) -> Any:
    """A callback that writes train.jsonl as the embedded learner does, and says when a checkpoint is whole."""
    from accelerate import PartialState
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.log: TrainLog | None = None
            self.kl = 0.0  # nats per response, of the newest batch
            self.window: list[dict[str, Any]] = []
            self.began = self.saved = time.monotonic()

        @property
        def seconds(self) -> float:
            return time.monotonic() - self.began

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kept: dict[str, Any] = {"log": None, "seconds": 0.0, "window": [], "kl": 0.0}
            if state.global_step:
                kept = json.loads((work / FOLDER / f"checkpoint-{state.global_step}" / MARK).read_text())
                if STATE in state.stateful_callbacks:
                    source.load_state_dict(state.stateful_callbacks[STATE])
            self.began -= kept["seconds"]
            self.window, self.kl = unpacked(kept["window"]), kept["kl"]
            if state.is_world_process_zero:
                self.log = TrainLog(work, mark=kept["log"], began=self.began, tokens=source.tokens, progress=progress)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "grad_norm" not in logs:
                return
            loss, norm, step = float(logs["loss"]), float(logs["grad_norm"]), state.global_step // learner.epochs
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise not_finite(f"loss {loss:g}, gradient norm {norm:g}", state.global_step, learner.lr)
            kl = learner.logged_kl(logs, spec, task)
            self.kl = self.kl if kl is None else kl
            if state.global_step % learner.epochs:
                return
            told = {name: float(logs[theirs]) for name, theirs in OF_TRL.items() if logs.get(theirs) is not None}
            told |= getattr(source, "told", {})
            self.window.append({"rewards_NM": source.rewards_NM, "kl": self.kl, "loss": loss, "gradient_norm": norm, **told})
            if step == learner.steps or step % learner.log_every == 0:
                if self.log is not None:
                    lr = learner.lr * learner.pace(step - 1)
                    counted = {"step": step, "samples": source.samples, "tokens": source.tokens, "lr": lr}
                    record = log_record(task.objectives, self.window, **counted, group=learner.group)
                    found = warnings_of([*self.log.records, record], (), task, spec.preference, group=learner.group)
                    found.pop(KL_ROSE, None)  # it says what the embedded loop does about it
                    self.log.write(record | unsaid(found, self.log.records), steps=learner.steps)
                self.window = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            late = time.monotonic() - self.saved > CHECKPOINT_SECONDS
            if world == 1 and late and state.global_step % learner.epochs == 0:  # several processes would not agree on the time
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.saved = time.monotonic()
            PartialState().wait_for_everyone()  # every process has written its part
            if self.log is not None:
                folder = work / FOLDER / f"checkpoint-{state.global_step}"
                mark = {"key": spec.key, "log": self.log.mark(), "seconds": self.seconds, "window": packed(self.window), "kl": self.kl}
                with disk_errors(work):
                    write_json(folder / MARK, mark)
                    seal(folder, DONE)

        def close(self) -> None:
            if self.log is not None:
                self.log.__exit__()

    return Recorder()


def newest(work: Path, key: str) -> Path | None:
    """The newest whole checkpoint of this training. One that is damaged, or whose log is, goes, with a warning."""
    found = (mark.parent for mark in (work / FOLDER).glob(f"checkpoint-*/{DONE}"))
    for folder in sorted(found, key=lambda folder: int(folder.name.split("-")[1]), reverse=True):
        problems = seal_damage(folder, DONE)
        if not problems:
            mark = json.loads((folder / MARK).read_text())
            refuse_other(folder, mark["key"], key)
            problems = log_damage(work, mark["log"])
        if not problems:
            return folder
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # of several processes, each looks for itself
            discard(folder, problems)
    return None


@LEARNERS.register("trl")
@dataclass(frozen=True, kw_only=True)
class Trl(PolicySettings, TrlLearner):
    """TRL trains: "rloo" climbs J_w as `pg` does; "grpo" has the KL in its loss, per token. Fields mean what they mean for `pg`.

    One fresh adapter at a fixed preference. `settings` are more arguments of RLOOConfig or GRPOConfig, such as `use_vllm` and
    `vllm_mode`. `quantize` "4bit" loads the base in NF4 (QLoRA). `micro_batch` is rows per process and backward.

    Source: TRL's RLOOTrainer (RLOO, 2402.14740) and GRPOTrainer (2402.03300).
    Differs: responses come from TRL's own sampler, so one seed gives other samples than `pg`; with an aggregation, or a normalization
        other than "none" (and "batch" under "rloo"), the KL is not inside of what is normalized; weightings see the mean KL of the
        batch before instead of each response's.
    Hides: as `pg`; "grpo" climbs something other than J_w (k3 per token in the loss), which its fields must say.
    """

    trainers: ClassVar[tuple[str, ...]] = ("rloo", "grpo")
    in_processes: ClassVar[str] = "accelerate"

    def __post_init__(self):
        super().__post_init__()
        wanted = {"kl_in": "reward", "ratio": "sequence", "length": "sum", "baseline": "leave_one_out"}
        if self.trainer == "grpo":
            wanted = {"kl_in": "loss", "kl_estimator": "k3"} | ({"ratio": "token"} if self.length == "sum" else {})
        wrong = {name: value for name, value in wanted.items() if getattr(self, name) != value}
        if wrong:
            raise ConfigError(
                f"the fields of learner trl say what TRL's {self.trainer} trainer does",
                found=", ".join(f"{name}={getattr(self, name)!r}" for name in wrong),
                remedy="use " + ", ".join(f"{name}={value!r}" for name, value in wrong.items()) + ', or learner "pg"',
            )

    def accept(self, spec: TrainSpec) -> None:
        super().accept(spec)
        self.combine(spec).check(sampled=False, through_rewards=True)

    def _source(self, spec: TrainSpec, task: Task) -> MultiObjectiveReward:
        known = task.prompts("train")

        def scorer(given: Mapping[str, Any], step: int, first: int) -> np.ndarray:
            texts = [c if isinstance(c, str) else c[-1]["content"] for c in given["completions"]]
            streams = [seed_for(spec.seed, "reward noise", "trl", step, first + n) for n in range(len(texts))]
            return task.observe([known[place] for place in given["place"]], texts, streams=streams)

        assert spec.preference is not None
        return MultiObjectiveReward(
            task.objectives,
            spec.preference,
            group=self.group,
            trainer="rloo" if self.trainer == "rloo" else "grpo",
            **vars(self.combine(spec)),
            beta=task.beta,
            landmarks=landmarks(task) if task.is_exact else None,
            max_unscored=self.max_unscored,
            seed=spec.seed,
            scorer=scorer,
        )

    def _arguments(self, spec: TrainSpec, task: Task, work: Path, world: int) -> Any:
        if self.batch % world or (self.batch // world) % min(self.micro_batch or self.batch, self.batch // world):
            raise ConfigError(
                "a batch divides into processes, and a process's share into micro-batches",
                found=f"batch={self.batch}, {world} processes, micro_batch={self.micro_batch}",
                remedy="choose a batch that is a multiple of processes x micro_batch",
            )
        share = self.batch // world
        rows = min(self.micro_batch or share, share)
        own = {
            **self._loop(spec, work, rows, share // rows),
            "max_completion_length": task.max_new_tokens,
            "num_iterations": self.epochs,
            "steps_per_generation": share // rows,  # every step draws its own responses
            "generation_batch_size": None,
            "epsilon": self.clip_eps,
            "beta": task.beta,
            "temperature": self.temperature,
            "mask_truncated_completions": False,  # a response at the length limit is a response
            "shuffle_dataset": False,  # the rows are in the order that the learner wants
            **MultiObjectiveReward.settings_of(self.trainer, self.group, self.combine(spec)),
        }
        if own["use_cpu"] and world > 1:
            own["ddp_backend"] = "gloo"
        if self.trainer == "grpo":  # dr_grpo divides by the length limit: the same direction, and clipped at the same place
            own["loss_type"] = "grpo" if self.length == "token_mean" else "dr_grpo"
            own["importance_sampling_level"] = self.ratio
            own["max_grad_norm"] /= 1 if self.length == "token_mean" else task.max_new_tokens
        import trl

        return self._configured(trl.RLOOConfig if self.trainer == "rloo" else trl.GRPOConfig, own, {"top_p": 1.0, "top_k": 0})

    def _trainer(self, spec: TrainSpec, task: Task, args: Any, source: Any) -> Any:
        """TRL's trainer with the embedded learner's prompts."""
        import trl
        from datasets import Dataset

        known = task.prompts("train")
        order = prompt_order(spec.seed, 0, self.steps * (self.batch // self.group), len(known))
        rows = Dataset.from_list([{"prompt": prompt.raw, "place": place} for place, prompt in enumerate(known)]).select(order)
        made = trl.RLOOTrainer if self.trainer == "rloo" else trl.GRPOTrainer
        return self._built(made, spec, task, reward_funcs=[source], args=args, train_dataset=rows)

    def logged_kl(self, logs: Mapping[str, Any], spec: TrainSpec, task: Task) -> float | None:
        """Nats per response, where TRL has logged it: its own number is per token, and comes with a batch's first update only."""
        if "kl" not in logs or "completions/mean_length" not in logs:
            return None
        return float(logs["kl"]) * float(logs["completions/mean_length"])

    def _flops(self, count: int, tokens: int, source: Any) -> float:
        """Of a base with `count` parameters that saw `tokens`, padding included: one forward more than `pg`."""
        return (6.0 + 4.0 * self.epochs) * count * tokens
