"""Costs: two ways to combine, and the rule "as if the method ran alone" against sums done by hand."""

import dataclasses

import numpy as np
import pytest

from oracles import small_task
from paretune.errors import StoreError
from paretune.methods import linear_support
from paretune.policy import returns
from paretune.policy.base import build_policy
from paretune.policy.returns import ExactReturns
from paretune.registry import LEARNERS, METHODS
from paretune.tasks.exact.task import ExactTask
from paretune.testing import quick_learner
from paretune.training.cost import as_if_alone, beside, read_cost, then, write_cost
from paretune.training.spec import Artifact
from paretune.types import Cost

A = Cost(samples=100, tokens=900, steps=10, flops=1e6, seconds=60.0, memory_bytes=7, storage_bytes=50)
B = Cost(samples=300, tokens=400, steps=5, flops=5e6, seconds=20.0, memory_bytes=9, storage_bytes=50)
C = Cost(samples=1000, tokens=100, steps=1, flops=1e5, seconds=5.0, evaluations=4, validation_samples=40, memory_bytes=8, storage_bytes=20)
SEARCH = Cost(evaluations=495, validation_samples=31_680, seconds=12.0, memory_bytes=3)


def test_two_waves_as_if_alone():
    found = as_if_alone([[A, B], [C]], SEARCH)
    assert found["critical_path"] == Cost(
        samples=300 + 1000,  # the larger of the first wave, then the second
        tokens=900 + 100,  # not of the same training: each quantity has its own slowest
        steps=10 + 1,
        flops=5e6 + 1e5,
        seconds=60.0 + 5.0 + 12.0,
        evaluations=0 + 4 + 495,
        validation_samples=0 + 40 + 31_680,
        memory_bytes=9,  # a peak, whatever the order
        storage_bytes=50 + 50 + 20,  # a stock: side by side both are kept
    )
    assert found["total"] == Cost(
        samples=1400,
        tokens=1400,
        steps=16,
        flops=6.1e6,
        seconds=97.0,
        evaluations=499,
        validation_samples=31_720,
        memory_bytes=9,
        storage_bytes=120,
    )


def test_one_training_at_a_time_has_one_cost():
    """Where nothing runs side by side the critical path is the total."""
    found = as_if_alone([[A], [B], [C]], SEARCH)
    assert found["total"] == found["critical_path"]


def test_nothing_trained_costs_the_search_alone():
    assert as_if_alone([], SEARCH) == {"total": SEARCH, "critical_path": SEARCH}
    assert as_if_alone([]) == {"total": Cost(), "critical_path": Cost()}


@pytest.mark.parametrize("combine", [then, beside])
def test_order_and_grouping_do_not_matter(combine):
    assert combine([A, B, C]) == combine([C, A, B]) == combine([combine([A, B]), C])
    assert combine([A, Cost()]) == A


def test_every_field_combines():
    """A field that a combination forgot would stay 0."""
    ones = Cost(**{f.name: 1 for f in dataclasses.fields(Cost)})
    assert set(ones.then(ones).to_json().values()) == {1, 2}
    assert [name for name, value in ones.then(ones).to_json().items() if value == 1] == ["memory_bytes"]
    assert [name for name, value in ones.beside(ones).to_json().items() if value == 2] == ["storage_bytes"]


def test_ledger_on_disk(tmp_path):
    write_cost(tmp_path, C)
    assert read_cost(tmp_path) == C
    (tmp_path / "ledger.json").write_text('{"samples": 3, "carbon": 1}')
    with pytest.raises(StoreError, match=r"ledger\.json.*carbon"):
        read_cost(tmp_path)
    (tmp_path / "ledger.json").unlink()
    with pytest.raises(StoreError, match="holds its ledger"):
        read_cost(tmp_path)


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf")])
def test_a_cost_is_a_finite_count(bad):
    with pytest.raises(AssertionError, match="seconds"):
        Cost(seconds=bad)


SHIPPED = sorted(name for name in METHODS if METHODS[name].__module__.startswith("paretune.methods"))
MEASURING = {"calibrated", "contextual", "distilled", "emorl", "emorl-shared", "ols", "placed", "static-gates"}


