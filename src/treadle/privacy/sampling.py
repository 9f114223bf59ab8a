"""Poisson sampling: every row decides for itself, so that adding one row changes nothing about the others."""

import numpy as np

from treadle.privacy.noise import PrivateRandomness


def poisson_sample(rows: int, sample_rate: float, randomness: PrivateRandomness) -> list[int]:
    """The indices below `rows`, ascending, each present with probability `sample_rate`, independently; perhaps none.

    Args:
        rows: how many there are.
        sample_rate: in (0, 1]; rounded down to a multiple of 2⁻⁶⁴.
        randomness: decides.
    """
    threshold = int(sample_rate * 2.0**64)
    if threshold >= 2**64:
        return list(range(rows))
    return np.flatnonzero(randomness.words(rows) < np.uint64(threshold)).tolist()
