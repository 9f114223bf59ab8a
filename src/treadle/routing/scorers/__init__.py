"""The scorers by name, one a file.

A scorer of the norm has a function `form(factors) -> NormScore`: its argmax is exact. Any other has
`scores(factors, x, allowed)`, numbers without bounds. Masks are applied here, for all of them alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.factors import LayerFactors
from treadle.routing.scorers import arrow, mean, norm, ratio, seqr
from treadle.routing.scores import NormScore, Scores, bounded, narrowed

Form = Callable[[LayerFactors], NormScore]
Plain = Callable[[LayerFactors, Tensor, Tensor], Tensor]


def _present(factors: LayerFactors) -> Tensor:
    return factors.present


def _as_built(factors: LayerFactors) -> LayerFactors:
    return factors


@dataclass(frozen=True)
class Scorer:
    """A scorer and how its scores are turned into action.

    Attributes:
        name: as configurations spell it.
        form: of a scorer of the norm; None for the others.
        plain: (factors, x, allowed) → (tokens, adapters), of the others.
        prepare: what the factors need besides Grams, made once and never in `forward`.
        eligible: who may be chosen at a layer, of the others.
        top_k: how many of the best act unless the caller says so; 1 is the argmax, 0 all.
        calibrated: whether it needs the bank's statistics.
    """

    name: str
    form: Form | None = None
    plain: Plain | None = None
    prepare: Callable[[LayerFactors], LayerFactors] = _as_built
    eligible: Callable[[LayerFactors], Tensor] = _present
    top_k: int = 1
    calibrated: bool = False

    def scores(
        self,
        factors: LayerFactors,
        x: Float[Tensor, "tokens inner"],
        permitted: Bool[Tensor, "tokens adapters"] | None,
    ) -> Scores:
        """The scores of one layer; forbidden and ineligible adapters are masked before anybody compares them."""
        if self.form is not None:
            form = self.form(factors)
            return bounded(factors, x, form, narrowed(form.eligible, permitted, x.shape[0]))
        assert self.plain is not None, "a scorer has a form or plain scores"
        allowed = narrowed(self.eligible(factors), permitted, x.shape[0])
        value = self.plain(factors, x, allowed).masked_fill(~allowed, -torch.inf)
        return Scores(value, value, value)


SCORERS: Mapping[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer("seqr", seqr.form, calibrated=True),
        Scorer("norm", norm.form),
        Scorer("ratio", ratio.form, calibrated=True),
        Scorer("arrow", plain=arrow.scores, prepare=arrow.prepare, top_k=3),  # PEFT's default top_k
        Scorer("mean", plain=mean.scores, eligible=mean.eligible, top_k=0),
    )
}
