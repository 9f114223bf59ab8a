"""SEQR's score: (‖B_i A x‖ − μ_i)/σ_i.

FLOPs a token and layer: 2·r·in for z (shared), N·r(r+1) for the scores. Storage an adapter and layer: r(r+1)/2 + 2
numbers. Reference: arXiv 2509.18093. Deviations: Gram factors in place of the QR triangle (the same norm, half the
products; `routing/reference.py` has the article's own form); μ and σ are of the bank's calibration, whichever that is.
"""

from treadle.routing.factors import LayerFactors
from treadle.routing.scores import NormScore


def form(factors: LayerFactors) -> NormScore:
    """The calibrated score of every adapter; untrained, absent and uncalibrated ones are ineligible."""
    return NormScore(factors.std, factors.mean / factors.std, factors.eligible)
