"""SEQR as the article writes it, for checking: QR factors, a loop over adapters, one argmax a token.

    B_i = Q_i R_i                              once, offline
    z   = A x
    h_i = R_i z
    s_i = (‖h_i‖ − μ_i)/σ_i                    i* = argmax s_i
    y   = W x + Q_i* h_i*

The fast road (`routing.table`, `routing.mixture`) gives the same answer by other products; a test holds the two
together. FLOPs a token and layer: 2·r·in + 2·N·r² + 2·r·out. Storage an adapter and layer: r·out + r² + 2 numbers.
Reference: arXiv 2509.18093.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.errors import UnsupportedError
from treadle.routing.factors import LayerFactors


@dataclass(frozen=True)
class QrFactors:
    """What `seqr_routing` needs of one layer, in its arguments' order, but for x and W.

    Attributes:
        A: shared by all.
        Qs: with orthonormal columns.
        Rs: upper triangles.
        mus: mean of ‖B_i A x‖.
        sigmas: its standard deviation.
    """

    A: Float[Tensor, "rank inner"]
    Qs: Float[Tensor, "adapters outer small"]
    Rs: Float[Tensor, "adapters small rank"]
    mus: Float[Tensor, " adapters"]
    sigmas: Float[Tensor, " adapters"]


def qr_factors(factors: LayerFactors) -> QrFactors:
    """The article's factors of a calibrated layer, scaling folded in, float64.

    Raises:
        UnsupportedError: an adapter lacks the layer, has an A of its own, or cannot be scored: the article knows none
            of these.
    """
    group, *others = factors.groups
    if others or not bool(factors.eligible.all()):
        raise UnsupportedError(
            "the article needs one A, and a calibrated, trained adapter each", where=factors.module, remedy="use seqr"
        )
    stacked = torch.stack([factors.folded_B(i) for i in range(factors.present.shape[0])]).double()
    Qs, Rs = torch.linalg.qr(stacked)
    return QrFactors(group.A.double(), Qs, Rs, factors.mean, factors.std)


def seqr_routing(
    x: Float[Tensor, "tokens inner"],
    A: Float[Tensor, "rank inner"],
    Qs: Float[Tensor, "adapters outer small"],
    Rs: Float[Tensor, "adapters small rank"],
    mus: Float[Tensor, " adapters"],
    sigmas: Float[Tensor, " adapters"],
    W: Float[Tensor, "outer inner"],
) -> Float[Tensor, "tokens outer"]:
    """The layer's output with the best-scored adapter acting on each token; computed in the arguments' dtype.

    Args:
        x: the layer's input.
        A: the shared, frozen lora_A.
        Qs: of B_i = Q_i R_i.
        Rs: likewise.
        mus: mean of ‖B_i A x‖ over calibration tokens.
        sigmas: its standard deviation, above 0.
        W: the layer's own weight.

    Reference: arXiv 2509.18093, its routing algorithm. Deviations: none known; ties go to the first.
    """
    z = x @ A.T
    h = torch.einsum("nsr,tr->tns", Rs, z)
    best = seqr_choice(h, mus, sigmas)
    chosen = h[torch.arange(x.shape[0]), best]
    return x @ W.T + torch.einsum("tos,ts->to", Qs[best], chosen)


def seqr_choice(
    h: Float[Tensor, "tokens adapters small"], mus: Float[Tensor, " adapters"], sigmas: Float[Tensor, " adapters"]
) -> Int[Tensor, " tokens"]:
    """The place of the highest z-score of ‖h_i‖ for each token, the first where some tie."""
    return ((torch.linalg.vector_norm(h, dim=2) - mus) / sigmas).argmax(1)
