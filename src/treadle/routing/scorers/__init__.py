"""The scorers by name, one a file.

A scorer of the norm has a function `form(factors) -> NormScore`: its argmax is exact. Any other scorer of a layer has
`scores(factors, x, allowed)`, numbers without bounds. A scorer of prompts has `scores(batch)` and works with
`sequence` alone. Masks are applied here, for all of them alike.

`SCORERS` holds those that need nothing but the bank; `fixed.fixed` and `linear.linear` make one of a name and of a
trained router. Every file states score, FLOPs, storage, reference and deviations; N adapters of rank r, in inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.errors import InputError
from treadle.routing.factors import LayerFactors
from treadle.routing.prompt_batch import PromptBatch
from treadle.routing.scorers import arrow, lag, mean, norm, perplexity, ratio, seqr, seqr_qr, spectr
from treadle.routing.scores import NormScore, Scores, bounded, narrowed

Form = Callable[[LayerFactors], NormScore]
Plain = Callable[[LayerFactors, Tensor, Tensor], Tensor]
OfPrompts = Callable[[PromptBatch], Tensor]


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
        plain: (factors, x, allowed) → (tokens, adapters), of the others that score layers.
        prompt: batch → (rows, adapters), of those that score whole prompts.
        prepare: what the factors need besides Grams, made once and never in `forward`.
        eligible: who may be chosen at a layer, of the others.
        top_k: how many of the best act unless the caller says so; 1 is the argmax, 0 all.
        calibrated: whether it needs the bank's statistics.
        weighs_layers: whether `sequence` scores a prompt in deviations of public prompts, where the bank has some.
        blends: whether A and B of those who act are mixed, rather than their outputs.
    """

    name: str
    form: Form | None = None
    plain: Plain | None = None
    prompt: OfPrompts | None = None
    prepare: Callable[[LayerFactors], LayerFactors] = _as_built
    eligible: Callable[[LayerFactors], Tensor] = _present
    top_k: int = 1
    calibrated: bool = False
    weighs_layers: bool = False
    blends: bool = False

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
        assert self.plain is not None, "a scorer of prompts is never asked about a layer"
        allowed = narrowed(self.eligible(factors), permitted, x.shape[0])
        value = self.plain(factors, x, allowed).masked_fill(~allowed, -torch.inf)
        return Scores(value, value, value)

    def prompt_scores(self, batch: PromptBatch) -> Float[Tensor, "rows adapters"]:
        """The scores of whole prompts, float64; -inf where an adapter is forbidden."""
        assert self.prompt is not None, "only a scorer of prompts is asked about one"
        return self.prompt(batch).double().masked_fill(~batch.permitted, -torch.inf)


SCORERS: Mapping[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer("seqr", seqr.form, calibrated=True, weighs_layers=True),
        Scorer("seqr-qr", plain=seqr_qr.scores, prepare=seqr_qr.prepare, eligible=seqr_qr.eligible, calibrated=True),
        Scorer("norm", norm.form),
        Scorer("ratio", ratio.form, calibrated=True),
        Scorer("arrow", plain=arrow.scores, prepare=arrow.prepare, top_k=arrow.BEST),
        Scorer("arrow-parameters", plain=arrow.scores, prepare=arrow.prepare, top_k=arrow.BEST, blends=True),
        Scorer("spectr", plain=spectr.scores, prepare=spectr.prepare, top_k=spectr.BEST),
        Scorer("lag", plain=lag.scores, prepare=lag.prepare),
        Scorer("mean", plain=mean.scores, eligible=mean.eligible, top_k=0),
        Scorer("perplexity", prompt=perplexity.scores),
    )
}


def scorer_of(name: str | Scorer) -> Scorer:
    """The scorer of this name, or the one given.

    Raises:
        InputError: there is none.
    """
    if isinstance(name, Scorer):
        return name
    if name not in SCORERS:
        raise InputError(f"no such scorer {name!r}", remedy=f"choose among {', '.join(SCORERS)}")
    return SCORERS[name]
