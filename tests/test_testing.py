"""The conformance suites pass what ships and what a third party writes in one file, and catch what is broken, one way at a time."""

import dataclasses
import textwrap
from typing import ClassVar

import numpy as np
import pytest
import torch

from paretune.methods.experts import Experts
from paretune.objectives.base import Objective
from paretune.policy.returns import returns_of
from paretune.policy.rules import Constant, GateRule
from paretune.registry import GATE_RULES, LEARNERS, METHODS, OBJECTIVES, TASKS, load_plugin
from paretune.seeds import generator
from paretune.tasks.exact.task import ExactTask
from paretune.testing import ConformanceError, check_method, check_objective, check_task, quick_task
from paretune.testing import methods as testing
from paretune.training.cost import Cost
from paretune.training.learners.base import Learner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(Learner):
    """Trains nothing: random adapters that depend on the seed and the preference."""

    def train(self, spec, task, work, *, parents=None, progress=None):
        policy = self.start(spec, task, parents or {})
        rng = generator(spec.seed, "noise", str(spec.preference))
        with torch.no_grad():
            for parameter in policy.bank.parameters():
                parameter.add_(torch.from_numpy(rng.normal(0, 0.05, parameter.shape)).float())
        policy.bank.save("policy", work)
        return Cost()


@pytest.fixture(scope="module", autouse=True)
def own_names():
    """What these tests register does not outlive them."""
    registries = (METHODS, LEARNERS, OBJECTIVES, GATE_RULES, TASKS)
    assert all(list(registry) for registry in registries), "loads what ships"
    before = [dict(registry._classes) for registry in registries]
    LEARNERS.register("toy-noise")(Noise)
    GATE_RULES.register("doubled")(Doubled)
    yield
    for registry, classes in zip(registries, before, strict=True):
        registry._classes.clear()
        registry._classes.update(classes)


NOISE = Noise(rank=2)
TASK = quick_task()
SHIPPED = sorted(name for name in METHODS if METHODS[name].__module__.startswith("paretune."))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_passes(name, count):
    check_method(name, task=quick_task(objective_count=count))


@pytest.mark.parametrize("mixing", ["parameter", "factor"])
def test_other_mixers_pass(mixing):
    check_method({"name": "experts", "mixing": mixing}, task=TASK)


PLUGIN = '''
"""A third party's method, objective and task, in one file."""

from dataclasses import dataclass, replace
from typing import ClassVar

from paretune.policy.lora.bank import LoraBank
from paretune.methods.base import Card, Method
from paretune.policy.rules import Nearest
from paretune.objectives.base import Objective, text_of
from paretune.policy.base import MIXINGS
from paretune.policy.family import Family
from paretune.registry import METHODS, OBJECTIVES, TASKS, describe
from paretune.tasks.exact.task import ExactTask
from paretune.training.spec import TrainSpec


@METHODS.register("third-party-staged")
@dataclass(frozen=True)
class Staged(Method):
    """Uniform weights first, then both experts from there; the nearest one answers."""

    card: ClassVar[Card] = Card(
        category="multi-policy", summary="warm starts", source="none", differs="nothing", hides="nothing", trainings="M + 1",
        forwards_per_token="1", zero_shot=True,
    )
    symmetric: ClassVar[bool] = True

    def specs(self, task, learner, seed):
        given = dict(task=describe(task), learner=describe(learner), seed=seed)
        first = TrainSpec(preference=(0.5, 0.5), **given)
        return [first] + [TrainSpec(preference=w, init_from=(first.key,), **given) for w in ((1.0, 0.0), (0.0, 1.0))]

    def plan(self, task, learner, done, seed):
        first, *rest = self.specs(task, learner, seed)
        return [first] if first.key not in done else rest

    def policy(self, task, learner, done, seed):
        specs = self.specs(task, learner, seed)
        adapters = {f"stage-{i}": done[s.key].path for i, s in enumerate(specs)}
        model, tokenizer = task.load()
        policy = MIXINGS["parameter"](LoraBank.load(model, adapters), tokenizer)
        rule = Nearest(points_KM=tuple(s.preference for s in specs))
        from dataclasses import asdict

        return Family(policy, rule, task.objectives, task.base(), adapters, {"card": asdict(self.card)})


@OBJECTIVES.register("third-party-vowels")
@dataclass(frozen=True)
class Vowels(Objective):
    low: float = 0.0
    high: float = 1.0

    def __call__(self, prompts, completions, **columns):
        texts = [text_of(c) for c in completions]
        return [sum(c in "aeiou" for c in t) / len(t) if t else None for t in texts]


@TASKS.register("third-party-exact")
@dataclass(frozen=True)
class Other(ExactTask):
    alphabet: int = 4
    length: int = 3
    prompt_count: int = 2
    width: int = 32
    layers: int = 1
'''


