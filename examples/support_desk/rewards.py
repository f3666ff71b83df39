"""Two reward functions as one would write them for TRL's GRPOTrainer; nothing here knows about Paretune."""

COURTEOUS = ("thank you", "sorry", "please", "glad", "lovely day")


def polite(completions, **kwargs):
    """0 without a courteous phrase, 0.5 with one, 0.75 with two, ...: each new one counts half as much as the one before."""
    texts = [completion.lower() for completion in completions]
    return [1.0 - 0.5 ** sum(phrase in text for phrase in COURTEOUS) for text in texts]


def on_topic(completions, keywords, **kwargs):
    """The share of the prompt's `keywords` (a column of prompts.jsonl) that are in the answer."""
    return [sum(word in text.lower() for word in words) / len(words) for text, words in zip(completions, keywords, strict=True)]
