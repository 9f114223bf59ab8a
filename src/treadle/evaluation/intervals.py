"""Confidence intervals: of a share, of a mean, of a mean over tasks; and a test of paired differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np
from scipy.stats import t as student

from treadle.errors import InputError

_DRAWS_AT_ONCE = 2**22  # indices held in memory at a time: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval at `level` (0.95: 95%)."""

    estimate: float
    low: float
    high: float
    level: float


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> Interval:
    """The share successes/trials with Wilson's score interval, which stays inside [0, 1].

    Raises:
        InputError: no trials, successes outside 0 to trials, a level outside (0, 1).

    Reference:
        E. B. Wilson, JASA 22 (1927); method 3 of R. G. Newcombe, Statistics in Medicine 17 (1998).
    """
    _check_level(level)
    if trials < 1 or not 0 <= successes <= trials:
        raise InputError(f"{successes} successes in {trials} trials", where="interval", remedy="count again")
    z, share = NormalDist().inv_cdf((1 + level) / 2), successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2) / (1 + z * z / trials)
    low = 0.0 if successes == 0 else centre - reach
    high = 1.0 if successes == trials else centre + reach
    return Interval(share, low, high, level)


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """The mean of independent values, such as one a seed, with Student's interval; one value has an infinite one.

    Raises:
        InputError: no values, a level outside (0, 1).
    """
    _check_level(level)
    if not values:
        raise InputError("no values", where="interval", remedy="give one a seed")
    mean, count = fmean(values), len(values)
    if count == 1:
        return Interval(mean, -math.inf, math.inf, level)
    reach = float(student.ppf((1 + level) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Interval(mean, mean - reach, mean + reach, level)


def mean_over_tasks(
    results: Mapping[str, Sequence[int | float]], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """The mean of the tasks' means, each task weighing the same, with its stratified bootstrap interval.

    Items are drawn again within each task (percentile bootstrap), so the interval speaks about these tasks and new
    items of theirs, not about new tasks. `results` maps a task to a number an item: 0 or 1, or the difference of two
    systems on that item, which pairs them.

    Raises:
        InputError: no task, a task without results, a level outside (0, 1), no resamples.

    Reference:
        B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), §13.3 (percentiles) and §8.3 (strata).
    """
    _check_level(level)
    empty = [name for name, values in results.items() if len(values) == 0]
    if not results or empty or resamples < 1:
        which = f"task {empty[0]}" if empty else "interval"
        raise InputError("nothing to resample", where=which, remedy="give results for each task and resamples >= 1")
    generator = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for name in sorted(results):
        values = np.asarray(results[name], dtype=np.float64)
        step = max(1, _DRAWS_AT_ONCE // len(values))
        for start in range(0, resamples, step):
            count = min(step, resamples - start)
            drawn = generator.integers(0, len(values), size=(count, len(values)))
            means[start : start + count] += values[drawn].mean(axis=1) / len(results)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(fmean(fmean(values) for values in results.values()), float(low), float(high), level)


def sign_flip_p(differences: Sequence[float]) -> float:
    """The two-sided p-value of paired differences under the hypothesis that each might as well have the other sign.

    Every one of the 2ⁿ signings is counted, so n differences give no p below 2^(1 − n).

    Raises:
        InputError: no differences, or more than 20.

    Reference:
        R. A. Fisher, The Design of Experiments (1935), §21.
    """
    if not 1 <= len(differences) <= 20:
        raise InputError(f"{len(differences)} differences", where="sign flips", remedy="give 1 to 20, one a seed")
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    reached = abs(sum(differences)) - 1e-12 * sum(map(abs, differences))  # equal sums may differ in their last bit
    return float((np.abs(sums) >= reached).mean())


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level {level} is outside (0, 1)", where="interval", remedy="0.95 is usual")