def test_a_third_partys_file_passes(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(textwrap.dedent(PLUGIN))
    load_plugin(path)
    check_method("third-party-staged", task=TASK)
    check_objective("third-party-vowels")
    check_task("third-party-exact")


# One broken promise each. Every class below is `experts`, changed in one place.


class Impure(Experts):
    calls: ClassVar[list] = []

    def plan(self, task, learner, done, seed):
        Impure.calls.append(1)
        return super().plan(task, learner, done, seed)[: len(Impure.calls) % 2 + 1]


class Endless(Experts):
    def plan(self, task, learner, done, seed):
        spec = super().plan(task, learner, done, seed)[0]
        return [dataclasses.replace(spec, seed=len(done))]


class Repeats(Experts):
    def plan(self, task, learner, done, seed):
        return list(super().plan(task, learner, done, seed)) * 2


class Elsewhere(Experts):
    def plan(self, task, learner, done, seed):
        return super().plan(dataclasses.replace(task, seed=task.seed + 1), learner, done, seed)


class OneSeed(Experts):
    def plan(self, task, learner, done, seed):
        return super().plan(task, learner, done, 0)


class Meddles(Experts):
    def plan(self, task, learner, done, seed):
        done["x"] = None
        return super().plan(task, learner, done, seed)


class Overweight(Experts):
    def plan(self, task, learner, done, seed):
        return [dataclasses.replace(s, preference=tuple(2 * w for w in s.preference)) for s in super().plan(task, learner, done, seed)]


class Orphan(Experts):
    def plan(self, task, learner, done, seed):
        return [dataclasses.replace(s, init_from=("nowhere",)) for s in super().plan(task, learner, done, seed)]


class OrderSensitive(Experts):
    def plan(self, task, learner, done, seed):
        first, second = super().plan(task, learner, done, seed)
        keys = [first.key, second.key]
        return [first, second] if not done or next(iter(done)) == keys[0] else [first]


class Batchwise(GateRule):
    registered_name = "identity"

    def gates(self, w_WM):
        return np.asarray(w_WM) / np.asarray(w_WM).max()


class DependsOnTheBatch(Experts):
    def policy(self, task, learner, done, seed):
        family = super().policy(task, learner, done, seed)
        family.rule = Batchwise()
        return family


class Lost(Experts):
    def policy(self, task, learner, done, seed):
        family = super().policy(task, learner, done, seed)
        other = dataclasses.replace(family, rule=Constant(gates_K=(1.0, 0.0)))
        family.save = other.save
        return family


class Nameless(Experts):
    def policy(self, task, learner, done, seed):
        family = super().policy(task, learner, done, seed)
        family.meta = {}
        return family


class Writes(Experts):
    def policy(self, task, learner, done, seed):
        for artifact in done.values():
            (artifact.path / "note.txt").write_text("was here")
        return super().policy(task, learner, done, seed)


class Random(Experts):
    def policy(self, task, learner, done, seed):
        family = super().policy(task, learner, done, seed)
        Random.scale = getattr(Random, "scale", 1.0) * 0.9
        family.rule = Scaled(Random.scale)
        return family


@dataclasses.dataclass(frozen=True)
class Scaled(GateRule):
    registered_name = "scaled"
    scale: float

    def gates(self, w_WM):
        return np.asarray(w_WM) * self.scale


class Crashes(Experts):
    def policy(self, task, learner, done, seed):
        return done["missing"]


class Favors(Experts):
    """Declares itself symmetric (inherited) and mixes the first expert in at double weight."""

    def policy(self, task, learner, done, seed):
        family = super().policy(task, learner, done, seed)
        family.rule = Doubled()
        return family


@dataclasses.dataclass(frozen=True)
class Doubled(GateRule):
    def gates(self, w_WM):
        return np.asarray(w_WM) * [1.0, 0.5]


class Unpaid(Experts):
    """Measures its policies, and says that this cost nothing."""

    def policy(self, task, learner, done, seed):
        family = super().policy(task, learner, done, seed)
        returns_of(task, family.policy, "train", samples=8, seed=seed).at(np.eye(2))
        return family


class Looks(Experts):
    """Scores responses without a meter."""

    def policy(self, task, learner, done, seed):
        task.score(task.prompts("train")[:1] * 2, ["", task.responses[1]])
        return super().policy(task, learner, done, seed)


class HalfPlanned(Experts):
    def plan(self, task, learner, done, seed):
        return super().plan(task, learner, done, seed)[:1]

    def policy(self, task, learner, done, seed):
        return METHODS.build("expert").policy(task, learner, done, seed)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Impure, "plan\\(\\) is a pure function of its arguments"),
        (Endless, "plan\\(\\) comes to an end"),
        (Repeats, "a wave asks for each training once"),
        (Elsewhere, "a training is on the task that was given"),
        (OneSeed, "the seed is part of every training"),
        (Meddles, "plan\\(\\) is a pure function of its arguments"),
        (Overweight, "spec.preference is a preference"),
        (Orphan, "a training starts from finished ones"),
        (OrderSensitive, "the order of `done` changed the plan"),
        (DependsOnTheBatch, "gates depend on the other rows"),
        (Lost, "other gates at the same preferences"),
        (Nameless, "a family carries its method's card"),
        (Writes, "finished trainings never change"),
        (Random, "policy\\(\\) is a pure function of its arguments"),
        (Crashes, "policy\\(\\) builds a family"),
        (Unpaid, "0 gate vectors and 0 responses in `cost`, 2 and 0 were measured"),
        (Looks, "0 gate vectors and 0 responses in `cost`, 0 and 2 were measured"),
        (Favors, "with the objectives swapped"),
        (HalfPlanned, "with the objectives swapped"),
    ],
)
def test_broken_methods_are_caught(broken, message, monkeypatch):
    monkeypatch.setattr(testing, "MAX_WAVES", 4)
    name = f"broken-{broken.__name__}"
    METHODS.register(name)(dataclasses.dataclass(frozen=True)(broken))
    with pytest.raises(ConformanceError, match=message) as caught:
        check_method(broken(), task=TASK, learner=NOISE)
    assert "remedy:" in str(caught.value)


