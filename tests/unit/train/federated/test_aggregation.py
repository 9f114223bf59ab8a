"""Means that do not hang on the order of arrival, and errors that need no wide product."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.train.federated.aggregation import (
    Deviation,
    Update,
    deviation,
    in_order,
    mean_of,
    shares,
    stacked,
    together,
)


def factors(
    count: int, *, outer: int = 40, inner: int = 30, rank: int = 3, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rank, inner, generator=generator), torch.randn(outer, rank, generator=generator))
        for _ in range(count)
    ]


def test_the_mean_is_the_rational_one_to_the_last_bits() -> None:
    """float32 times a whole weight is exact in float64, so only a few additions and one division round."""
    tensors = [B for _, B in factors(5)]
    weights = [3.0, 120.0, 7.0, 55.0, 1.0]
    mean = mean_of(tensors, weights, rank=3)
    for place in ((0, 0), (7, 2), (39, 1)):
        exact = sum(Fraction(w) * Fraction(float(t[place])) for t, w in zip(tensors, weights, strict=True)) / 186
        assert abs(Fraction(float(mean[place])) - exact) <= abs(exact) * Fraction(1, 10**14)


def test_equal_weights_of_any_size_are_the_plain_mean() -> None:
    tensors = [B for _, B in factors(4)]
    plain = torch.stack(tensors).double().mean(0)
    for weight in (1.0, 1024.0, 0.1):
        torch.testing.assert_close(mean_of(tensors, [weight] * 4, rank=3), plain, rtol=1e-14, atol=1e-15)


def test_clients_are_summed_in_the_order_of_their_names() -> None:
    updates = [Update(name, {}, 1.0) for name in ("b", "a10", "a2", "Z")]
    for order in itertools.permutations(updates):
        assert [update.client for update in in_order(order)] == ["Z", "a10", "a2", "b"]


def test_shares_sum_to_one() -> None:
    found = shares([Update(str(i), {}, weight) for i, weight in enumerate((1.0, 2.0, 5.0))])
    assert found == [0.125, 0.25, 0.625]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 10**6))
def test_nested_ranks_are_exact_whatever_they_are(ranks: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(6, 11, generator=generator)
    clients = [torch.randn(9, rank, generator=generator) for rank in ranks]
    weights = [float(torch.randint(1, 100, (), generator=generator)) for _ in ranks]
    mean = mean_of(clients, weights, rank=6)
    oracle = sum(w * B.double() @ A[: B.shape[1]].double() for B, w in zip(clients, weights, strict=True)) / sum(
        weights
    )
    torch.testing.assert_close(mean @ A.double(), oracle, rtol=0, atol=1e-12)


def test_the_deviation_is_that_of_the_wide_products() -> None:
    clients, weights = factors(4), [0.1, 0.2, 0.3, 0.4]
    A, B = factors(1, seed=9)[0]
    oracle = sum(w * b.double() @ a.double() for (a, b), w in zip(clients, weights, strict=True))
    found = deviation(A, B, clients, weights)
    assert found.missed == pytest.approx(float((B.double() @ A.double() - oracle).norm()), rel=1e-12)
    assert found.whole == pytest.approx(float(oracle.norm()), rel=1e-12)
    assert found.relative == found.missed / found.whole


def test_a_deviation_of_one_part_in_a_billion_is_seen() -> None:
    """A difference of squared norms would report noise of 1e-8 here."""
    clients = [(A.double(), B.double()) for A, B in factors(3)]
    weights = [0.25, 0.25, 0.5]
    rows, columns = stacked(clients, weights)
    exact = deviation(rows, columns, clients, weights)
    assert exact.relative < 1e-14
    off = columns.clone()
    off[0, 0] += 1e-9 * exact.whole / float(rows[0].norm())
    assert deviation(rows, off, clients, weights).relative == pytest.approx(1e-9, rel=1e-4)


def test_a_stack_is_the_mean_of_the_products() -> None:
    clients, weights = factors(3), [0.5, 0.25, 0.25]
    rows, columns = stacked(clients, weights)
    assert (tuple(rows.shape), tuple(columns.shape)) == ((9, 30), (40, 9))
    oracle = sum(w * B.double() @ A.double() for (A, B), w in zip(clients, weights, strict=True))
    torch.testing.assert_close(columns @ rows, oracle, rtol=0, atol=1e-12)


def test_deviations_add_up_like_blocks() -> None:
    both = together([Deviation(3.0, 5.0), Deviation(4.0, 12.0)])
    assert (both.missed, both.whole, both.relative) == (5.0, 13.0, 5.0 / 13.0)
    assert together([]).relative == 0.0
    assert Deviation(1.0, 0.0).relative == math.inf
