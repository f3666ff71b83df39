"""Answers of counselors of very different skill: questions, advice, sympathy, paraphrases and named feelings, with slips.

What they answer to statements of the train split is the corpus that the reference model was trained on (tools/counsellor.py).
"""

from __future__ import annotations

import numpy as np

from paretune.seeds import generator
from paretune.tasks.reflection.language import DETAILS, EVENTS, GLAD_DETAILS, NOUNS, Statement, listed, others, pick, sentence, statements
from paretune.tasks.reflection.objectives import FEELINGS

__all__ = ["answer", "dialogues", "prompt_of"]

QUESTIONS = (
    "How long has this been going on?",
    "What did your {who} say?",
    "Have you told your {who}?",
    "Can you tell me more about the {noun}?",
    "When did this start?",
    "What would you like to happen?",
)
ADVICE = (
    "You should talk to your {who}.",
    "Try to take a walk and get some rest.",
    "Maybe you could write a letter to your {who}.",
    "You should not think about it so much.",
    "Try to see the good side of it.",
)
SYMPATHY = ("I am sorry to hear that.", "That must be hard.", "Thank you for telling me.", "I hear you.", "That is a lot.", "I see.")
NAMING = ("You feel {feeling}.", "You sound {feeling}.", "You are {feeling} about it.", "You seem quite {feeling}.")
VALIDATION = ("It makes sense that you feel {feeling}.", "No wonder you are {feeling}.", "Anyone would be {feeling} in your place.")
MIRRORS = ("So {mirror}.", "{mirror}.", "It sounds like {mirror}.", "I hear that {mirror}.")
COMPLEX = (
    "You feel {feeling} because {mirror}.",
    "It sounds like {mirror}, and you are {feeling}.",
    "{mirror}, and that leaves you {feeling}.",
    "You are {feeling}: {mirror}.",
)
STYLES = (  # share, sentences
    (0.12, (QUESTIONS,)),
    (0.08, (ADVICE,)),
    (0.09, (SYMPATHY,)),
    (0.08, (NAMING,)),
    (0.05, (VALIDATION,)),
    (0.18, (MIRRORS,)),
    (0.16, (COMPLEX,)),
    (0.03, (SYMPATHY, QUESTIONS)),
    (0.03, (SYMPATHY, ADVICE)),
    (0.05, (MIRRORS, QUESTIONS)),
    (0.05, (NAMING, MIRRORS)),
    (0.05, (MIRRORS, VALIDATION)),
    (0.03, (COMPLEX, ADVICE)),
)
SLIP = 0.15  # how often an answer mistakes a slot of the situation
MISREAD = 0.4  # how often it names a feeling at random
PARROT = 0.3  # how often what should be a paraphrase is the client's own words


def answer(statement: Statement, rng: np.random.Generator) -> str:
    """What some counsellor says: of any style, and not always attentive."""
    share = np.array([share for share, _ in STYLES])
    kinds = STYLES[rng.choice(len(STYLES), p=share / share.sum())][1]
    slots = dict(statement.slots)
    if rng.random() < SLIP:
        slot = pick(rng, ("noun", "who", "who2"))
        other = {**others(rng), "noun": pick(rng, listed(NOUNS[EVENTS[statement.event].noun]))}
        slots[slot] = other[slot]
    family = pick(rng, list(FEELINGS)) if rng.random() < MISREAD else pick(rng, statement.feelings)
    slots |= {"feeling": pick(rng, FEELINGS[family]), "mirror": _mirror(statement, rng).format_map(slots)}
    if "{who}" not in statement.said:
        slots["who"] = slots["who2"]
    return " ".join(sentence(pick(rng, kind), slots).rstrip(".") + "." for kind in kinds).replace("?.", "?")


def _mirror(statement: Statement, rng: np.random.Generator) -> str:
    """The event, the second clause, or both, in the counsellor's words or in the client's with pronouns turned."""
    parrot = rng.random() < PARROT
    event = turned(statement.said) if parrot else pick(rng, EVENTS[statement.event].mirror)
    if not statement.detail or rng.random() < 0.35:
        return event
    known = {**DETAILS, **GLAD_DETAILS}[statement.detail]
    detail = turned(statement.detail.removeprefix("and ")) if parrot else pick(rng, known)
    return detail if rng.random() < 0.3 else f"{event}, and {detail}"


TURNED = {"I": "you", "my": "your", "me": "you", "am": "are", "us": "you both"}


def turned(clause: str) -> str:
    """A clause in the first person, in the second."""
    return " ".join(TURNED.get(word, word) for word in clause.split())


def prompt_of(text: str) -> str:
    """What the model reads before its answer."""
    return f"Client: {text}\nCounsellor:"


def dialogues(count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) of `count` statements of the train split."""
    rng = generator(seed, "answers")
    return [(prompt_of(s.text), " " + answer(s, rng)) for s in statements("train", count, seed)]
