"""``batch_size = "auto"``: the search itself, and trials of a real network on this machine."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.training.auto_batch import RECKLESS, Trials, largest, search


@given(most=st.integers(0, 5000), guess=st.integers(-3, 9000), limit=st.integers(1, 5000))
def test_the_largest_that_fits_is_found(most, guess, limit):
    asked = []

    def fits(count):
        assert 1 <= count <= limit
        asked.append(count)
        return count <= most

    assert largest(fits, guess, limit) == min(most, limit)
    assert len(asked) == len(set(asked)) <= 2 * math.log2(limit + 1) + 2


def test_a_near_guess_saves_trials():
    asked = []
    assert largest(lambda n: asked.append(n) or n <= 100, 100, 10**6) == 100
    assert len(asked) <= 9 and max(asked) == 200


@settings(max_examples=200)
@given(
    fixed=st.floats(0, 0.9), each=st.floats(0.0005, 0.5), limit=st.integers(1, 3000), guess=st.integers(1, 3000),
    wobble=st.integers(0, 2**32), careful=st.booleans(),
)  # fmt: skip
def test_a_search_over_noisy_measurements(fixed, each, limit, guess, wobble, careful):
    """Memory is linear in the samples but for rounding; a careful search never goes far beyond what is there."""
    noise, ran = 0.002, []

    def share(count):
        ran.append(count)
        return fixed + each * count + noise * (hash((wobble, count)) % 1000) / 1000

    trials = Trials(share, fixed if careful else None)
    size = search(trials, guess, limit)
    assert len(ran) == len(set(ran))
    right = min(limit, int((1 - fixed) / each))
    assert size == 0 or trials.shares[size] <= 1
    assert 0 <= right - size <= 2 * noise / each + 1
    # A careless search tries two samples before it can forecast anything, and its first guess by the slope between one
    # and two, whose noise grows with the guess.
    tried = [share for count, share in trials.shares.items() if count > (1 if careful else 2)]
    assert max(tried, default=0) <= (1.05 if careful else RECKLESS + 0.2 + noise * min(guess, limit))


def test_small_batches_may_mislead_at_first():
    """Two samples seem dear, as allocators round; what they ruled out is tried after all."""
    taken = {1: 0.1, 2: 0.25}
    trials = Trials(lambda n: taken.get(n, 0.1 * n), fixed=0.0)
    assert search(trials, 8, 100) == 10


def test_a_failed_trial_is_no_measurement():
    trials = Trials(lambda n: 0.1 * n if n <= 8 else math.inf)
    assert search(trials, 64, 64) == 8
    assert trials.forecast(9) == pytest.approx(0.9)
