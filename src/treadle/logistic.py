"""Multinomial logistic regression: the one convex fit that frozen heads and trained routers share."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The grid of L2 penalties, for standardised features."""

_FOLDS = 5


def fitted(
    features: Float[Tensor, "rows features"], labels: Int[Tensor, " rows"], penalty: float, *, intercept: bool = True
) -> tuple[Float64[Tensor, "classes features"], Float64[Tensor, " classes"]]:
    """Weight and bias that minimise mean cross-entropy + penalty/2·‖weight‖², in float64; there is one such weight.

    Args:
        features: standardised by the caller, or as they are.
        labels: classes from 0; the largest says how many there are.
        penalty: above 0.
        intercept: whether the bias is fitted; else it is 0.
    """
    inputs = features.double()
    count = int(labels.max()) + 1
    weight = torch.zeros(count, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=intercept)
    search = torch.optim.LBFGS(
        [weight, bias] if intercept else [weight],
        max_iter=500,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, labels)
        value = value + 0.5 * penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        step: Callable[[Callable[[], Tensor]], Tensor] = search.step  # type: ignore[assignment]
        step(loss)
    return weight.detach(), bias.detach()


def cross_validated_penalty(
    features: Float[Tensor, "rows features"],
    labels: Int[Tensor, " rows"],
    *,
    penalties: Sequence[float] = PENALTIES,
    intercept: bool = True,
) -> float:
    """The penalty whose fits give held-out rows the highest likelihood, over five folds; the strongest of equals.

    A class's rows go to the folds in turn, so nothing is drawn. A class with one row leaves nothing to hold out of it:
    it is always fitted on. Where no class has two, the strongest penalty is the answer.
    """
    fold = torch.zeros_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        fold[rows] = torch.arange(len(rows)) % _FOLDS if len(rows) > 1 else -1

    def loss(penalty: float) -> float:
        total = 0.0
        for held in range(_FOLDS):
            out = fold == held
            if out.any():
                weight, bias = fitted(features[~out], labels[~out], penalty, intercept=intercept)
                total += float(_summed_loss(features[out], labels[out], weight, bias))
        return total

    return min(sorted(penalties, reverse=True), key=loss)


def _summed_loss(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(features.double() @ weight.T + bias, labels, reduction="sum")
