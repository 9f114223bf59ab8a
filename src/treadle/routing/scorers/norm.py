"""The raw objective: ‖B_i A_i x‖, without calibration.

FLOPs and storage as for the z-score, less the two statistics. Reference: arXiv 2509.18093, the norm-maximising
objective. An adapter of large scale wins by its scale alone, and whoever inflates its B captures the routing.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.factors import LayerFactors
from treadle.routing.scores import Scores, narrowed, standardised_norms


def scores(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], permitted: Bool[Tensor, "tokens adapters"] | None
) -> Scores:
    """The activation norm of every adapter that has this layer."""
    allowed = narrowed(factors.present, permitted, x.shape[0])
    zero, one = torch.zeros_like(factors.mean), torch.ones_like(factors.std)
    return standardised_norms(factors, x, allowed, mean=zero, std=one)
