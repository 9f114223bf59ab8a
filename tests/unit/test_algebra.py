"""Packed Grams, the float32 bound, singular vectors and norms, each against exact or float64 arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.algebra import (
    packed_gram,
    pair_products,
    root_moments,
    squared_norm_error,
    squared_norm_moments,
    top_right_singular_vector,
    trusted_product,
    update_norms,
)

SHAPES = [(1, 1), (7, 1), (40, 8), (9, 16), (200, 32)]


@pytest.mark.parametrize(("outer", "rank"), SHAPES)
def test_the_packed_inner_product_is_the_squared_norm(outer: int, rank: int) -> None:
    B, z = torch.randn(outer, rank).double(), torch.randn(11, rank).double()
    expected = (z @ B.T).square().sum(1)
    assert torch.allclose(pair_products(z) @ packed_gram(B), expected, rtol=1e-12)
    assert packed_gram(B).shape == (rank * (rank + 1) // 2,)


def exact_square(B: torch.Tensor, z: torch.Tensor) -> Fraction:
    """‖B z‖² in rational arithmetic."""
    rows = [[Fraction(b) for b in row] for row in B.tolist()]
    return sum((sum((b * Fraction(v) for b, v in zip(row, z.tolist(), strict=True)), Fraction(0))) ** 2 for row in rows)


def ill_conditioned(outer: int, rank: int, condition: float, generator: torch.Generator) -> torch.Tensor:
    left = torch.linalg.qr(torch.randn(outer, rank, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(rank, rank, generator=generator).double()).Q
    return ((left * torch.logspace(0, -torch.tensor(condition).log10().item(), rank)) @ right).float()


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 12),
    extra=st.integers(0, 8),
    condition=st.sampled_from([1.0, 1e3, 1e6]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    aligned=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_error_bound_is_never_crossed(
    rank: int, extra: int, condition: float, scale: float, aligned: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    B = ill_conditioned(rank + extra, rank, condition, generator) * scale
    z = torch.randn(rank, generator=generator)
    if aligned:  # the direction that B shrinks most: the inner product cancels almost wholly
        z = torch.linalg.svd(B.double()).Vh[-1].float()
    frobenius = torch.linalg.matrix_norm(B.double())
    unit = (z.double() / z.double().norm()).float()
    computed = pair_products(unit[None]) @ (packed_gram(B.double() / frobenius)).float()
    error = abs(
        Fraction(computed.item())
        - exact_square(B, z) / (Fraction(z.double().norm().item()) ** 2) / Fraction(frobenius.item()) ** 2
    )
    assert error <= Fraction(squared_norm_error(rank))


def test_the_error_bound_is_not_idle() -> None:
    """A bound a thousand times smaller is crossed, so that the test above can fail."""
    generator = torch.Generator().manual_seed(5)
    worst = 0.0
    for _ in range(50):
        B, z = torch.randn(8, 8, generator=generator), torch.randn(64, 8, generator=generator)
        unit, frobenius = z.double() / z.double().norm(dim=1, keepdim=True), torch.linalg.matrix_norm(B.double())
        computed = pair_products(unit.float()) @ packed_gram(B.double() / frobenius).float()
        exact = (unit @ (B.double() / frobenius).T).square().sum(1)
        worst = max(worst, float((computed.double() - exact).abs().max()))
    assert squared_norm_error(8) / 1000 < worst < squared_norm_error(8)


@pytest.mark.parametrize(("outer", "rank"), SHAPES)
def test_the_top_right_singular_vector_is_that_of_the_whole_product(outer: int, rank: int) -> None:
    A, B = torch.randn(rank, 50), torch.randn(outer, rank)
    found = top_right_singular_vector(A, B)
    expected = torch.linalg.svd(B.double() @ A.double()).Vh[0]
    assert found.norm().item() == pytest.approx(1.0, abs=1e-12)
    assert abs(float(found @ expected)) == pytest.approx(1.0, abs=1e-9)


def test_a_zero_update_has_no_direction() -> None:
    assert not top_right_singular_vector(torch.randn(3, 10), torch.zeros(5, 3)).any()


@pytest.mark.parametrize(("outer", "rank"), SHAPES)
def test_the_norms_of_an_update_are_those_of_the_whole_product(outer: int, rank: int) -> None:
    A, B = torch.randn(rank, 50), torch.randn(outer, rank)
    values = torch.linalg.svdvals(B.double() @ A.double())
    frobenius, spectral = update_norms(A, B)
    assert frobenius == pytest.approx(float(values.square().sum().sqrt()), rel=1e-10)
    assert spectral == pytest.approx(float(values[0]), rel=1e-10)


@pytest.mark.parametrize("offset", [0.0, 0.7, 4.0])
def test_moments_of_a_squared_norm_are_those_of_many_draws(offset: float) -> None:
    draws = 200_000
    B, spread, mean = torch.randn(6, 4).double(), torch.randn(4, 4).double(), offset * torch.randn(4).double()
    z = mean + torch.randn(draws, 4).double() @ spread.T
    squares = (z @ B.T).square().sum(1)
    expected, variance = squared_norm_moments(B, mean, spread @ spread.T)
    # Five standard errors. A squared norm of Gaussians has a kurtosis of 15 at most (one direction, centred).
    assert float(squares.mean()) == pytest.approx(expected, abs=5 * math.sqrt(variance / draws))
    assert float(squares.var()) == pytest.approx(variance, rel=5 * math.sqrt(14 / draws))
    # The root is an approximation: of a deviation and of the spread, below what SmolLM2's own text shows.
    norm, std = root_moments(expected, variance)
    norms = squares.sqrt()
    assert abs(norm - float(norms.mean())) < 0.1 * std
    assert std == pytest.approx(float(norms.std()), rel=0.15)


@pytest.mark.parametrize("directions", [1, 2, 5, 64])
def test_the_root_is_exact_where_all_directions_are_alike(directions: int) -> None:
    """The chi distribution: E = √2·Γ((n+1)/2)/Γ(n/2), E of the square n."""
    expected = math.sqrt(2) * math.exp(math.lgamma((directions + 1) / 2) - math.lgamma(directions / 2))
    found = root_moments(
        *squared_norm_moments(torch.eye(directions), torch.zeros(directions).double(), torch.eye(directions).double())
    )
    assert found == pytest.approx((expected, math.sqrt(directions - expected**2)), rel=1e-9)


def test_the_root_of_a_narrow_square() -> None:
    below, above = (root_moments(1.0, share / 300.0) for share in (1 - 1e-9, 1 + 1e-9))  # series and gamma functions
    assert below == pytest.approx(above, rel=1e-8)
    for variance in (1e-6, 1e-12, 1e-24):  # the linear part alone: std of the root is half that of the square
        assert root_moments(1.0, variance) == pytest.approx((1.0, math.sqrt(variance) / 2), rel=1e-6)
    assert root_moments(4.0, 0.0) == (2.0, 0.0)
    assert root_moments(0.0, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_a_product_is_in_float32_whatever_torch_is_allowed(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: allowed)
    torch.manual_seed(0)
    left, right = torch.randn(3, 5, 7), torch.randn(3, 7, 4)
    exact = left.double() @ right.double()
    found = trusted_product(left, right)
    assert found.dtype == torch.float32
    # seven products of numbers of about 1: seven roundings of 6e-8 and the last one
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-6)
    if allowed == "high":
        assert torch.equal(found, exact.float())  # by way of float64, not by what torch may make of float32