class Blind(ExactTask):
    """The same task, for methods that are not told that it can be enumerated."""

    registered_name = "blind"
    is_exact = False


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """(method, done): everything that a method asks for, trained in a step or two; what several ask for is trained once."""
    task = request.param(**dataclasses.asdict(small_task()))
    learner, root, known = quick_learner(steps=2), tmp_path_factory.mktemp("trained"), {}

    def finish(name):
        small = {"samples": 8, "rounds": 20}
        method, own = METHODS.build({"name": name} | {key: small[key] for key in small if hasattr(METHODS[name], key)}), {}
        while wave := [spec for spec in method.plan(task, learner, own, 0) if spec.key not in own]:
            for spec in wave:
                if spec.key not in known:
                    (root / spec.key).mkdir()
                    parents = {key: own[key] for key in spec.parents}
                    LEARNERS.build(spec.learner).train(spec, task, root / spec.key, parents=parents)
                    known[spec.key] = Artifact(spec.key, root / spec.key, spec)
                own[spec.key] = known[spec.key]
        return method, own

    return task, learner, finish


@pytest.fixture
def counted(monkeypatch):
    """What `Returns` measure, counted from outside: exact ones by calls, sampled ones by what the sampler draws, nothing remembered."""
    found = {"evaluations": 0, "validation_samples": 0, "tokens": 0}

    def count(**more):
        for name, number in more.items():
            found[name] += number

    def enumerating(name, distinct):
        original = getattr(ExactReturns, name)

        def call(self, *given):
            count(evaluations=distinct(*given), tokens=distinct(*given) * self.task.inputs(self.split).input_ids_PT.numel())
            return original(self, *given)

        monkeypatch.setattr(ExactReturns, name, call)

    enumerating("at", lambda gates_W: len({None if gates is None else tuple(np.ravel(gates)) for gates in gates_W}))
    enumerating("expected", lambda *_: 1)
    enumerating("once", lambda *_: 1)
    draw, sample = returns.SampledReturns._responses, returns.generate

    def responses(self, *given, **more):
        count(evaluations=1)
        return draw(self, *given, **more)

    def generated(*given, **more):
        for rollout in sample(*given, **more):
            count(validation_samples=len(rollout.texts), tokens=int(rollout.responses.mask_NT.sum()))
            yield rollout

    at = returns.SampledReturns.at
    monkeypatch.setattr(returns.SampledReturns, "at", lambda self, gates_W: (self._known.clear(), at(self, gates_W))[1])
    monkeypatch.setattr(returns.SampledReturns, "_responses", responses)
    monkeypatch.setattr(returns, "generate", generated)
    return found


@pytest.mark.parametrize(
    ("trained", "name"), [(ExactTask, name) for name in SHIPPED] + [(Blind, name) for name in sorted(MEASURING)], indirect=["trained"]
)
def test_who_measures_policies_is_charged_for_it(trained, counted, monkeypatch, name):
    """Evaluations, samples and tokens of what runs the mixed policy on prompts to find gates or trainings, and nothing else."""
    task, learner, finish = trained
    method, done = finish(name)
    monkeypatch.setattr(linear_support, "_MEASURED", {})
    counted.update(dict.fromkeys(counted, 0))  # a plan is asked again after every wave; what it measured is measured again below
    family = method.policy(task, learner, done, 0)
    w_WM = np.array([[0.3, 0.7], [0.6, 0.4]])
    family.gates(w_WM, task.prompts("train"))
    cost = family.cost(w_WM)
    assert {field: getattr(cost, field) for field in counted} == counted
    assert (cost.evaluations > 0) == (cost.tokens > 0) == (cost.seconds > 0) == (name in MEASURING)
    assert (cost.validation_samples > 0) == (name in MEASURING and not task.is_exact)
    if not cost.evaluations:
        assert cost == Cost()


def test_a_meter_is_charged_in_full_at_gates_that_are_remembered():
    """A search that asks twice pays twice, whatever is kept in memory; meters within meters are charged too."""
    task = small_task()
    for exact in (True, False):
        known = returns.returns_of(task, build_policy(task, "reference", {}), "train", samples=8, seed=0, exact=exact)
        with returns.metered() as outer:
            with returns.metered() as first:
                known.at([None, None])
            with returns.metered() as second:
                known.at([None])
                known.covariance_MM(None)
        assert dataclasses.replace(first.cost, seconds=0) == dataclasses.replace(second.cost, seconds=0)
        assert (first.cost.evaluations, first.cost.validation_samples) == (1, 0 if exact else 8)
        assert (outer.cost.evaluations, outer.cost.tokens) == (2, 2 * first.cost.tokens)
        assert outer.cost.seconds >= first.cost.seconds + second.cost.seconds
        known.at([None])
        assert outer.cost.evaluations == 2, "a meter is read at the end of its block"
