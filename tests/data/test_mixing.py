"""Repeats, weights and regularisation as exact fractions."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.config.data import SourceConfig
from kinema.data.mixing import repeats_of
from kinema.data.sampler import BatchOrder
from kinema.errors import ConfigError


def source(**keys) -> SourceConfig:
    return SourceConfig(path="clips", **keys)


def test_repeats_are_exact():
    sources = [source(), source(repeats=3), source(repeats=0.1), source(repeats=1.3)]
    assert repeats_of(sources, [5, 6, 7, 8]) == (1, 3, Fraction(1, 10), Fraction(13, 10))


def test_weights_share_as_many_draws_as_there_are_items():
    found = repeats_of([source(weight=3), source(weight=1)], [100, 900])
    assert found == (Fraction(750, 100), Fraction(250, 900))


def test_a_source_without_items_has_no_share():
    found = repeats_of([source(weight=0.5), source(weight=0.25), source(weight=0.25)], [30, 0, 60])
    assert found == (Fraction(60, 30), 0, Fraction(30, 60))


def test_regularisation_draws_as_many_as_the_others_together():
    sources = [source(repeats=10), source(), source(regularization=True), source(regularization=True)]
    items = [20, 40, 1000, 200]
    found = repeats_of(sources, items)
    assert found == (10, 1, Fraction(1, 5), Fraction(1, 5))
    draws = [r * n for r, n in zip(found, items, strict=True)]
    assert draws[2] + draws[3] == draws[0] + draws[1] == 240


def test_regularisation_is_mixed_into_all_batches():
    """20 pictures of the subject and 400 of its class: half of an epoch's draws are of each, as are most batches."""
    repeats = repeats_of([source(repeats=10), source(regularization=True)], [20, 400])
    source_of = np.repeat([0, 1], [20, 400])
    order = BatchOrder(np.zeros(420, int), [8], 0, source_of=source_of, repeats=repeats)
    assert order.steps_per_epoch == 50
    counts = np.array([(source_of[order.batch(step).items] == 0).sum() for step in range(100)])
    assert counts.sum() == 400
    assert counts.min() >= 1 and counts.max() <= 7


def test_too_many_draws_are_refused():
    with pytest.raises(ConfigError, match=r"more than 2\^31 draws, most of them from 'clips' with its 10 records"):
        repeats_of([source(), source(repeats=1e300)], [20, 10])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), st.integers(0, 60)), min_size=1, max_size=4).filter(
        lambda s: any(n for _, n in s)
    ),
    st.integers(1, 7),
)
def test_weighted_draws_are_exact_to_one_an_item_and_group(pairs: list[tuple[float, int]], size: int) -> None:
    """Through the batch order: over 8 epochs each source gets its share of the draws, less than one draw away."""
    items = [n for _, n in pairs]
    found = repeats_of([source(weight=weight) for weight, _ in pairs], items)
    source_of = np.repeat(np.arange(len(items)), items)
    order = BatchOrder(np.zeros(len(source_of), int), [size], 0, source_of=source_of, repeats=found)
    drawn: Counter[int] = Counter()
    for step in range(order.steps_before(8)):
        drawn.update(source_of[order.batch(step).items].tolist())
    present = sum(Fraction(str(weight)) for weight, n in pairs if n)
    for number, (weight, n) in enumerate(pairs):
        share = Fraction(str(weight)) / present * sum(items) * 8 if n else Fraction(0)
        assert abs(drawn[number] - share) < 1 + Fraction(1, 10**6)
        assert math.floor(found[number] * n * 8) == drawn[number]
