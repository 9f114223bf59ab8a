"""The scorers by name. Each is a file with one function, `scores(factors, x, permitted)`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from treadle.routing.factors import LayerFactors
from treadle.routing.scorers import arrow, mean, norm, zscore
from treadle.routing.scores import Scores


@dataclass(frozen=True)
class Scorer:
    """A scorer and how its scores are turned into action.

    Attributes:
        name: as configurations spell it.
        scores: (factors, x, permitted) → `Scores`.
        mixed: None if the argmax acts alone; else how many of the best act, softmax-weighted (0: all).
        calibrated: whether it needs the bank's statistics.
    """

    name: str
    scores: Callable[[LayerFactors, Tensor, Tensor | None], Scores]
    mixed: int | None
    calibrated: bool


SCORERS: Mapping[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer("zscore", zscore.scores, None, calibrated=True),
        Scorer("norm", norm.scores, None, calibrated=False),
        Scorer("arrow", arrow.scores, 3, calibrated=False),  # PEFT's default top_k
        Scorer("mean", mean.scores, 0, calibrated=False),
    )
}
