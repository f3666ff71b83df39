"""A small language of counselling: what clients say, and what counsellors of very different skill answer.

A statement is an event with a noun, often a second clause, and in half of the cases a feeling in words; in the other half the event
implies it. The corpus is compositional: a noun is known from several events, and *pairs* of event and noun are split into train,
validation and test, so that no situation of one split occurs in another while every word may.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

from paretune.seeds import generator
from paretune.tasks.reflection.objectives import FEELINGS

__all__ = [
    "DETAILS",
    "EVENTS",
    "GLAD_DETAILS",
    "NOUNS",
    "SPLITS",
    "Event",
    "Statement",
    "answer",
    "dialogues",
    "listed",
    "others",
    "pick",
    "prompt_of",
    "sentence",
    "situations",
    "statements",
]

T = TypeVar("T")

SPLITS = ("train", "validation", "test")

NOUNS = {
    "topic": "money, politics, religion, the chores, the children, the rent, the holidays, school, food, work, the will, smoking",
    "thing": "job, apartment, licence, contract, scholarship, pension, passport, permit, seat, allowance",
    "work": "report, thesis, budget, essay, proposal, manual, survey, design, translation, speech",
    "result": "biopsy, verdict, diagnosis, visa, scan, ruling, offer, refund, transfer, blood test",
    "test": "exam, audition, interview, driving test, trial, assessment, inspection, defence, tryout, final",
    "secret": "illness, divorce, debt, pregnancy, diary, drinking, past, salary, affair, adoption",
    "occasion": "birthday, wedding, graduation, party, concert, banquet, christening, reunion, premiere, retirement",
    "asset": "house, boat, farm, shop, cottage, piano, garage, caravan, orchard, bakery",
    "illness": "pneumonia, cancer, diabetes, asthma, arthritis, epilepsy, anaemia, hepatitis, migraine, insomnia",
    "role": "course, internship, apprenticeship, residency, fellowship, position, shift, training, programme, choir",
    "creation": "painting, novel, poem, garden, photo, recipe, song, film, sculpture, quilt",
    "activity": "run, dance, climb, swim, ride, ski, box, skate, row, hike",
    "place": "the city, the coast, the village, the island, the suburbs, the mountains, the north, the capital, the valley, the south",
}
PEOPLE = (
    "mother, father, brother, sister, friend, boss, partner, roommate, cousin, aunt, uncle, daughter, son, colleague, teacher, wife, "
    "husband, coach, grandmother, grandfather"
)
DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"
SCENES = "work, school, home, church, dinner, night, breakfast, practice"


@dataclass(frozen=True)
class Event:
    """`noun` is the class of its own slot; `say` are the client's words, `mirror` paraphrases in the second person."""

    noun: str
    say: tuple[str, ...]
    mirror: tuple[str, ...]
    feelings: tuple[str, ...]  # families that it implies


def _event(noun: str, feelings: str, say: str, mirror: str) -> Event:
    first, second = (tuple(part.strip() for part in text.split("/")) for text in (say, mirror))
    return Event(noun, first, second, tuple(feelings.split()))


