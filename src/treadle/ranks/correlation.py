"""How alike two orders of the same modules are."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata


def spearman(a: Sequence[float | int], b: Sequence[float | int]) -> float | None:
    """Spearman's rank correlation, −1 to 1, equal values sharing the mean of their places; None where all are equal.

    >>> spearman([1, 2, 3, 4], [10, 20, 40, 30])
    0.8
    """
    first, second = rankdata(a), rankdata(b)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return round(float(np.corrcoef(first, second)[0, 1]), 12)  # of small whole numbers; the last digits are noise
