"""The portable draws are Philox's, as a plain rendering of its definition has them."""

import hashlib
import math

import numpy as np
import pytest

from treadle import randomness

_MASK = 2**64 - 1


def philox(key: int, blocks: int) -> list[int]:
    """Philox-4x64 with 10 rounds over the counters 1, 2, … (Salmon et al., SC'11), in Python's integers."""
    words: list[int] = []
    for block in range(1, blocks + 1):
        c, k = [block, 0, 0, 0], [key & _MASK, key >> 64]
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
            c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
            k = [(k[0] + 0x9E3779B97F4A7C15) & _MASK, (k[1] + 0xBB67AE8584CAA73B) & _MASK]
        words += c
    return words


@pytest.mark.parametrize(("seed", "name"), [(0, "a"), (-1, "model.layers.0.self_attn.q_proj"), (2**70, "é")])
def test_uniform_is_philox_keyed_by_seed_and_name(seed: int, name: str) -> None:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    expected = [(word >> 11) / 2**53 for word in philox(key, 3)]
    found = randomness.uniform(seed, name, (3, 4))
    assert found.dtype == np.float64
    assert found.ravel().tolist() == expected


def test_shapes_cut_one_stream() -> None:
    assert np.array_equal(randomness.uniform(1, "x", (4, 3)).ravel()[:5], randomness.uniform(1, "x", (5,)))


def test_uniform_fills_the_unit_interval() -> None:
    draws = randomness.uniform(0, "many", (100_000,))
    assert 0 <= draws.min() < 1e-3
    assert 0.999 < draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.005)
    assert draws.var() == pytest.approx(1 / 12, abs=0.002)


def test_normal_has_the_moments_of_the_normal_law() -> None:
    draws = randomness.normal(0, "many", (100_000,))
    assert draws.mean() == pytest.approx(0, abs=0.02)
    assert draws.var() == pytest.approx(1, abs=0.02)
    assert (draws**4).mean() == pytest.approx(3, abs=0.15)
    assert np.mean(np.abs(draws) < 1) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)
