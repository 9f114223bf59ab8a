"""ARROW's score: abs(v_iᵀ x), v_i the top right singular vector of B_i A_i.

FLOPs a token and layer: 2·N·in. Storage an adapter and layer: in numbers. Reference: arXiv 2405.11157 §3.2; a softmax
over the k best mixes their outputs. Deviations: outputs are mixed, not parameters; a token no permitted adapter can
serve is left to the base.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.algebra import top_right_singular_vector
from treadle.routing.factors import LayerFactors


def prepare(factors: LayerFactors) -> LayerFactors:
    """The factors with each adapter's unit vector as its one direction."""
    first = factors.groups[0].A
    vectors = torch.zeros(factors.present.shape[0], 1, first.shape[1], device=first.device)
    for group in factors.groups:
        for adapter in group.columns.tolist():
            B = factors.folded_B(adapter).to(first.device)
            vectors[adapter, 0] = top_right_singular_vector(group.A, B).float()
    return replace(factors, directions=vectors)


def scores(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], allowed: Bool[Tensor, "tokens adapters"]
) -> Float[Tensor, "tokens adapters"]:
    """The alignment of x with every adapter's strongest input direction."""
    assert factors.directions is not None, "a routed model prepares its factors before its first forward"
    return (x.float() @ factors.directions[:, 0].T).abs()
