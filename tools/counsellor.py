"""Make the reference model of the text task: a small Llama with a BPE vocabulary of its own, pre-trained on the task's train dialogues.

    python tools/counsellor.py [--out src/paretune/tasks/reflection/weights] [--steps 750]

Fluent and without direction, because the answers that it learns from are. It ships in half precision (4 MB): three minutes of one core
are too long for a first use. One thread and seeded draws; another build of PyTorch gives other rounding. Raise the task's version when
you replace the model: results know it by that.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from paretune.seeds import forked_torch, generator, seed_for
from paretune.tasks.reflection.language import dialogues
from paretune.tasks.reflection.task import MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EOS_TEXT = "<eos>"


@dataclass(frozen=True)
class Spec:
    """Everything the reference depends on."""

    seed: int = 0
    width: int = 192
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1536
    dialogues: int = 18_000
    batch: int = 24
    steps: int = 750
    lr: float = 0.02  # of Muon, for the matrices; the embeddings get a tenth of it with Adam


def make(spec: Spec, out: Path) -> None:
    """Train tokenizer and model, and write both."""
    texts = dialogues(spec.dialogues, spec.seed)
    tokenizer = _tokenizer(spec, texts)
    _pretrain(spec, tokenizer, texts).half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tokenizer(spec: Spec, texts: list[tuple[str, str]]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=[EOS_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((prompt + said for prompt, said in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TEXT, pad_token=EOS_TEXT, padding_side="left")


def _pretrain(spec: Spec, tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]]) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=3 * spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    ids = tokenizer([prompt + said for prompt, said in texts])["input_ids"]
    starts = [len(row) for row in tokenizer([prompt for prompt, _ in texts])["input_ids"]]
    order = generator(spec.seed, "pre-training").permuted(
        np.tile(np.arange(len(ids)), (1 + spec.steps * spec.batch // len(ids), 1)), axis=1
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order on every machine
    try:
        with forked_torch(seed_for(spec.seed, "counsellor")):
            model = LlamaForCausalLM(config)
        matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "lm_head" not in name]
        inner = {id(p) for p in matrices}
        outer = [p for p in model.parameters() if id(p) not in inner]
        optimizers = [torch.optim.Muon(matrices, lr=spec.lr, weight_decay=0.0), torch.optim.AdamW(outer, lr=spec.lr / 4, weight_decay=0.0)]
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(o, o.defaults["lr"], total_steps=spec.steps, pct_start=0.1, cycle_momentum=False)
            for o in optimizers
        ]
        for step in range(spec.steps):
            places = order.ravel()[step * spec.batch : (step + 1) * spec.batch].tolist()
            rows = [ids[i] for i in places]
            width = max(map(len, rows)) + 1
            tokens = torch.tensor([row + [eos] * (width - len(row)) for row in rows])
            first = [starts[i] - 1 for i in places]
            wanted = torch.tensor(
                [[-100] * f + row[f + 1 :] + [eos] + [-100] * (width - len(row) - 1) for row, f in zip(rows, first, strict=True)]
            )
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            if step % 50 == 0:
                print(f"step {step}: {loss.item():.3f} nats per token of the answers", flush=True)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=Spec.steps)
    given = parser.parse_args()
    make(Spec(steps=given.steps), given.out)


if __name__ == "__main__":
    main()
