"""The norm as a multiple of its mean: ‖B_i A_i x‖/μ_i.

FLOPs and storage as for SEQR's score, less σ. Reference: none; between the raw norm and the z-score of arXiv
2509.18093, it takes an adapter's scale out but not the spread of its norms.
"""

import torch

from treadle.routing.factors import LayerFactors
from treadle.routing.scores import NormScore


def form(factors: LayerFactors) -> NormScore:
    """The relative activation norm; untrained, absent and uncalibrated adapters are ineligible."""
    return NormScore(factors.mean, torch.zeros_like(factors.mean), factors.eligible)
