"""LAG's score: SPECTR's norm for the adapters that ARROW finds, 0 for all others.

FLOPs a token and layer: 2·N·in + 2·k·r·in. Storage an adapter and layer: (1 + r)·in numbers. Reference: arXiv
2507.05346; the best one acts alone.

Deviations: k is ours, since we know of no released code that states it. Forbidden adapters are left out before ARROW
looks, so that they take no place among the k. With at most k permitted adapters this is SPECTR's argmax.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.factors import LayerFactors
from treadle.routing.scorers import spectr

RETRIEVED = 4
"""How many adapters ARROW hands on for each token (k)."""


def prepare(factors: LayerFactors) -> LayerFactors:
    """The factors with ARROW's unit vector as each adapter's first direction, SPECTR's scaled ones behind it."""
    rows = spectr.prepare(factors).directions
    assert rows is not None, "spectr has just made them"
    return replace(factors, directions=torch.cat([torch.nn.functional.normalize(rows[:, :1], dim=2), rows], 1))


def scores(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], allowed: Bool[Tensor, "tokens adapters"]
) -> Float[Tensor, "tokens adapters"]:
    """‖S_i V_iᵀ x‖ of the adapters found, 0 of the others."""
    assert factors.directions is not None, "a routed model prepares its factors before its first forward"
    alignment = (x.float() @ factors.directions[:, 0].T).abs().masked_fill(~allowed, -torch.inf)
    found = alignment.topk(min(RETRIEVED, alignment.shape[1]), dim=1).indices
    wanted = torch.zeros_like(allowed).scatter(1, found, True) & allowed
    result = torch.zeros_like(alignment)
    for adapter in wanted.any(0).nonzero().flatten().tolist():
        rows = wanted[:, adapter].nonzero().flatten()
        z = x[rows].float() @ factors.directions[adapter, 1:].T
        result[rows, adapter] = torch.linalg.vector_norm(z, dim=1)
    return result
