"""Each row is in a sample with its own probability, independently of the others."""

import numpy as np
import pytest

from treadle.privacy.noise import PrivateRandomness, SeededRandomness, SystemRandomness, Words
from treadle.privacy.sampling import poisson_sample

ROWS, DRAWS = 400, 2000


def presences(rate: float, seed: int) -> np.ndarray:
    """(draws, rows), whether the row was sampled."""
    randomness = SeededRandomness(seed)
    found = np.zeros((DRAWS, ROWS), dtype=bool)
    for draw in found:
        draw[poisson_sample(ROWS, rate, randomness)] = True
    return found


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_every_row_has_the_rate_and_pairs_are_independent(rate: float) -> None:
    found = presences(rate, seed=1)
    error = (rate * (1 - rate) / DRAWS) ** 0.5
    assert abs(found.mean() - rate) < 5 * error / ROWS**0.5
    assert np.abs(found.mean(0) - rate).max() < 5 * error  # 5 deviations: once in 1.7 million, times 400 rows
    assert np.abs(found.mean(1) - rate).std() > 0  # no fixed size
    sizes = found.sum(1)
    assert sizes.var() == pytest.approx(ROWS * rate * (1 - rate), rel=0.2)  # the binomial's; 0.2 is 6 deviations
    together = (found[:, :-1] & found[:, 1:]).mean()
    assert together == pytest.approx(rate**2, rel=5 / (rate**2 * DRAWS * ROWS) ** 0.5)


def test_rate_one_takes_all_and_no_rows_give_none() -> None:
    assert poisson_sample(5, 1.0, SeededRandomness(0)) == [0, 1, 2, 3, 4]
    assert poisson_sample(0, 0.5, SeededRandomness(0)) == []


class _Fixed(PrivateRandomness):
    secret = False

    def __init__(self, *words: int) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def words(self, count: int) -> Words:
        return self._words[:count]


def test_the_threshold_is_exact() -> None:
    half = 2**63
    assert poisson_sample(4, 0.5, _Fixed(0, half - 1, half, 2**64 - 1)) == [0, 1]


def test_the_system_draws_anew_each_time() -> None:
    randomness = SystemRandomness()
    assert poisson_sample(200, 0.5, randomness) != poisson_sample(200, 0.5, randomness)
