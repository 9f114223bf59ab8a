"""Frozen A made from what is public: the base's weights, or what its layers see of a public text. Neither costs ε.

Rows are orthonormal, the most important direction first, and the largest entry of each is positive. Their last bits
hang on the machine's LAPACK, so a family is made once and shared as files; its fingerprint is of those bytes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from treadle.algebra import largest_signs
from treadle.family.injection import adapted_layers
from treadle.family.plan import RankPlan
from treadle.progress import Progress, silent


def weight_svd(model: nn.Module, plan: RankPlan, progress: Progress = silent) -> dict[str, Tensor]:
    """For every planned module the right singular vectors of its weight W with the largest singular values, as rows.

    A·x are then the coordinates of x to which the layer itself answers most strongly.

    Args:
        model: the base.
        plan: its ranks say how many.
        progress: called after every module.

    Raises:
        MismatchError: the model lacks a planned module, or it has another shape.

    Reference: arXiv 2404.02948 (PiSSA), whose principal directions these are.

    Deviations: PiSSA puts W's principal part into B·A and leaves the rest as the base. Here the base stays as it is, B
    starts at zero, and the singular values go nowhere.
    """
    layers = adapted_layers(model, {name: row.shape for name, row in plan.modules.items()})
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        progress("singular vectors", len(found), len(layers))
        found[name] = right_singular_vectors(_weight_of(layer), plan.modules[name].rank)
    return found


def _weight_of(layer: nn.Module) -> Float[Tensor, "outer inner"]:
    weight = layer.get_parameter("weight").detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def right_singular_vectors(weight: Float[Tensor, "outer inner"], rank: int) -> Float[Tensor, "{rank} inner"]:
    """The first `rank` right singular vectors of the weight as rows, float32; rank is at most its smaller side.

    From the eigenvectors of the smaller of W·Wᵀ and Wᵀ·W in float64. They are as well determined as a weight stored in
    float32 determines them, and a zero weight gives some orthonormal rows.
    """
    W = weight.cpu().double()
    if W.shape[1] <= W.shape[0]:
        return principal_directions(W.T @ W, rank)
    basis, triangle = torch.linalg.qr(W.T)  # W = triangleᵀ·basisᵀ: its right singular vectors lie in the basis
    return _oriented(_leading(triangle @ triangle.T, rank) @ basis.T)


def principal_directions(covariance: Float[Tensor, "inner inner"], rank: int) -> Float[Tensor, "{rank} inner"]:
    """The eigenvectors of the largest `rank` eigenvalues as rows, float32, the largest eigenvalue first."""
    return _oriented(_leading(covariance.double(), rank))


def _leading(symmetric: Float[Tensor, "inner inner"], rank: int) -> Float[Tensor, "{rank} inner"]:
    return torch.linalg.eigh(symmetric).eigenvectors[:, -rank:].flip(1).T


def _oriented(rows: Float[Tensor, "rank inner"]) -> Float[Tensor, "rank inner"]:
    return (largest_signs(rows)[:, None] * rows).float()
