"""SPECTR's score: ‖S_i V_iᵀ x‖ with B_i A_i = U_i S_i V_iᵀ, which is ‖B_i A_i x‖ by other products.

FLOPs a token and layer: 2·N·r·in. Storage an adapter and layer: r·in numbers. Reference: arXiv 2504.03454; the best
adapters act together, four in the authors' code (github.com/wfleshman/spectr).

Deviations: S is part of the score. The authors' code scores by ‖V_iᵀ x‖, which is the same number for every adapter
where A is shared. It gives its four best equal weights and mixes their aligned factors, (Σ w U_i S_i)(Σ w V_iᵀ); here
a softmax of the scores weighs them, and outputs are mixed. A high `temperature` makes the weights equal.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.factors import LayerFactors

BEST = 4
"""How many adapters act together, as in the authors' code."""


def prepare(factors: LayerFactors) -> LayerFactors:
    """The factors with the rows of S·Vᵀ as each adapter's directions, the strongest first, zeros below its rank."""
    first = factors.groups[0].A
    rows = torch.zeros(factors.present.shape[0], factors.rank, first.shape[1], device=first.device)
    for group in factors.groups:
        for adapter in group.columns.tolist():
            found = scaled_directions(group.A, factors.folded_B(adapter).to(first.device))
            rows[adapter, : found.shape[0]] = found.float()
    return replace(factors, directions=rows)


def scaled_directions(A: Float[Tensor, "rank inner"], B: Float[Tensor, "outer rank"]) -> Float[Tensor, "small inner"]:
    """S·Vᵀ of B·A in float64; B = QR gives B·A = Q·(R·A), so the wide product is never formed."""
    triangle = torch.linalg.qr(B.double(), mode="r").R
    _, values, rows = torch.linalg.svd(triangle @ A.double(), full_matrices=False)
    return values[:, None] * rows


def scores(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], allowed: Bool[Tensor, "tokens adapters"]
) -> Float[Tensor, "tokens adapters"]:
    """‖S_i V_iᵀ x‖ of every adapter."""
    assert factors.directions is not None, "a routed model prepares its factors before its first forward"
    count, rows, _ = factors.directions.shape
    z = x.float() @ factors.directions.flatten(0, 1).T
    return torch.linalg.vector_norm(z.reshape(x.shape[0], count, rows), dim=2)
