"""Letting chosen adapters act on the tokens of one layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from treadle.routing.decision import BASE
from treadle.routing.factors import LayerFactors


@dataclass(frozen=True)
class Mixture:
    """Which adapters act on each token, and with what weight.

    Attributes:
        adapter: places in the bank, `BASE` for none.
        weight: 1 where a single adapter acts.
    """

    adapter: Int[Tensor, "tokens slots"]
    weight: Float[Tensor, "tokens slots"] | None

    @staticmethod
    def of(winner: Int[Tensor, " tokens"]) -> "Mixture":
        """One adapter a token, acting alone."""
        return Mixture(winner[:, None], None)


def mixture(scores: Float[Tensor, "tokens adapters"], best: int) -> Mixture:
    """The `best` highest scores of each token (0: all), weighted by their softmax; -inf never acts."""
    count = scores.shape[1] if best == 0 else min(best, scores.shape[1])
    top, adapter = scores.topk(count, dim=1)
    there = top > -torch.inf
    weight = torch.where(there.any(1, keepdim=True), top.softmax(1), 0.0)
    return Mixture(torch.where(there, adapter, BASE), torch.where(there, weight, 0.0))


def act(
    factors: LayerFactors,
    matrix: Callable[[int], Tensor],
    x: Float[Tensor, "tokens inner"],
    chosen: Mixture,
) -> Float[Tensor, "tokens outer"] | None:
    """What the chosen adapters add: Σ weight · B · A · x in float32, None where only the base acts.

    Args:
        factors: of the layer.
        matrix: the folded B of an adapter.
        x: the layer's input.
        chosen: who acts.
    """
    result: Tensor | None = None
    for group in factors.groups:
        acting = [i for i in group.columns.tolist() if bool((chosen.adapter == i).any())]
        if not acting:
            continue
        z = torch.nn.functional.linear(x.float(), group.A)
        for adapter in acting:
            B = matrix(adapter)
            if result is None:
                result = x.new_zeros(x.shape[0], B.shape[0], dtype=torch.float32)
            hits = chosen.adapter == adapter
            rows = hits.any(1).nonzero().flatten()
            added = torch.nn.functional.linear(z[rows], B)
            if chosen.weight is not None:
                added = added * (chosen.weight * hits).sum(1)[rows, None]
            result.index_add_(0, rows, added)
    return result
