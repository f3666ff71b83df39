"""Costs: two ways to combine, and the rule "as if the method ran alone" against sums done by hand."""

import dataclasses

import pytest

from paretune.errors import StoreError
from paretune.training.cost import Cost, as_if_alone, beside, read_cost, then, write_cost

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
