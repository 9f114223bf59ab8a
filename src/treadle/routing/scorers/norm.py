"""The raw objective: ‖B_i A_i x‖, without calibration.

FLOPs and storage as for SEQR's score, less the two statistics. Reference: arXiv 2509.18093, the norm-maximising
objective. An adapter of large scale wins by its scale alone, and whoever inflates its B captures the routing.
"""

import torch

from treadle.routing.factors import LayerFactors
from treadle.routing.scores import NormScore


def form(factors: LayerFactors) -> NormScore:
    """The activation norm of every adapter that has this layer."""
    return NormScore(torch.ones_like(factors.std), torch.zeros_like(factors.mean), factors.present)
