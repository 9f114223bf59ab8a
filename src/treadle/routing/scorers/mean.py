"""MU: no score at all, every permitted adapter acts with equal weight.

FLOPs: those of N adapters. Reference: the "mean" baseline of arXiv 2509.18093.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.factors import LayerFactors


def scores(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], allowed: Bool[Tensor, "tokens adapters"]
) -> Float[Tensor, "tokens adapters"]:
    """0 for every adapter."""
    return torch.zeros(allowed.shape, device=x.device)


def eligible(factors: LayerFactors) -> Bool[Tensor, " adapters"]:
    """Everybody, whether it has this layer or not, since the mean divides by all of them."""
    return torch.ones_like(factors.present)
