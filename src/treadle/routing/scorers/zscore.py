"""SEQR's score: (‖B_i A x‖ − μ_i)/σ_i.

FLOPs a token and layer: 2·r·in for z (shared), N·r(r+1) for the scores. Storage an adapter and layer: r(r+1)/2 + 2
numbers. Reference: arXiv 2509.18093. Deviations: Gram factors in place of the QR triangle (the same norm, half the
products); μ and σ come from whichever calibration the bank was given.
"""

from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.factors import LayerFactors
from treadle.routing.scores import Scores, narrowed, standardised_norms


def scores(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], permitted: Bool[Tensor, "tokens adapters"] | None
) -> Scores:
    """The calibrated score of every adapter; untrained, absent and uncalibrated ones are ineligible."""
    allowed = narrowed(factors.eligible, permitted, x.shape[0])
    return standardised_norms(factors, x, allowed, mean=factors.mean, std=factors.std)
