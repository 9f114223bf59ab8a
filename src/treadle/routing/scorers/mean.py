"""MU: no score at all, every permitted adapter acts with equal weight.

FLOPs: those of N adapters. Reference: the "mean" baseline of arXiv 2509.18093.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.factors import LayerFactors
from treadle.routing.scores import Scores


def scores(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], permitted: Bool[Tensor, "tokens adapters"] | None
) -> Scores:
    """0 for every permitted adapter, whether it has this layer or not, since the mean divides by all of them."""
    value = torch.zeros(x.shape[0], factors.present.shape[0], device=x.device)
    value = value if permitted is None else value.masked_fill(~permitted, -torch.inf)
    return Scores(value, value, value)
