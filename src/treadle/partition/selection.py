"""Sets of units by their importance, and how far two sets agree."""

import torch

from treadle.errors import ConfigError, require
from treadle.partition.importance import Importance
from treadle.partition.units import Mask, check_alike, flat, unflattened

_NEAR = 1e-12  # of float64 sums: ten equal units out of which 0.9 are asked for are nine


def smallest_set(importance: Importance, theta: float) -> Mask:
    """The fewest units whose importance sums to at least θ of the total, over all modules together.

    Units of equal importance are taken in the order of modules and places. θ = 1 takes every unit whose importance is
    not 0. At rank granularity the fewest are the fewest ranks, whatever their sizes.

    Args:
        importance: of every unit.
        theta: the share θ, in (0, 1].

    Raises:
        ConfigError: θ is outside.

    Reference: arXiv 2507.20999 §3.2.
    """
    require("theta", theta, 0 < theta <= 1, "in (0, 1]")
    row = flat(importance.units)
    order = torch.sort(row, descending=True, stable=True).indices
    # What is left out is summed from its small end, where a sum from the large end would round it away.
    left = torch.cumsum(row[order].flip(0), 0)
    dropped = int((left <= (1 - theta) * left[-1] * (1 + _NEAR)).sum())
    chosen = torch.zeros(len(row), dtype=torch.bool)
    chosen[order[: len(row) - dropped]] = True
    return Mask(unflattened(chosen, importance.units), importance.sizes)


def top_share(among: Mask, importance: Importance, share: float) -> Mask:
    """The most important of the units in `among`: that share of their number, half a unit rounded up.

    Raises:
        ConfigError: the share is not in [0, 1].
    """
    require("share", share, 0 <= share <= 1, "in [0, 1]")
    candidates = flat(among.units)
    row = torch.where(candidates, flat(importance.units), -1.0)
    order = torch.sort(row, descending=True, stable=True).indices
    chosen = torch.zeros_like(candidates)
    chosen[order[: int(share * int(candidates.sum()) + 0.5)]] = True
    return Mask(unflattened(chosen, among.units), among.sizes)


def jaccard(first: Mask, second: Mask) -> float:
    """Units in both as a share of units in either, in [0, 1].

    Raises:
        MismatchError: they are of other units.
        ConfigError: both are empty.
    """
    check_alike("the sets", first.units, second.units)
    either = (first | second).count
    if not either:
        raise ConfigError("two empty sets have no overlap", remedy="choose units first")
    return (first & second).count / either
