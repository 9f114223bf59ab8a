"""Intervals against published values, exact small cases and normal theory."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import InputError
from treadle.evaluation.intervals import Interval, mean_interval, mean_over_tasks, sign_flip_p, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, Table I, method 3 (score, no continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(successes: int, trials: int, low: float, high: float) -> None:
    interval = wilson_interval(successes, trials)
    assert interval.estimate == successes / trials
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@settings(deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_stays_inside_and_is_symmetric(counts: tuple[int, int], level: float) -> None:
    successes, trials = counts
    interval, mirrored = (wilson_interval(k, trials, level=level) for k in (successes, trials - successes))
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-12)


def test_the_bootstrap_of_two_items_is_exact() -> None:
    # The mean of two draws from {0, 1} is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4.
    assert mean_over_tasks({"a": [0, 1]}, level=0.95) == Interval(0.5, 0.0, 1.0, 0.95)
    assert mean_over_tasks({"a": [0, 1]}, level=0.4) == Interval(0.5, 0.5, 0.5, 0.4)


def test_the_bootstrap_agrees_with_normal_theory() -> None:
    values = np.random.default_rng(5).normal(2.0, 3.0, size=2000)
    interval = mean_over_tasks({"all": values.tolist()})
    reach = 1.96 * values.std() / math.sqrt(2000)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.high - interval.estimate == pytest.approx(reach, rel=0.05)
    assert interval.estimate - interval.low == pytest.approx(reach, rel=0.05)


def test_tasks_weigh_the_same_and_are_resampled_apart() -> None:
    large, small = [1] * 900 + [0] * 100, [0, 1] * 20
    interval = mean_over_tasks({"large": large, "small": small})
    assert interval.estimate == pytest.approx((0.9 + 0.5) / 2)
    error = math.sqrt(0.9 * 0.1 / 1000 + 0.5 * 0.5 / 40) / 2  # of a mean of two independent means
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_a_seed_fixes_the_interval_and_the_order_of_tasks_does_not_matter() -> None:
    tasks = {"a": [0.1, 0.7, 0.4, 0.9], "b": [0.2, 0.3, 0.8]}
    assert mean_over_tasks(tasks, seed=1) == mean_over_tasks(dict(reversed(tasks.items())), seed=1)
    assert mean_over_tasks(tasks, seed=1) != mean_over_tasks(tasks, seed=2)


def test_what_cannot_be_estimated_is_refused() -> None:
    for successes, trials in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(InputError, match="successes in"):
            wilson_interval(successes, trials)
    for level in (0.0, 1.0, 95.0):
        with pytest.raises(InputError, match="outside"):
            wilson_interval(1, 2, level=level)
        with pytest.raises(InputError, match="outside"):
            mean_over_tasks({"a": [1]}, level=level)
    for results in ({}, {"a": [1], "b": []}):
        with pytest.raises(InputError, match="nothing to resample"):
            mean_over_tasks(results)
    with pytest.raises(InputError, match="nothing to resample"):
        mean_over_tasks({"a": [1]}, resamples=0)


def test_students_interval_of_a_mean() -> None:
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # Student 1908; t at 97.5% with 4 degrees of freedom is 2.776 in every table; the standard error is sqrt(2.5 / 5).
    assert interval.estimate == 3.0
    assert interval.high - 3.0 == pytest.approx(2.7764 * math.sqrt(0.5), abs=1e-4)
    assert interval.high - 3.0 == pytest.approx(3.0 - interval.low)


def test_one_value_says_nothing_about_the_mean() -> None:
    assert mean_interval([0.4]) == Interval(0.4, -math.inf, math.inf, 0.95)
    with pytest.raises(InputError, match="no values"):
        mean_interval([])


def test_sign_flips_count_every_signing() -> None:
    # Of 8 signings of 1, 2, 3 only all plus and all minus reach a sum of 6; |1 + 2 - 3| = 0 is reached by all.
    assert sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_p([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip_p([0.1] * 6) == 2 / 64
    assert sign_flip_p([0.0, 0.0]) == 1.0
    with pytest.raises(InputError, match="0 differences"):
        sign_flip_p([])
