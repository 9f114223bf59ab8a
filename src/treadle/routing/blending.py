"""Mixing the parameters of those who act rather than their outputs."""

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.routing.decision import Mixture
from treadle.routing.factors import LayerFactors
from treadle.routing.latents import Latents


def blended(factors: LayerFactors, x: Float[Tensor, "tokens inner"], latents: Latents, chosen: Mixture) -> Latents:
    """Latents that are (Σ w_i A_i)·x under every adapter, so that acting on them gives (Σ w_i B_i)(Σ w_i A_i)·x.

    An adapter of lower rank counts as one of the layer's highest rank whose last rows of A and columns of B are zero.

    Args:
        factors: of the layer.
        x: its input.
        latents: of x, under each adapter's own A.
        chosen: who acts, with weights.
    """
    assert chosen.weight is not None, "one adapter that acts alone has nothing to be mixed with"
    there = torch.isin(chosen.adapter, torch.tensor(list(factors.group_places), device=x.device))
    token, slot = there.nonzero(as_tuple=True)
    z = latents.gathered(token, chosen.adapter[token, slot]) * chosen.weight[token, slot, None]
    mixed = torch.zeros(x.shape[0], factors.rank, device=x.device).index_add(0, token, z)
    return Latents(x, factors, [mixed[:, : group.A.shape[0]] for group in factors.groups])
