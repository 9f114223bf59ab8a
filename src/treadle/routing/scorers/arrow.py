"""ARROW's score: abs(v_iᵀ x), v_i the top right singular vector of B_i A_i.

FLOPs a token and layer: 2·N·in. Storage an adapter and layer: in numbers. Reference: arXiv 2405.11157 §3.2; a softmax
over the best mixes them, three unless told otherwise, as in PEFT. `arrow` mixes their outputs, Σ w_i B_i A_i x, and
equals PEFT's `ArrowLoraLinearLayer` (a contract test says so). `arrow-parameters` mixes A and B, each by itself,
(Σ w_i B_i)(Σ w_i A_i) x, as the authors' library does; where A is shared the two are one.

Deviations: a token no permitted adapter can serve is left to the base. PEFT finds v by 15 steps of a power iteration
from a random start, so that its v is off where the two largest singular values are close; ours is exact. PEFT takes
the score in the adapter's dtype, ours is float32. Adapters of unequal rank, which neither library mixes by parameters,
are filled up with zeros.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.algebra import top_right_singular_vector
from treadle.routing.factors import LayerFactors

BEST = 3
"""How many adapters act together: the default of PEFT's `ArrowConfig`."""


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
