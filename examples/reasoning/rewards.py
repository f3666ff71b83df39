"""A reward for the demanded form, in steps, with the signature of TRL's reward functions; nothing here knows about Paretune."""

import re

NUMBER = r"the answer is [-+]?\d[\d,]*(?:\.\d+)?"
STEPS = (  # each holds only where those before it hold
    re.compile(r"the answer is\b", re.IGNORECASE),
    re.compile(NUMBER, re.IGNORECASE),
    re.compile(rf"{NUMBER}\.?$", re.IGNORECASE),
    re.compile(rf"^{NUMBER}\.$", re.IGNORECASE),
)


def form(completions, **columns):
    """A quarter for each step to "The answer is 7.": the words; a number right after them; nothing after it; nothing else at all."""
    texts = [_text(completion) for completion in completions]
    return [sum(step.search(text) is not None for step in STEPS) / len(STEPS) for text in texts]


def _text(completion):
    """A text, or the last message of a list where prompts are conversations."""
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
