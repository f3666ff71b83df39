"""Make the small model that the recipe tunes: a byte-pair tokenizer and a two-layer Llama, both trained on `dialogues.jsonl`.

    python make_model.py [FOLDER] [--steps N]

It takes about 20 seconds on one core and writes `model/` beside this file: config, tokenizer and safetensors, what `save_pretrained`
of any causal language model writes. The same build of torch gives the same weights every time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paretune.seeds import forked_torch, generator

HERE = Path(__file__).parent
END = "<end>"
CHAT = (
    "{% for m in messages %}{{ {'user': 'Customer', 'assistant': 'Agent'}.get(m['role'], 'Note') }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Agent:{% endif %}"
)


def dialogues() -> list[str]:
    """One text per dialogue, without its end mark."""
    rows = [json.loads(line) for line in (HERE / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()]
    return [f"Customer: {row['customer']}\nAgent: {row['agent']}" for row in rows]


def make_tokenizer(texts: list[str], *, vocabulary: int = 1100) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with an end token, a chat template and, as with many models, no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=CHAT)


def make_model(folder: str | Path, *, steps: int = 600, batch: int = 16, rate: float = 4e-3, seed: int = 0) -> Path:
    """Train both and save them in `folder`; with 0 steps the weights are random."""
    texts = dialogues()
    tokenizer = make_tokenizer(texts)
    end = tokenizer.eos_token_id
    rows = [[*tokenizer(text)["input_ids"], end] for text in texts]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
    )
    with forked_torch(seed):
        model = LlamaForCausalLM(config)
    rng = generator(seed, "order of dialogues")
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=max(steps, 1))
    for _ in range(steps):
        chosen = [rows[i] for i in rng.choice(len(rows), size=batch, replace=False)]
        longest = max(map(len, chosen))
        ids = torch.tensor([row + [end] * (longest - len(row)) for row in chosen])
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in chosen])
        loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=HERE / "model")
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    print(make_model(given.folder, steps=given.steps))
