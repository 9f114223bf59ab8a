"""ARROW's score: abs(v_iᵀ x), v_i the top right singular vector of B_i A_i.

FLOPs a token and layer: 2·N·in. Storage an adapter and layer: in numbers. Reference: arXiv 2405.11157 §3.2; a softmax
over the k best mixes their outputs. Deviations: outputs are mixed, not parameters; a token no permitted adapter can
serve is left to the base.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.factors import LayerFactors
from treadle.routing.scores import Scores, narrowed


def scores(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], permitted: Bool[Tensor, "tokens adapters"] | None
) -> Scores:
    """The alignment of x with every adapter's strongest input direction (bounds equal to the value: no claim)."""
    allowed = narrowed(factors.present, permitted, x.shape[0])
    assert factors.prototypes is not None, "a routed model builds the prototypes before its first forward"
    value = (x.float() @ factors.prototypes.T).abs().masked_fill(~allowed, -torch.inf)
    return Scores(value, value, value)
