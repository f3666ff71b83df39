"""Tiny models with random weights for objectives: classifiers and encoders, saved as their publishers save them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from paretune.seeds import forked_torch

TEXTS = ["Human: where is my parcel? Assistant: It is on its way, sorry.", "That is a funny joke about a cat and a dog."] * 4


def gpt_tokenizer(chat_template=None):
    """Byte-level, with an end token, no padding token and no special tokens around a text, as GPT-2's."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", chat_template=chat_template)


def bert_tokenizer():
    """The same with [CLS] a [SEP] b [SEP] and a padding token, as BERT's."""
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "model_max_length": 64}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save(folder: Path, model, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gpt2_reward(folder: Path, *, labels=None, seed=0, chat_template=None) -> Path:
    """One output, or one per label: the last token of a decoder is read."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = gpt_tokenizer(chat_template)
    named = {"num_labels": 1} if labels is None else {"id2label": dict(enumerate(labels)), "label2id": {n: k for k, n in enumerate(labels)}}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, **ends, **named)
    with forked_torch(seed):
        model = GPT2ForSequenceClassification(config)
        model.score.weight.data.normal_(0, 1.0)
    return save(folder, model, tokenizer)


def bert(folder: Path, kind="BertForSequenceClassification", *, labels=("NO_HUMOR", "HUMOR"), seed=0, **changes) -> Path:
    import transformers

    tokenizer = bert_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    named = {"id2label": dict(enumerate(labels)), "label2id": {n: k for k, n in enumerate(labels)}}
    config = transformers.BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes, **named, **changes)
    with forked_torch(seed):
        model = getattr(transformers, kind)(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "position" not in name:
                parameter.data.normal_(0, 0.3)
    return save(folder, model, tokenizer)


def causal(folder: Path, *, seed=0, vocabulary=None) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = gpt_tokenizer()
    end = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=vocabulary or len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=end)
    with forked_torch(seed):
        model = GPT2LMHeadModel(config)
        model.transformer.wte.weight.data.normal_(0, 0.2)
    return save(folder, model, tokenizer)
