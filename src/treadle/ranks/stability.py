"""How sure a probe's scores are, and how many trials its ranks need.

A module's standard error is `ModuleScore.standard_error`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, rankdata

from treadle import randomness
from treadle.errors import InputError, MismatchError
from treadle.ranks.scores import ProbeScores

Ranks = Mapping[str, int]
RanksOf = Callable[[Mapping[str, float]], Ranks]
"""Maps scores to integer ranks, both by module."""


def spearman(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """The rank correlation of two scores over the same modules, -1 to 1; ties share their mean rank.

    Raises:
        MismatchError: they are of different modules.
        InputError: there are fewer than two modules, or all scores of one are equal.
    """
    if first.keys() != second.keys():
        raise MismatchError("the scores are of different modules", remedy="probe the same modules")
    ranks = np.stack([rankdata([scores[name] for name in first]) for scores in (first, second)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    spread = np.sqrt((centred**2).sum(axis=1))
    if len(first) < 2 or not spread.all():
        raise InputError("equal scores have no order to compare", remedy="compare scores of two modules or more")
    return float((centred[0] * centred[1]).sum() / spread.prod())


def split_half(
    scores: ProbeScores, *, over: Literal["trials", "texts"] = "texts", splits: int = 50, seed: int = 0
) -> float:
    """The mean Spearman correlation of scores from one half of the trials, or texts, with those from the other.

    Halves are drawn `splits` times; of an odd number one is left out. Nothing is corrected for: the whole, twice a
    half, is surer than this says.

    Raises:
        InputError: there are fewer than two trials, or texts.
    """
    values = _values(scores)
    axis = 1 if over == "trials" else 2
    half = values.shape[axis] // 2
    if half < 1:
        raise InputError(f"one of the {over} has no halves", remedy=f"probe with two {over} or more")
    found: list[float] = []
    for number in range(splits):
        order = np.argsort(randomness.uniform(seed, f"halves/{number}", (values.shape[axis],)))
        means = [
            values.take(part, axis=axis).mean(axis=(1, 2)).tolist() for part in (order[:half], order[half : 2 * half])
        ]
        first, second = (dict(zip(scores.modules, part, strict=True)) for part in means)
        found.append(spearman(first, second))
    return float(np.mean(found))


def unchanged_share(
    scores: ProbeScores,
    ranks_of: RanksOf,
    *,
    draws: int = 1000,
    moving: float = 0.0,
    enough: float = 0.0,
    seed: int = 0,
) -> float:
    """In what share of bootstrap draws the integer ranks are those of the whole, 0 to 1.

    A draw takes as many trials as there are, n, with replacement and the same ones for all modules; texts are kept, as
    more trials do not make them more. How far its scores are from those of the whole is multiplied by √(n/χ²), with χ²
    drawn with n − 1 degrees of freedom: draws of a few trials scatter too little, by (n − 1)/n, and do not know how
    well those few tell the scatter; so drawn, a mean of normal trials has Student's t about it. A draw whose scores
    cannot be shared out has other ranks. Ranks count as those of the whole where at most the share `moving` of the
    modules has another one.

    Args:
        scores: of two trials or more.
        ranks_of: scores to ranks.
        draws: how many.
        moving: 0 to 1.
        enough: as soon as this share cannot be reached any more, that of the draws made so far is returned, which is
            below it.
        seed: of the draws.

    Raises:
        InputError: there are fewer than two trials.
    """
    means = _values(scores).mean(axis=2)
    trials = means.shape[1]
    if trials < 2:
        raise InputError("one trial tells nothing of another", remedy="probe with two trials or more")
    names = list(scores.modules)
    mean = means.mean(axis=1)
    whole = ranks_of(dict(zip(names, mean.tolist(), strict=True)))
    taken = (randomness.uniform(seed, "bootstrap", (draws, trials)) * trials).astype(int)
    widths = np.sqrt(trials / chi2.ppf(1.0 - randomness.uniform(seed, "scatter", (draws,)), trials - 1))
    changed = 0
    for number in range(draws):
        away = means[:, taken[number]].mean(axis=1) - mean
        drawn = np.maximum(mean + away * widths[number], 0.0)
        try:
            ranks = ranks_of(dict(zip(names, drawn.tolist(), strict=True)))
        except InputError:  # such as a draw in which every score is 0
            changed += 1
        else:
            changed += sum(ranks[name] != whole[name] for name in names) > moving * len(names)
        if changed > (1 - enough) * draws:
            return 1 - changed / (number + 1)
    return 1 - changed / draws


def _values(scores: ProbeScores) -> NDArray[np.float64]:
    """(modules, trials, texts)."""
    return np.array([score.values for score in scores.modules.values()])


@dataclass(frozen=True)
class TrialsRule:
    """When trials suffice.

    Attributes:
        first: trials to begin with.
        step: trials added at a time.
        maximum: trials at most.
        confidence: 1 less the chance, over all looks together, of calling ranks settled that endless trials would
            change; for trials that scatter normally. See `enough`.
        moving: share of modules that may have another rank in a draw that counts as unchanged. With hundreds of
            modules some score always lies on the border of two ranks; 0 then asks for very many trials.

    Raises:
        InputError: fewer than two trials to begin with, a step below 1, a maximum below the first, or a share
            outside 0..1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    first: int = 5
    step: int = 5
    maximum: int = 40
    confidence: float = 0.95
    moving: float = 0.0

    def __post_init__(self) -> None:
        if not (2 <= self.first <= self.maximum and self.step >= 1):
            raise InputError(
                f"cannot go from {self.first} trials by {self.step} to {self.maximum}",
                remedy="use 2 ≤ first ≤ maximum and step ≥ 1",
            )
        if not (0 < self.confidence <= 1 and 0 <= self.moving < 1):
            raise InputError(
                f"confidence {self.confidence} or moving {self.moving} is no share",
                remedy="use 0 < confidence ≤ 1 and 0 ≤ moving < 1",
            )

    @property
    def enough(self) -> float:
        """The share of bootstrap draws in which ranks must be unchanged at one look, so that all looks together err
        no more often than the confidence says.
        """
        looks = 1 + -(-(self.maximum - self.first) // self.step)
        return 1 - (1 - self.confidence) / looks


@dataclass(frozen=True)
class Settled:
    """Scores from as many trials as were needed.

    Attributes:
        scores: from all trials.
        trials: how many.
        unchanged: share of bootstrap draws with unchanged ranks; a rougher figure where it is too small.
        settled: whether that is enough; False where the maximum came first.
    """

    scores: ProbeScores
    trials: int
    unchanged: float
    settled: bool


def until_settled(
    probe: Callable[[int], ProbeScores], ranks_of: RanksOf, *, rule: TrialsRule | None = None, seed: int = 0
) -> Settled:
    """The scores from the fewest trials at which integer ranks no longer change, or from the maximum.

    The rule: after `first` trials, and after every `step` more, trials are drawn with replacement 1000 times; stop as
    soon as in at least the share `rule.enough` of the draws the ranks equal those from all trials (see
    `unchanged_share`, also for `moving`). The error that the confidence permits is divided among the looks.

    Args:
        probe: the scores from so many trials. Give it a `PartialProbe` to keep, so that only new trials are run.
        ranks_of: scores to ranks, for example an allocation at the plan's budget.
        rule: by default 95% confidence, every module, 5 to 40 trials by fives.
        seed: of the bootstrap.
    """
    chosen = rule or TrialsRule()
    trials = chosen.first
    while True:
        scores = probe(trials)
        share = unchanged_share(scores, ranks_of, moving=chosen.moving, enough=chosen.enough, seed=seed)
        if share >= chosen.enough or trials == chosen.maximum:
            return Settled(scores, trials, share, share >= chosen.enough)
        trials = min(trials + chosen.step, chosen.maximum)
