"""Whether a reply may be averaged: pure checks, each refusal with its reason."""

import math
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from treadle.errors import MismatchError
from treadle.train.federated.aggregation import Update
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.messages import Order, Reply
from treadle.train.federated.variants import Work
from treadle.train.federated.variants.variant import check


def accepted_update(reply: Reply, order: Order, *, client: str, weight: float = 1.0) -> Update:
    """The update in a reply that answers this order of this client.

    Raises:
        MismatchError: it answers another, or calls itself otherwise.
    """
    if reply.client != client:
        raise MismatchError(f"it calls itself {reply.client!r}", where=client)
    if (reply.run, reply.server_round) != (order.run, order.server_round):
        raise MismatchError(f"it answers round {reply.server_round} of run {reply.run[:8]}: it is late", where=client)
    if reply.request != order.request:
        raise MismatchError("it answers another order: family, settings or B differ", where=client)
    return Update(client, reply.tensors, weight)


def checked_change(
    update: Update, order: Order, state: GlobalState, work: Work, *, max_update_norm: float
) -> dict[str, Float[Tensor, "..."]]:
    """What the update changes, trained tensor by trained tensor, in the shapes of the state.

    Raises:
        MismatchError: a tensor is missing, unknown or of another shape, or the change is outsized.
        FormatError: a value is NaN or infinite.
    """
    check(state, work, update)
    before = state.of_client(update.client)
    whole = work.reply(before)
    # A client of a lower rank sends fewer columns of B: its product is that of the same columns and zeros.
    change = {
        name: nn.functional.pad(update.tensors[name], (0, tensor.shape[1] - update.tensors[name].shape[1])) - tensor
        for name, tensor in whole.items()
    }
    asked = {name: order.tensors.get(name, tensor) for name, tensor in whole.items()}
    narrow = [name for name, tensor in update.tensors.items() if tensor.shape != asked[name].shape]
    if narrow:
        raise MismatchError(
            f"{narrow[0]!r} has shape {tuple(update.tensors[narrow[0]].shape)}, asked were "
            f"{tuple(asked[narrow[0]].shape)}",
            where=update.client,
        )
    norm = norm_of(change)
    if not norm <= max_update_norm:
        raise MismatchError(
            f"its update has norm {norm:.4g}, max_update_norm is {max_update_norm:.4g}", where=update.client
        )
    return change


def norm_of(tensors: Mapping[str, Float[Tensor, "..."]]) -> float:
    """The Frobenius norm over all tensors together."""
    return math.hypot(*(float(tensor.double().norm()) for tensor in tensors.values()))