EVENTS = {
    "argue": _event(
        "topic",
        "angry hurt",
        "I had a fight with my {who} about {noun} / my {who} and I argued about {noun} again",
        "you and your {who} disagree over {noun} / there was a quarrel with your {who} over {noun}",
    ),
    "unheard": _event(
        "topic",
        "frustrated hurt lonely",
        "my {who} never listens when I talk about {noun} / when I mention {noun} my {who} walks away",
        "your {who} ignores what you say about {noun} / on {noun} you are not heard by your {who}",
    ),
    "agreed": _event(
        "topic",
        "relieved happy",
        "my {who} and I finally agree about {noun} / my {who} gave in about {noun}",
        "you and your {who} settled {noun} / your {who} came round on {noun}",
    ),
    "lost": _event(
        "thing",
        "sad anxious",
        "I lost my {noun} on {day} / they took away my {noun} on {day}",
        "since {day} you no longer have your {noun} / your {noun} is gone since {day}",
    ),
    "got": _event(
        "thing",
        "relieved happy proud",
        "I finally got the {noun} I applied for / they gave me the {noun} after all",
        "the {noun} is yours now / you received your {noun} in the end",
    ),
    "deadline": _event(
        "work",
        "overwhelmed anxious",
        "I have to finish the {noun} by {day} / my boss wants the {noun} by {day}",
        "the {noun} is due on {day} / until {day} you must complete the {noun}",
    ),
    "rejected": _event(
        "work",
        "disappointed frustrated",
        "my {who} tore my {noun} to pieces / all my {who} had for my {noun} was criticism",
        "your {who} found fault with your {noun} / your {noun} was criticised by your {who}",
    ),
    "praised": _event(
        "work",
        "proud happy",
        "my {who} praised my {noun} in front of everyone / my {who} loved my {noun}",
        "your {who} admired your {noun} / your {noun} impressed your {who}",
    ),
    "wait": _event(
        "result",
        "anxious",
        "I am still waiting for the {noun} / the {noun} should have come on {day}",
        "there is no news of the {noun} / the {noun} has not arrived",
    ),
    "cleared": _event(
        "result",
        "relieved happy",
        "the {noun} came and it is good news / on {day} the {noun} turned out fine",
        "the {noun} went in your favour / you have good news about the {noun}",
    ),
    "passed": _event(
        "test",
        "proud happy relieved",
        "I passed my {noun} on {day} / my {noun} went better than I hoped",
        "you succeeded in your {noun} / your {noun} was a success",
    ),
    "failed": _event(
        "test",
        "disappointed sad",
        "I failed my {noun} on {day} / my {noun} was a disaster",
        "you did not succeed in your {noun} / your {noun} went badly",
    ),
    "upcoming": _event(
        "test",
        "anxious",
        "my {noun} is on {day} / on {day} I have my {noun}",
        "the {noun} is coming up on {day} / you face your {noun} on {day}",
    ),
    "exposed": _event(
        "secret",
        "hurt angry",
        "my {who} told everyone about my {noun} / my {who} made my {noun} public",
        "your {noun} was spread by your {who} / your {who} gave away your {noun}",
    ),
    "hiding": _event(
        "secret",
        "guilty anxious lonely",
        "I hide my {noun} from my {who} / my {who} must not find out about my {noun}",
        "you keep your {noun} from your {who} / your {who} does not know of your {noun}",
    ),
    "forgot": _event(
        "occasion",
        "guilty",
        "I forgot the {noun} of my {who} / I missed the {noun} of my {who}",
        "the {noun} of your {who} slipped your mind / you were not there for the {noun} of your {who}",
    ),
    "uninvited": _event(
        "occasion",
        "hurt lonely",
        "my {who} did not invite me to the {noun} / I was left out of the {noun} by my {who}",
        "your {who} kept you from the {noun} / you were not wanted at the {noun} of your {who}",
    ),
    "undecided": _event(
        "asset",
        "confused",
        "I do not know whether to sell the {noun} / some days I want to sell the {noun} and some days I do not",
        "you cannot decide about the {noun} / you go back and forth on selling the {noun}",
    ),
    "damaged": _event(
        "asset",
        "sad overwhelmed",
        "the storm destroyed my {noun} on {day} / on {day} a fire ruined my {noun}",
        "your {noun} was wrecked on {day} / since {day} your {noun} is in ruins",
    ),
    "sick": _event(
        "illness",
        "anxious sad",
        "my {who} is in hospital with {noun} / the doctors say my {who} has {noun}",
        "your {who} is being treated for {noun} / your {who} is ill with {noun}",
    ),
    "nursing": _event(
        "illness",
        "tired overwhelmed",
        "I care for my {who} because of the {noun} every night / my {who} has {noun} and needs me all day",
        "you look after your {who} because of the {noun} / the {noun} of your {who} takes all your time",
    ),
    "starting": _event(
        "role",
        "anxious hopeful",
        "I start the new {noun} on {day} / the new {noun} begins on {day}",
        "a new {noun} opens for you on {day} / your first day of the {noun} is {day}",
    ),
    "refused": _event(
        "role",
        "disappointed",
        "they gave the {noun} to someone else / I was turned down for the {noun}",
        "another person got the {noun} / the {noun} was denied to you",
    ),
    "prize": _event(
        "creation",
        "proud happy",
        "I won a prize for my {noun} / my {noun} took first place on {day}",
        "your {noun} earned an award / you were honoured for your {noun}",
    ),
    "mocked": _event(
        "creation",
        "hurt angry",
        "my {who} laughed at my {noun} / my {who} made fun of my {noun}",
        "your {noun} was mocked by your {who} / your {who} ridiculed your {noun}",
    ),
    "injured": _event(
        "activity",
        "sad frustrated",
        "since my injury I cannot {noun} / my knee does not let me {noun}",
        "your body keeps you from going to {noun} / the injury stops you when you want to {noun}",
    ),
    "healed": _event(
        "activity",
        "happy hopeful",
        "for the first time since {day} I can {noun} again / my knee lets me {noun} again",
        "you are able to {noun} once more / now nothing stops you when you want to {noun}",
    ),
    "alone": _event(
        "place",
        "lonely sad",
        "since I moved to {noun} nobody calls me / I know no one in {noun}",
        "you have no company in {noun} / there are no friends around you in {noun}",
    ),
    "leaving": _event(
        "place",
        "sad confused",
        "my {who} wants us to move to {noun} / on {day} my {who} leaves for {noun}",
        "your {who} is going to {noun} / {noun} is where your {who} wants to be",
    ),
}
GLAD = ("happy", "proud", "relieved", "hopeful")  # families of events that went well

