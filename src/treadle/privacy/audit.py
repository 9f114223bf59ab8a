"""What an attacker's guesses prove: a lower bound on ε, from one run in which many canaries were in by a fair coin.

Each of m canaries is in the training data or not, by its own coin. After the run an attacker, who knows the canaries
but not the coins, guesses for some of them and abstains from the rest. Under (ε, δ) hardly more guesses can be right
than a randomised response gives, so that too many right ones refute the ε: no second run is needed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from treadle.errors import ConfigError, InputError, require
from treadle.privacy.accounting import MechanismEvent, epsilon_of

_NORMAL = NormalDist()
_HALVINGS = 24
_MOST_EPSILON = 700.0  # beyond it a probability of 1 - 1/e^ε is 1


@dataclass(frozen=True)
class Guesses:
    """How an attacker did.

    Attributes:
        canaries: how many had a coin.
        made: guesses about them; how many, and by what rule, was fixed before the coins were known.
        right: of those.

    Raises:
        ConfigError: the numbers contradict each other.
    """

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        """Hold the numbers against each other."""
        if not 0 <= self.right <= self.made <= self.canaries:
            raise ConfigError(f"{self.right} right of {self.made} guesses about {self.canaries} canaries")

    @staticmethod
    def pooled(runs: Sequence["Guesses"]) -> "Guesses":
        """The guesses of independent runs as those of one: a coin has its part in one of them only."""
        return Guesses(sum(g.canaries for g in runs), sum(g.made for g in runs), sum(g.right for g in runs))


def guessed(
    scores: Float[np.ndarray, " canaries"], members: Bool[np.ndarray, " canaries"], *, included: int, excluded: int
) -> Guesses:
    """The guesses that the canaries of the highest scores are in, those of the lowest are out.

    Args:
        scores: a canary's, higher where it seems to be in; made without a look at `members`.
        members: the coins.
        included: how many are guessed to be in.
        excluded: how many are guessed to be out.

    Raises:
        ConfigError: more guesses than canaries.
        InputError: a score is not a number.
    """
    if min(included, excluded) < 0 or included + excluded > len(scores):
        raise ConfigError(f"{included} + {excluded} guesses about {len(scores)} canaries", remedy="guess less often")
    if np.isnan(scores).any():
        raise InputError("a canary's score is not a number", remedy="check that the training did not diverge")
    order = np.argsort(scores, kind="stable")
    right = int(members[order[len(order) - included :]].sum()) + int((~members[order[:excluded]]).sum())
    return Guesses(len(scores), included + excluded, right)


def p_value(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """The most probable that so many right guesses, or more, can be under (ε, δ), when one row is added or removed.

    Args:
        guesses: of one run.
        epsilon: 0 or more.
        delta: in [0, 1].

    Reference: arXiv 2305.08846, corollary 5.4 and appendix D.
    """
    made, right = guesses.made, guesses.right
    chances = _binomial(made, epsilon)
    above = float(chances[right:].sum())
    below = np.cumsum(chances[:right][::-1])  # of being 1, 2, … short of `right` at most
    slack = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, above + 2.0 * guesses.canaries * delta * slack)


def _binomial(trials: int, epsilon: float) -> NDArray[np.float64]:
    """The chances of 0 … `trials` successes of probability e^ε / (1 + e^ε) each."""
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, trials + 1)))])
    successes = np.arange(trials + 1)
    ways = factorials[trials] - factorials - factorials[::-1]
    failed = np.log1p(np.exp(-epsilon))  # minus the logarithm of a success's probability
    return np.exp(ways - successes * failed - (trials - successes) * (epsilon + failed))


def epsilon_lower_bound(guesses: Guesses, *, delta: float, failure: float = 0.05) -> float:
    """An ε that the mechanism does not keep at this δ, 0.0 if nothing is refuted.

    Wrong with probability `failure` at most, over coins and noise, whatever the mechanism and the attack are.

    Args:
        guesses: of one run, or pooled ones.
        delta: in [0, 1).
        failure: one minus the confidence, in (0, 1).

    Raises:
        ConfigError: a value is out of its range.

    Reference: arXiv 2305.08846, appendix D.
    """
    _check(delta, failure)
    return _largest(lambda epsilon: p_value(guesses, epsilon=epsilon, delta=delta) < failure, _MOST_EPSILON)


def gaussian_lower_bound(guesses: Guesses, *, delta: float, failure: float = 0.05) -> float:
    """The ε at this δ of the best Gaussian mechanism that the guesses refute, 0.0 if they refute none.

    Tighter than `epsilon_lower_bound`, for more is supposed: that the mechanism's whole trade-off between the two
    errors is that of one Gaussian, as it nearly is for many noised steps. If it is not, this bounds nothing.

    Args:
        guesses: of one run, or pooled ones.
        delta: in [1e-12, 1).
        failure: one minus the confidence, in (0, 1).

    Raises:
        ConfigError: a value is out of its range.

    Reference: arXiv 2410.22235, algorithm for guesses with abstention.
    """
    _check(delta, failure)
    separation = _largest(lambda mu: not _is_possible(guesses, mu, failure), 30.0)
    return epsilon_of([MechanismEvent(1.0 / separation, 1.0, 1)], delta=delta) if separation > 1e-6 else 0.0


def _is_possible(guesses: Guesses, separation: float, failure: float) -> bool:
    """Whether so many right guesses agree with two unit Gaussians that lie `separation` apart."""
    made, share = guesses.made, guesses.made / guesses.canaries
    if guesses.right == 0:
        return True
    right, wrong = failure * share * guesses.right / made, failure * share * (made - guesses.right) / made
    for count in range(guesses.right - 1, -1, -1):
        if right + wrong > share:  # neither ever falls
            return False
        more = max(wrong, _NORMAL.cdf(_NORMAL.inv_cdf(right) - separation))
        right += count / (made - count) * (more - wrong)
        wrong = more
    return right + wrong <= share


def _check(delta: float, failure: float) -> None:
    require("delta", delta, 0 <= delta < 1, "in [0, 1)")
    require("failure", failure, 0 < failure < 1, "in (0, 1)")


def _largest(is_refuted: Callable[[float], bool], most: float) -> float:
    """The largest number up to `most` that is refuted, from below; 0.0 if none is."""
    low, high = 0.0, 1.0
    if not is_refuted(0.0):
        return 0.0
    while high < most and is_refuted(high):
        low, high = high, min(most, 2.0 * high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low


def sampled_gaussian_loss(
    released: Float[np.ndarray, "steps canaries"], *, noise_multiplier: float, sample_rate: float
) -> Float[np.ndarray, " canaries"]:
    """The logarithm of how much likelier each canary's releases are if it was in: the best score that there is.

    Args:
        released: at each step, the noised sum along the canary's gradient, in units of the norm that it is clipped to.
        noise_multiplier: of the Gaussian that the attacker believes in; above 0.
        sample_rate: with which a step takes the canary if it is in.

    Reference: Neyman and Pearson's test of N(0, σ²) against (1 - q)·N(0, σ²) + q·N(1, σ²) at every step.
    """
    skipped = math.log1p(-sample_rate) if sample_rate < 1 else -math.inf
    gains = math.log(sample_rate) + (released - 0.5) / noise_multiplier**2
    return np.logaddexp(skipped, gains).sum(axis=0)
