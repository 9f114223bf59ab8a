"""SEQR's score by the article's own factors: (‖R_i A x‖ − μ_i)/σ_i with B_i = Q_i R_i.

The same numbers as `seqr` by twice the products, all of them in float64 and without bounds: for whoever wants the
published arithmetic in a served model, or to check the fast path with (`routing.reference` has the whole layer).

FLOPs a token and layer: 2·r·in for z (shared), 2·N·r² for the scores. Storage an adapter and layer: r² + 2 numbers.
Reference: arXiv 2509.18093. Deviations: none known; Q is not stored, for Q R z = B z acts.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.factors import LayerFactors, latent, triangles


def prepare(factors: LayerFactors) -> LayerFactors:
    """The factors with every adapter's triangle, filled up with zeros to (rank, rank), as directions."""
    rank = factors.rank
    held = torch.zeros(factors.present.shape[0], rank, rank, dtype=torch.float64, device=factors.present.device)
    for group in factors.groups:
        for place, R in triangles(factors, group, group.columns.tolist()).items():
            held[place, : R.shape[0], : R.shape[1]] = R
    return replace(factors, directions=held)


def eligible(factors: LayerFactors) -> Bool[Tensor, " adapters"]:
    """Those with a z-score at this layer."""
    return factors.eligible


def scores(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], allowed: Bool[Tensor, "tokens adapters"]
) -> Float[Tensor, "tokens adapters"]:
    """The calibrated score of every adapter, float64."""
    assert factors.directions is not None, "prepare() comes first"
    norms = x.new_zeros(x.shape[0], factors.present.shape[0], dtype=torch.float64)
    for group in factors.groups:
        z = latent(group, x)
        h = torch.einsum("nsr,tr->tns", factors.directions[group.columns, :, : z.shape[1]], z)
        norms[:, group.columns] = torch.linalg.vector_norm(h, dim=2)
    return (norms - factors.mean) / factors.std