DETAILS = {  # client's words -> paraphrases
    "and I cannot sleep": ("you lie awake",),
    "and I have not told my {who2}": ("you kept quiet towards your {who2}", "your {who2} has no idea"),
    "and I think about it at {scene}": ("it is on your mind at {scene}", "it follows you to {scene}"),
    "and my {who2} does not understand": ("your {who2} fails to see it", "you get no sympathy from your {who2}"),
    "and I do not know what to say to my {who2}": ("you lack words for your {who2}",),
    "and I cried in front of my {who2}": ("your {who2} saw your tears",),
    "and I yelled at my {who2}": ("you raised your voice at your {who2}",),
}
GLAD_DETAILS = {
    "and I called my {who2} at once": ("you let your {who2} know right away",),
    "and my {who2} celebrated with me": ("your {who2} shared the joy",),
    "and I smile about it at {scene}": ("it warms you at {scene}",),
    "and my {who2} does not care": ("your {who2} is cold about it",),
}
OPENERS = ("", "", "well, ", "honestly, ", "so, ")
SAID = ("I feel so {feeling}", "I am {feeling}", "it makes me {feeling}", "I feel {feeling} about it")


@dataclass(frozen=True)
class Statement:
    """What a client said, and what the grammar knows about it."""

    text: str
    event: str
    slots: dict[str, str]
    detail: str  # a key of DETAILS or GLAD_DETAILS, or ""
    said: str  # the client's words for the event, with slots
    feelings: tuple[str, ...]  # families that are right to name

    @property
    def situation(self) -> tuple[str, str]:
        return self.event, self.slots["noun"]


def listed(text: str) -> list[str]:
    """The words of one of the lists above."""
    return text.split(", ")


@cache
def situations(split: str) -> tuple[tuple[str, str], ...]:
    """The pairs of event and noun of one split: of ten nouns six for training and two each for validation and test, others by event.

    A noun that no training pair has is left out: the reference could not say it.
    """
    known = {noun for _, noun in _pairs("train")}
    return tuple(pair for pair in _pairs(split) if pair[1] in known)


def _pairs(split: str) -> list[tuple[str, str]]:
    share = {"train": (0, 6), "validation": (6, 8), "test": (8, 10)}[split]
    found = []
    for number, (name, event) in enumerate(EVENTS.items()):
        nouns = listed(NOUNS[event.noun])
        turned = [nouns[(place + 3 * number) % len(nouns)] for place in range(len(nouns))]
        low, high = (round(edge * len(nouns) / 10) for edge in share)
        found += [(name, noun) for noun in turned[low:high]]
    return found


def statements(split: str, count: int, seed: int) -> list[Statement]:
    """`count` different statements of a split, the same ones every time."""
    rng = generator(seed, "statements", split)
    found: dict[str, Statement] = {}
    while len(found) < count:
        made = _statement(rng, split)
        found.setdefault(made.text, made)
    return list(found.values())


def _statement(rng: np.random.Generator, split: str) -> Statement:
    known = situations(split)
    name, noun = known[rng.integers(len(known))]
    event = EVENTS[name]
    slots = {"noun": noun, **others(rng)}
    glad = event.feelings[0] in GLAD
    details = GLAD_DETAILS if glad else DETAILS
    detail = pick(rng, list(details)) if rng.random() < 0.5 else ""
    said = pick(rng, event.say)
    clause = said + (f", {detail}" if detail else "")
    text, feelings = sentence(pick(rng, OPENERS) + clause, slots), event.feelings
    if rng.random() < 0.5:
        alike = [family for family in FEELINGS if (family in GLAD) == glad]
        family = pick(rng, event.feelings if rng.random() < 0.85 else alike)
        feelings = (family,)
        text += " " + sentence(pick(rng, SAID), {"feeling": pick(rng, FEELINGS[family])})
    return Statement(text, name, slots, detail, said, feelings)


def others(rng: np.random.Generator) -> dict[str, str]:
    """People, day and scene, all different from each other."""
    who, who2 = rng.choice(listed(PEOPLE), 2, replace=False).tolist()
    return {"who": who, "who2": who2, "day": pick(rng, listed(DAYS)), "scene": pick(rng, listed(SCENES))}


def sentence(template: str, slots: dict[str, str]) -> str:
    """With its slots filled, a capital and a full stop."""
    text = template.format_map(slots)
    text = text[0].upper() + text[1:]
    return text if text[-1] in string.punctuation else text + "."


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of them, each as likely."""
    return choices[int(rng.integers(len(choices)))]


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
