"""The learner `trl-modpo`: what the embedded learner `modpo` learns from pairs, trained by TRL's DPOTrainer through its public interface.

DPO's loss is -log sigmoid(beta' d), d the difference of log pi - log pi_ref, better response minus worse. MODPO's is that of
(beta d - margin) / w_1. So beta' = beta / w_1, and half of margin / beta is added to the reference's log-probability of the better
response and taken from that of the worse. `precompute_ref_log_probs` makes DPOTrainer read these numbers from the batch, where the data
collator, an argument of the trainer's, moves them. The collator also brings the tokens as they were drawn: DPOTrainer itself tokenizes
text and ends every response with EOS, which is wrong for one that the length limit cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from paretune.errors import ConfigError
from paretune.registry import LEARNERS
from paretune.seeds import generator
from paretune.tasks.base import Task
from paretune.training.batch import Responses
from paretune.training.combine import Combine
from paretune.training.learners.base import draw_step
from paretune.training.learners.modpo import LACKS, Labels, check_labeled, compared
from paretune.training.loop.record import watch_unscored
from paretune.training.loop.run import memory_explained
from paretune.training.spec import TrainSpec
from paretune.training.trl.learner import SMALLER, TrlLearner
from paretune.types import Natural

__all__ = ["TrlModpo"]

UNUSED = {"prompt": "", "chosen": "", "rejected": ""}  # DPOTrainer wants texts and tokenizes them; the collator has tokens instead


@dataclass
class _Drawn:
    """What the whole training learns from, drawn before it begins, and how much of it has been seen."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)  # (N, M) per step, as the next two
    generated: list[int] = field(default_factory=list)  # tokens
    positions: list[int] = field(default_factory=list)  # that went through the model, padding included
    seen: int = 0  # steps
    recent: list[list[int]] = field(default_factory=list)  # see `watch_unscored`

    @property
    def samples(self) -> int:
        return sum(map(len, self.rewards[: self.seen]))

    @property
    def tokens(self) -> int:
        return sum(self.generated[: self.seen])

    @property
    def rewards_NM(self) -> np.ndarray:
        """Of the newest step seen."""
        return self.rewards[self.seen - 1]