def test_methods_must_be_registered_frozen_and_have_a_full_card():
    class Unregistered(Experts):
        pass

    with pytest.raises(ConformanceError, match="a method is registered"):
        check_method(Unregistered(), task=TASK, learner=NOISE)

    @METHODS.register("broken-thawed")
    class Thawed(testing.Method):
        plan = policy = None

    with pytest.raises(ConformanceError, match="a method is a frozen dataclass"):
        check_method(Thawed(), task=TASK, learner=NOISE)
    for change, message in (({"hides": " "}, "hides is empty"), ({"category": "other"}, "'other'"), ({"summary": "a\nb"}, "one line")):

        @METHODS.register(f"broken-card-{next(iter(change))}")
        @dataclasses.dataclass(frozen=True)
        class Card(Experts):
            card = dataclasses.replace(Experts.card, **change)

        with pytest.raises(ConformanceError, match=message):
            check_method(Card(), task=TASK, learner=NOISE)
    with pytest.raises(ConformanceError, match="a method is a subclass of Method"):
        check_method(TASK, task=TASK, learner=NOISE)


# Tasks


def test_the_quick_task_passes():
    check_task(quick_task(rho=-0.5))


class Restless(ExactTask):
    def prompts(self, split):
        prompts = list(super().prompts(split))
        Restless.turn = not getattr(Restless, "turn", False)
        return prompts[::-1] if Restless.turn else prompts


class Leaks(ExactTask):
    def prompts(self, split):
        return super().prompts("train")


class Flat(ExactTask):
    def score(self, prompts, completions):
        return super().score(prompts, completions)[:, 0]


class Compares(ExactTask):
    def score(self, prompts, completions):
        scores = super().score(prompts, completions)
        return scores - scores[:1] if len(scores) else scores


