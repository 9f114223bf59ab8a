"""The smallest set is the smallest, ties and rounding included, and overlaps are overlaps of sets."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError, MismatchError
from treadle.partition.importance import Importance
from treadle.partition.selection import jaccard, smallest_set, top_share
from treadle.partition.units import Mask, flat


def weighed(*modules: Sequence[float]) -> Importance:
    units = {f"m{i}/rank": torch.tensor(values, dtype=torch.float64) for i, values in enumerate(modules)}
    return Importance("rank", "taylor", 10, units, dict.fromkeys(units, 3))


def places(mask: Mask) -> list[int]:
    return flat(mask.units).nonzero().flatten().tolist()


whole = st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any)


@settings(max_examples=100, deadline=None)
@given(values=whole, theta=st.integers(1, 20))
def test_no_smaller_set_reaches_theta(values: list[int], theta: int) -> None:
    found = places(smallest_set(weighed(values[:3], values[3:]), theta / 20))
    assert 20 * sum(values[i] for i in found) >= theta * sum(values)
    for others in combinations(range(len(values)), len(found) - 1):
        assert 20 * sum(values[i] for i in others) < theta * sum(values)


@pytest.mark.parametrize(
    ("theta", "chosen"), [(0.1, [0]), (0.3, [0, 1, 2]), (0.7, [*range(7)]), (0.9, [*range(9)]), (1.0, [*range(10)])]
)
def test_equal_units_are_taken_in_order_and_rounding_adds_none(theta: float, chosen: list[int]) -> None:
    assert places(smallest_set(weighed([0.1] * 4, [0.1] * 6), theta)) == chosen


def test_all_is_everything_that_is_not_zero() -> None:
    assert places(smallest_set(weighed([1e-300, 0.0, 1.0], [1e-17, 0.0]), 1.0)) == [0, 2, 3]


def test_theta_is_over_all_modules_together() -> None:
    assert places(smallest_set(weighed([8.0, 1.0], [0.5, 0.5]), 0.9)) == [0, 1]


@pytest.mark.parametrize("theta", [0.0, -0.1, 1.1, float("nan")])
def test_theta_outside_is_refused(theta: float) -> None:
    with pytest.raises(ConfigError, match=r"theta is .*; it must be in \(0, 1\]"):
        smallest_set(weighed([1.0]), theta)


@pytest.mark.parametrize(
    ("share", "chosen"), [(0.0, []), (0.1, []), (0.125, [4]), (0.5, [3, 4]), (0.625, [1, 3, 4]), (1.0, [0, 1, 3, 4])]
)
def test_the_top_of_some_units_is_by_importance(share: float, chosen: list[int]) -> None:
    found = weighed([1.0, 2.0, 9.0], [3.0, 4.0])
    among = smallest_set(weighed([1.0, 1.0, 0.0], [1.0, 1.0]), 1.0)
    assert places(top_share(among, found, share)) == chosen


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_a_share_outside_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"share is .*; it must be in \[0, 1\]"):
        top_share(smallest_set(weighed([1.0]), 1.0), weighed([1.0]), share)


def test_jaccard_is_both_over_either() -> None:
    one, other = smallest_set(weighed([3.0, 2.0, 0.0, 1.0]), 1.0), smallest_set(weighed([0.0, 2.0, 5.0, 1.0]), 1.0)
    assert jaccard(one, other) == 0.5
    assert jaccard(one, one) == 1.0


def test_sets_of_other_units_do_not_compare() -> None:
    with pytest.raises(MismatchError, match=r"m0/rank: the sets are of other units: \(1,\) beside \(2,\)"):
        jaccard(smallest_set(weighed([1.0]), 1.0), smallest_set(weighed([1.0, 2.0]), 1.0))


def test_empty_sets_have_no_overlap() -> None:
    nothing = ~smallest_set(weighed([1.0]), 1.0)
    with pytest.raises(ConfigError, match="two empty sets have no overlap"):
        jaccard(nothing, nothing)


def test_a_mask_counts_units_and_parameters() -> None:
    units: dict[str, Any] = {"a/rank": torch.tensor([True, False]), "b/rank": torch.tensor([True, True, False])}
    mask = Mask(units, {"a/rank": 10, "b/rank": 4})
    assert (mask.count, mask.parameters, mask.share) == (3, 18, 18 / 32)
    assert {name: row.tolist() for name, row in mask.ranks.items()} == {"a": [True, False], "b": [True, True, False]}
