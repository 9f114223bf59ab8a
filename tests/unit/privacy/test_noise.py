"""The noise has the scale that it should and no other, comes from where it should, and hides the low bits of a sum."""

import math
import os
import sys

import numpy as np
import pytest
import torch

from treadle.errors import UnavailableError
from treadle.privacy.noise import SeededRandomness, SystemRandomness, grid_width, noised, standard_normal

COUNT = 200_000
TOLERANCE = 5 / math.sqrt(2 * COUNT)  # the relative error of a standard deviation, five times over: 0.8%


def has_scale(draws: torch.Tensor, deviation: float) -> bool:
    return abs(draws.std().item() / deviation - 1) < TOLERANCE


@pytest.mark.parametrize("deviation", [0.003, 1.0, 47.0])
def test_the_right_scale_is_accepted_and_wrong_ones_are_rejected(deviation: float) -> None:
    noise = noised(torch.zeros(COUNT, dtype=torch.float64), deviation, SeededRandomness(1))
    assert has_scale(noise, deviation)
    assert not has_scale(noise, 0.9 * deviation)
    assert not has_scale(noise, 1.1 * deviation)
    assert abs(noise.mean().item()) < 5 * deviation / math.sqrt(COUNT)


@pytest.mark.parametrize("source", [SeededRandomness(2), SystemRandomness()], ids=["seeded", "system"])
def test_draws_are_normal_and_independent(source: SeededRandomness | SystemRandomness) -> None:
    draws = standard_normal(COUNT, source).numpy()
    ordered = np.sort(draws)
    cdf = 0.5 * (1 + torch.erf(torch.from_numpy(ordered) / math.sqrt(2))).numpy()
    distance = np.abs(cdf - (np.arange(COUNT) + 0.5) / COUNT).max()
    assert distance < 2.5 / math.sqrt(COUNT)  # Kolmogorov and Smirnov: passed by chance once in 130,000
    for lag in (1, COUNT // 2, 2**13, 2**14, 2**15):  # within a pair, within a block, from block to block
        assert abs(np.mean(draws[lag:] * draws[:-lag])) < 5 / math.sqrt(COUNT - lag)
    squares = draws**2 - 1  # a pair shares its radius
    half = 2**13
    assert abs(np.mean(squares[:half] * squares[half : 2 * half])) < 5 * 2 / math.sqrt(half)


def test_an_odd_number_and_none() -> None:
    assert standard_normal(7, SeededRandomness(0)).shape == (7,)
    assert standard_normal(0, SeededRandomness(0)).shape == (0,)


def test_a_release_is_a_multiple_of_the_grid_near_the_sum() -> None:
    total, deviation = torch.randn(5000, dtype=torch.float64), 0.7
    release = noised(total, deviation, SeededRandomness(3))
    width = grid_width(deviation)
    assert width == 2.0**-31  # at most 0.7·2⁻³⁰, and a power of two
    steps = release / width
    assert torch.equal(steps, steps.round())
    assert (release - total).abs().max() < 6 * deviation


def test_the_low_bits_of_the_sum_are_gone() -> None:
    """Sums that differ by less than half the grid's width give the same release, bit for bit."""
    deviation = 1.0
    total = torch.arange(1000, dtype=torch.float64) * grid_width(deviation)
    near = total + 0.4 * grid_width(deviation) * (torch.rand(1000, dtype=torch.float64) - 0.5)
    assert not torch.equal(total, near)
    assert torch.equal(noised(total, deviation, SeededRandomness(4)), noised(near, deviation, SeededRandomness(4)))


def test_a_seed_fixes_everything_and_says_that_it_is_no_secret() -> None:
    first, again, other = (standard_normal(100, SeededRandomness(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    source = SeededRandomness(5)
    assert not torch.equal(standard_normal(100, source), standard_normal(100, source))
    assert not source.secret


def test_the_system_is_asked_for_a_new_key_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = os.urandom

    def urandom(size: int) -> bytes:
        asked.append(size)
        return real(size)

    monkeypatch.setattr(os, "urandom", urandom)
    source = SystemRandomness()
    assert source.secret
    first, second = source.words(1000), source.words(1000)
    assert asked.count(32) == 2
    assert not np.array_equal(first, second)


def test_the_stream_is_chacha20(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 8439 appendix A.1, test vector 1: key, block counter and nonce all zero."""
    monkeypatch.setattr(os, "urandom", bytes)
    expected = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert SystemRandomness().words(4).tobytes().hex() == expected


def test_no_draw_of_the_operating_system_ends_the_stream_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of blocks that began at a random number ran over once in 2^32 / blocks calls."""
    monkeypatch.setattr(os, "urandom", lambda size: b"\xff" * size)
    assert len(set(SystemRandomness().words(1000).tolist())) == 1000


def test_without_cryptography_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(UnavailableError, match=r"pip install 'treadle\[privacy\]'"):
        SystemRandomness()