@LEARNERS.register("trl-modpo", version=2)
@dataclass(frozen=True, kw_only=True)
class TrlModpo(TrlLearner):
    """MODPO by TRL's DPOTrainer: on the responses, pairs and labels that `modpo` has at the same seed. Fields as of `modpo` and `trl`.

    labels: "drawn" or "hard". `settings` are more arguments of DPOConfig. `micro_batch`: at most so many responses per backward, two to
    a pair.

    Source: MODPO (2310.03708); TRL's DPOTrainer (2305.18290).
    Differs: DPOTrainer has one better response to a pair: no "expected" labels, and a tie under "hard" is decided by a coin. An unscored
        pair counts as one without a difference, instead of not at all.
    Hides: as `modpo`; DPOTrainer reads pairs, so that every response, with its prompt, goes through policy and reference once for each
        of the group's others. All responses are drawn and scored first, by the base as the task loads it, and again where a killed
        training goes on.
    """

    trainers: ClassVar[tuple[str, ...]] = ("dpo",)
    keeps: ClassVar[Mapping[str, Any]] = {"trainer": "dpo", "labels": "drawn"}
    lacks: ClassVar[Mapping[str, tuple[str, str]]] = {**TrlLearner.lacks, **LACKS}

    trainer: Literal["rloo", "grpo", "dpo"] = "dpo"
    labeled: Natural | None = None
    labels: Labels = "drawn"

    def __post_init__(self):
        super().__post_init__()
        if self.labels == "expected":
            raise ConfigError(
                "TRL's DPOTrainer needs a better response in every pair, not the chance of it",
                found=f"labels={self.labels!r}",
                remedy='use labels="drawn" (method: {name: modpo, labels: drawn}), whose gradient has the same expectation, '
                'or learner "pg" for the embedded loop',
            )
        if (self.temperature, self.epochs) != (1.0, 1):
            raise ConfigError(
                "learner trl-modpo passes over its pairs once, at temperature 1",
                found=f"temperature={self.temperature:g}, epochs={self.epochs}",
                remedy='leave both at 1, or use learner "modpo", the embedded loop',
            )

    def accept(self, spec: TrainSpec) -> None:
        super().accept(spec)
        Combine.of(spec).check(sampled=False, offline="modpo")

    def train(self, spec, task, work, *, parents=None, progress=None):
        check_labeled(self.labeled, spec, task.objectives.names)
        return super().train(spec, task, work, parents=parents, progress=progress)

    def _source(self, spec: TrainSpec, task: Task) -> _Drawn:
        return _Drawn()

    def _pairs(self) -> tuple[int, int]:
        """Pairs of a backward, and backwards of a step."""
        pairs = self.batch * (self.group - 1) // 2
        most = max(1, (self.micro_batch or 2 * pairs) // 2)
        rows = max(n for n in range(1, min(most, pairs) + 1) if pairs % n == 0)
        return rows, pairs // rows

    def _beta(self, spec: TrainSpec, task: Task) -> float:
        """DPO's beta."""
        assert spec.preference is not None
        return task.beta / (max(spec.preference) if self.labeled is None else spec.preference[self.labeled])

    def _arguments(self, spec: TrainSpec, task: Task, work: Path, world: int) -> Any:
        import trl

        if world > 1:
            raise ConfigError(
                "learner trl-modpo trains in one process",
                found=f"{world} processes",
                remedy="run many trainings side by side with `paretune bench --workers`",
            )
        own = {
            **self._loop(spec, work, *self._pairs()),
            "beta": self._beta(spec, task),
            "loss_type": ["sigmoid"],
            "label_smoothing": 0.0,
            "precompute_ref_log_probs": True,
            "max_length": None,
            "train_sampling_strategy": "sequential",
            "include_num_input_tokens_seen": "all",
        }
        return self._configured(trl.DPOConfig, own, {})

    def _trainer(self, spec: TrainSpec, task: Task, args: Any, source: Any) -> Any:
        import trl
        from datasets import Dataset

        self._draw(spec, task, source)
        rows = Dataset.from_list([{**UNUSED, **row} for row in source.rows])
        trainer = self._built(trl.DPOTrainer, spec, task, args=args, train_dataset=rows, data_collator=_collate)
        trainer.add_callback(_counter(source))  # before the recorder, which reads the count
        return trainer

    @memory_explained(SMALLER)
    def _draw(self, spec: TrainSpec, task: Task, drawn: _Drawn) -> None:
        """All responses and pairs of the training; stops where too many could not be scored."""
        policy = self.start(spec, task, {})
        for step in range(self.steps):
            made = draw_step(self, policy, task, spec, step, reference=True)
            drawn.rewards.append(made.rewards_NM)
            drawn.generated.append(int(made.mask_NT.sum()))
            drawn.positions.append(made.prompt_ids_PT.numel() + made.tokens_NT.numel())
            last, names = step + 1 == self.steps, task.objectives.names
            drawn.recent = watch_unscored(drawn.recent, made.rewards_NM, names, limit=self.max_unscored, last=last)
            drawn.rows += self._rows(made, spec, task, step)

    def _rows(self, made: Responses, spec: TrainSpec, task: Task, step: int) -> list[dict[str, Any]]:
        """One for each pair of the step, in the order of `Pairs`: tokens, and the shift of the better response's reference."""
        margin, _, wins, known = compared(made, spec, step, group=self.group, labeled=self.labeled, labels=self.labels)
        coin = generator(spec.seed, "ties", step).random(wins.shape) < 0.5
        wins = np.where(wins == 0.5, coin, wins)
        first, second = np.triu_indices(self.group, 1)
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(made.prompt_ids_PT, made.prompt_mask_PT, strict=True)]
        answers = [ids[mask.bool()].tolist() for ids, mask in zip(made.tokens_NT, made.mask_NT, strict=True)]
        rows = []
        for p, prompt in enumerate(prompts):
            for q, (i, j) in enumerate(zip(first, second, strict=True)):
                better, worse, sign = (i, j, 1.0) if wins[p, q] else (j, i, -1.0)
                if not known[p, q]:
                    better = worse
                pair = {"better": answers[p * self.group + better], "worse": answers[p * self.group + worse]}
                rows.append({"context": prompt, **pair, "shift": float(sign * margin[p, q] / (2 * task.beta))})
        return rows

    def logged_kl(self, logs: Mapping[str, Any], spec: TrainSpec, task: Task) -> float | None:
        """KL(reference || policy): TRL logs beta' times the mean log pi - log pi_ref of each side, in which the margins cancel."""
        sides = float(logs["rewards/chosen"]) + float(logs["rewards/rejected"])
        return -sides / (2 * self._beta(spec, task))

    def _flops(self, count: int, tokens: int, source: Any) -> float:
        """The responses, then the pairs: once by the reference, forward and backward by the policy."""
        return 2.0 * count * sum(source.positions) + 6.0 * count * tokens


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """TRL's batch, better responses first: padded on the right, whatever the id that pads."""
    ends = [(row["context"], row[side]) for side in ("better", "worse") for row in rows]
    ids = [torch.tensor([*context, *answer]) for context, answer in ends]
    answered = [torch.tensor([0] * len(context) + [1] * len(answer)) for context, answer in ends]
    batch: dict[str, Any] = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "completion_mask": pad_sequence(answered, batch_first=True),
    }
    if "ref_chosen_logps" in rows[0]:  # not yet while DPOTrainer computes them
        shift = torch.tensor([row["shift"] for row in rows])
        batch["ref_chosen_logps"] = torch.tensor([row["ref_chosen_logps"] for row in rows]) + shift
        batch["ref_rejected_logps"] = torch.tensor([row["ref_rejected_logps"] for row in rows]) - shift
    return batch


def _counter(drawn: _Drawn) -> Any:
    """A callback that knows how many steps are done, after a resume too."""
    from transformers import TrainerCallback

    class Counter(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            drawn.seen = state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            drawn.seen = state.global_step

    return Counter()