class Centers(ExactTask):
    """Advantages instead of scores: in any order the same, and without an enumeration nothing else shows it."""

    is_exact = False

    def score(self, prompts, completions):
        scores = np.array([[len(text), 0.5] for text in completions], dtype=np.float64).reshape(-1, 2)
        return scores - scores.mean(0) if len(scores) else scores


class Infinite(ExactTask):
    def score(self, prompts, completions):
        return super().score(prompts, completions) / np.zeros((1, 2))


class Shares(ExactTask):
    def load(self):
        if "kept" not in self.__dict__:
            self.__dict__["kept"] = super().load()
        return self.__dict__["kept"]


class Trains(ExactTask):
    def load(self):
        model, tokenizer = super().load()
        return model.train(), tokenizer


class LowFront(ExactTask):
    def optimum_logp_PR(self, w_M, split):
        return super().optimum_logp_PR(np.asarray(w_M) * 0.5, split)


class OtherTable(ExactTask):
    def rewards_PRM(self, split):
        return super().rewards_PRM(split) + 0.01


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Restless, "gives the same prompts every time"),
        (Leaks, "test prompts are not training prompts"),
        (Flat, r"an \(N, M\) float array"),
        (Compares, "another order of the batch gave other scores"),
        (Centers, "a completion scored alone got another score"),
        (Infinite, "an infinity"),
        (Shares, "two calls share their weights"),
        (Trains, "training mode"),
        (LowFront, "no policy exceeds the front"),
        (OtherTable, r"score\(\) and rewards_PRM\(\) agree"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_broken_tasks_are_caught(broken, message):
    TASKS.register(f"broken-{broken.__name__}")(dataclasses.dataclass(frozen=True)(broken))
    dials = {f.name: getattr(TASK, f.name) for f in dataclasses.fields(TASK)}
    with pytest.raises(ConformanceError, match=message):
        check_task(broken(**dials))


# Objectives


def test_functions_and_built_in_objectives_pass():
    def brevity(prompts, completions, **columns):
        return [None if not c else 1.0 / (1 + len(c)) for c in completions]

    check_objective(brevity)
    check_objective("length")

    def matches(completions, answer, **columns):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [float(a in t) for a, t in zip(answer, texts, strict=True)]

    check_objective(matches, columns={"answer": "sentence"})
    with pytest.raises(ConformanceError, match="missing 1 required positional argument: 'answer'"):
        check_objective(matches)


def one_number(prompts, completions, **columns):
    return 1.0


def too_few(prompts, completions, **columns):
    return [1.0]


def words(prompts, completions, **columns):
    return ["good" for _ in completions]


def infinite(prompts, completions, **columns):
    return [float("inf") for _ in completions]


def narrow(prompts, completions):
    return [0.0 for _ in completions]


def plain_only(prompts, completions, **columns):
    return [float(len(c.strip())) for c in completions]


def ranks(prompts, completions, **columns):
    return [float(i) for i in range(len(completions))]


def sorts(prompts, completions, **columns):
    completions.sort(key=str)
    return [0.0 for _ in completions]


def divides(prompts, completions, **columns):
    return [1.0 / len(c) for c in completions]


async def later(prompts, completions, **columns):
    return [0.0 for _ in completions]


calls = []


def counts(prompts, completions, **columns):
    calls.append(1)
    return [float(len(calls)) for _ in completions]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (one_number, "found:  float"),
        (too_few, "1 scores for 7 completions"),
        (words, "'good'"),
        (infinite, "scores are finite"),
        (narrow, "unexpected keyword argument"),
        (plain_only, "scores conversational prompts"),
        (ranks, "another order of the batch"),
        (sorts, "leaves its arguments as they are"),
        (divides, "ZeroDivisionError"),
        (later, "an ordinary function"),
        (counts, "two calls differ"),
        (3, "called with prompts and completions"),
    ],
)
def test_broken_objectives_are_caught(broken, message):
    with pytest.raises(ConformanceError, match=message):
        check_objective(broken)


def test_scores_outside_the_declared_range_are_caught():
    @OBJECTIVES.register("broken-range")
    @dataclasses.dataclass(frozen=True)
    class TooLong(Objective):
        low: float = 0.0
        high: float = 10.0

        def __call__(self, prompts, completions, **columns):
            return [float(len(c)) for c in completions]

    with pytest.raises(ConformanceError, match=r"17\.0 outside 0\.0 to 10\.0"):
        check_objective("broken-range")
