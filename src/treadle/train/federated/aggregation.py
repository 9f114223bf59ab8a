"""Means of what clients send, the same bit for bit in whatever order it arrived, and how far a mean of factors errs.

Sums run in float64 over clients sorted by name, weight times tensor, and are divided once by the sum of the weights.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.algebra import update_norms
from treadle.errors import InputError, MismatchError


@dataclass(frozen=True)
class Update:
    """What one client sends back in one round.

    Attributes:
        client: its name, unique in a round.
        tensors: module → B, scaling folded in, and MODULE/A → A where A is trained (see `factors`).
        weight: in the mean; equal ones for a uniform mean. A count of examples is public once it is a weight.
    """

    client: str
    tensors: Mapping[str, Tensor]
    weight: float = 1.0


def in_order(updates: Sequence[Update]) -> list[Update]:
    """The updates sorted by the names of their clients.

    Raises:
        InputError: there is none, or a weight is not a positive number.
        MismatchError: a client sent two.
    """
    if not updates:
        raise InputError("no client has sent an update", remedy="wait for clients, or end the run")
    for update in updates:
        if not 0.0 < update.weight < math.inf:
            raise InputError(f"weight {update.weight} is not positive", where=update.client, remedy="weigh it 1")
    ordered = sorted(updates, key=lambda update: update.client)
    for one, next_one in itertools.pairwise(ordered):
        if one.client == next_one.client:
            raise MismatchError("sent two updates in one round", where=one.client, remedy="count one of them")
    return ordered


def shares(updates: Sequence[Update]) -> list[float]:
    """Each update's weight as a share of all; they sum to 1 up to rounding."""
    total = math.fsum(update.weight for update in updates)
    return [update.weight / total for update in updates]


def mean_of(
    tensors: Sequence[Float[Tensor, "_outer _inner"]], weights: Sequence[float], *, rank: int
) -> Float[Tensor, "outer rank"]:
    """The weighted mean in float64, in the order given; tensors of fewer than `rank` columns are filled with zeros.

    B of a client that trains only the first rows of A is such a tensor: its product with all of A is its own product.
    """
    total = torch.zeros(tensors[0].shape[0], rank, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total[:, : tensor.shape[1]] += weight * tensor.double().cpu()
    return total / math.fsum(weights)


@dataclass(frozen=True)
class Deviation:
    """How far a product of two factors is from the mean of the clients' products, as Frobenius norms.

    Attributes:
        missed: ‖B·A − Σ w_i B_i·A_i‖.
        whole: ‖Σ w_i B_i·A_i‖.
    """

    missed: float
    whole: float

    @property
    def relative(self) -> float:
        """missed / whole; 0 where nothing is missed, infinite where the mean is zero and the product is not."""
        if self.missed == 0.0:
            return 0.0
        return self.missed / self.whole if self.whole > 0.0 else math.inf


def together(deviations: Sequence[Deviation]) -> Deviation:
    """The deviation of all modules as one block-diagonal update; none is no deviation."""
    return Deviation(math.hypot(*(one.missed for one in deviations)), math.hypot(*(one.whole for one in deviations)))


def deviation(
    lora_A: Float[Tensor, "rank inner"],
    lora_B: Float[Tensor, "outer rank"],
    clients: Sequence[tuple[Float[Tensor, "_rank inner"], Float[Tensor, "outer _rank"]]],
    weights: Sequence[float],
) -> Deviation:
    """How far B·A is from the mean of the clients' products, without forming a product as wide as the layer.

    Args:
        lora_A: of the product that shall stand for all.
        lora_B: of the same.
        clients: (A_i, B_i) of each client.
        weights: shares that sum to 1.

    Both norms are of stacked factors, [w_1 B_1 … w_n B_n −B]·[A_1; …; A_n; A], by a QR of either side: a difference
    of squared norms would lose what is below 1e-8 of the whole, this keeps 1e-15.
    """
    rows, columns = stacked(clients, weights)
    missed, _ = update_norms(torch.cat([rows, lora_A.double()]), torch.cat([columns, -lora_B.double()], dim=1))
    return Deviation(missed, update_norms(rows, columns)[0])


def stacked(
    clients: Sequence[tuple[Float[Tensor, "_rank inner"], Float[Tensor, "outer _rank"]]], weights: Sequence[float]
) -> tuple[Float[Tensor, "all inner"], Float[Tensor, "outer all"]]:
    """A = [A_1; …; A_n] and B = [w_1 B_1 … w_n B_n], float64: B·A is the weighted sum of the products, exactly.

    Reference: arXiv 2409.05976 (stacking).
    """
    rows = torch.cat([A.double() for A, _ in clients])
    return rows, torch.cat([weight * B.double() for (_, B), weight in zip(clients, weights, strict=True)], dim=1)
