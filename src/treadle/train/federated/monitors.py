"""What the server may watch for free: functions of updates that are noised already, so they spend no ε."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Change = Mapping[str, Float[Tensor, "..."]]
"""What one client's update changed, by tensor; all clients of a round send the same names and shapes."""


def _stacked(changes: Sequence[Change]) -> Float[Tensor, "clients parameters"]:
    return torch.stack([torch.cat([tensor.flatten() for tensor in change.values()]) for change in changes]).double()


def mean_norm(changes: Sequence[Change]) -> float:
    """The Frobenius norm of the unweighted mean of the changes, over all tensors together."""
    return float(_stacked(changes).mean(0).norm())


def cosines(changes: Sequence[Change]) -> tuple[tuple[float, ...], ...]:
    """The cosine of every pair of changes; 0 where one of them is 0."""
    rows = _stacked(changes)
    norms = rows.norm(dim=1, keepdim=True)
    unit = rows / norms.where(norms > 0, torch.ones_like(norms))
    return tuple(tuple(line) for line in (unit @ unit.T).tolist())


def noise_to_signal(changes: Sequence[Change]) -> float | None:
    """The ratio of what clients do not share to what they do, in norm; None where it cannot be told.

    With change_i = s + n_i, the n_i independent and of one expected square: mean ‖change_i‖² = ‖s‖² + E‖n‖² and
    ‖mean change‖² = ‖s‖² + E‖n‖²/N. Both are solved for; fewer than two clients, or an estimate of ‖s‖² that is not
    positive, tell nothing. The n_i hold the clients' privacy noise and their honest differences alike.
    """
    count = len(changes)
    if count < 2:
        return None
    rows = _stacked(changes)
    each, shared = float(rows.square().sum(1).mean()), float(rows.mean(0).square().sum())
    noise = max(0.0, (each - shared) * count / (count - 1))
    signal = shared - noise / count
    return math.sqrt(noise / signal) if signal > 0 else None
