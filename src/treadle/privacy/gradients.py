"""Examples' gradients by the micro-batch, and their clipped sum."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Some examples' gradients.

    Attributes:
        gradients: (examples, *weight.shape) a weight, by its name; what is missing is zero.
        weights: (examples,), what each example's gradients are multiplied by before they are clipped.
    """

    gradients: Mapping[str, Float[Tensor, "examples out inner"]]
    weights: Float[Tensor, " examples"]


_LONGEST = 1e37  # one over it is a normal number of float32

PerExample = Callable[[Sequence[int]], Iterator[MicroBatch]]
"""Maps the indices of a batch to the gradients of its examples, each once, in any order, some at a time."""


def clipped_sum(batch: MicroBatch, max_norm: float) -> dict[str, Float64[Tensor, "out inner"]]:
    """Σ_i g_i·min(1, max_norm/‖g_i‖) by the name of the weight, ‖·‖ over all weights of an example together.

    An example whose gradient is not finite, or longer than 1e37, counts as zero: stopping for it would tell that it is
    there. Rows are divided by max(‖g_i‖, max_norm) and their sum is multiplied by max_norm, in float64, since a factor
    max_norm/‖g_i‖ may be so small that float32 cannot say it exactly.

    Reference: arXiv 1607.00133, algorithm 1.
    """
    norms = row_norms(batch)
    sound = norms <= _LONGEST  # NaN is not
    factors = torch.where(sound, batch.weights.double() / norms.clamp(min=max_norm), 0.0)
    return {name: max_norm * _weighted(gradient, factors, sound) for name, gradient in batch.gradients.items()}


def row_norms(batch: MicroBatch) -> Float64[Tensor, " examples"]:
    """The norm of each example's weighted gradient, over all weights together."""
    squares = torch.zeros(len(batch.weights), dtype=torch.float64)
    for gradient in batch.gradients.values():
        squares += torch.linalg.vector_norm(_stored(gradient), dim=1).double().cpu().square()
    return squares.sqrt() * batch.weights.double()


def _weighted(
    gradient: Float[Tensor, "examples out inner"], factors: Float64[Tensor, " examples"], sound: Tensor
) -> Float64[Tensor, "out inner"]:
    if not bool(sound.all()):
        gradient = torch.where(sound.to(gradient.device)[:, None, None], gradient, 0.0)
    total = (factors.to(gradient) @ _stored(gradient)).double().cpu()
    return total.view(gradient.shape[1:]) if gradient.is_contiguous() else total.view(gradient.mT.shape[1:]).mT


def _stored(gradient: Float[Tensor, "examples out inner"]) -> Float[Tensor, "examples size"]:
    """An example's entries in the order in which they lie in memory."""
    return (gradient if gradient.is_contiguous() else gradient.mT).flatten(1)
