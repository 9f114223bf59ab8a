"""Scores of one layer: an affine function of ‖B A x‖ with certain bounds, or any other number without."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.algebra import FP64_UNIT
from treadle.routing.factors import LayerFactors, scaled_norms


@dataclass(frozen=True)
class NormScore:
    """The score ‖B_i A_i x‖ / unit_i − centre_i of every adapter i at one layer; what the exact argmax works on.

    Attributes:
        unit: (adapters,) above 0 where eligible, float64.
        centre: (adapters,) float64, already divided by the unit.
        eligible: (adapters,), who may be chosen at all.
    """

    unit: Float[Tensor, " adapters"]
    centre: Float[Tensor, " adapters"]
    eligible: Bool[Tensor, " adapters"]


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


def bounded(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], form: NormScore, allowed: Bool[Tensor, "tokens adapters"]
) -> Scores:
    """‖B_i A_i x‖ / unit_i − centre_i with bounds, in float64; `allowed` masks before anything is compared."""
    value, lower, upper = scaled_norms(factors, x, form.unit)
    forbidden = ~allowed
    # Root, scale, quotients and difference round a few times each, on the value and on its bounds alike.
    rounding = 16.0 * FP64_UNIT * (upper + form.centre.abs())
    return Scores(
        (value - form.centre).masked_fill(forbidden, -torch.inf),
        (lower - form.centre - rounding).masked_fill(forbidden, -torch.inf),
        (upper - form.centre + rounding).masked_fill(forbidden, -torch.inf),
    )


def narrowed(
    eligible: Bool[Tensor, " adapters"], permitted: Bool[Tensor, "tokens adapters"] | None, tokens: int
) -> Bool[Tensor, "tokens adapters"]:
    """Which adapters may be compared for each token: eligible at this layer, and permitted to the caller."""
    return eligible.expand(tokens, -1) if permitted is None else permitted & eligible
