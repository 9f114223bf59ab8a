"""Scores with certain bounds: what every norm-based scorer computes at one layer."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.algebra import FP64_UNIT
from treadle.routing.factors import LayerFactors, scaled_norms


@dataclass(frozen=True)
class Scores:
    """Scores of one layer, each (tokens, adapters); -inf where an adapter is forbidden or ineligible.

    Attributes:
        value: the score as computed.
        lower: never above the true score.
        upper: never below the true score.
    """

    value: Float[Tensor, "tokens adapters"]
    lower: Float[Tensor, "tokens adapters"]
    upper: Float[Tensor, "tokens adapters"]


def standardised_norms(
    factors: LayerFactors,
    x: Float[Tensor, "tokens inner"],
    allowed: Bool[Tensor, "tokens adapters"],
    *,
    mean: Float[Tensor, " adapters"],
    std: Float[Tensor, " adapters"],
) -> Scores:
    """(‖B_i A_i x‖ − mean_i)/std_i with bounds, in float64; `allowed` masks before anything is compared."""
    value, lower, upper = scaled_norms(factors, x, std)
    centre, forbidden = mean / std, ~allowed
    # Root, scale, quotients and difference round a few times each, on the value and on its bounds alike.
    rounding = 16.0 * FP64_UNIT * (upper + centre.abs())
    return Scores(
        (value - centre).masked_fill(forbidden, -torch.inf),
        (lower - centre - rounding).masked_fill(forbidden, -torch.inf),
        (upper - centre + rounding).masked_fill(forbidden, -torch.inf),
    )


def narrowed(
    eligible: Bool[Tensor, " adapters"], permitted: Bool[Tensor, "tokens adapters"] | None, tokens: int
) -> Bool[Tensor, "tokens adapters"]:
    """Which adapters may be compared for each token: eligible at this layer, and permitted to the caller."""
    return eligible.expand(tokens, -1) if permitted is None else permitted & eligible
