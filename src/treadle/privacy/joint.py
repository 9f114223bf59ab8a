"""What releases cost together: the silos of one adapter, and the adapters of a fleet.

largest     over disjoint people: each of them is behind one release only
together    for a person behind all of them: ε and δ add up, whatever one release was chosen by another's outcome
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Facts = Mapping[str, str | int | float | bool | None]
"""Settings of an adapter, by name, as its files keep them."""

_EPSILON, _DELTA = "epsilon of ", "delta of "


@dataclass(frozen=True)
class Cost:
    """What a release costs one row.

    Attributes:
        epsilon: above 0; None where nothing accounts for it ("none").
        delta: that belongs to it; 0 where that is None.
    """

    epsilon: float | None
    delta: float


def largest(costs: Iterable[Cost]) -> Cost:
    """What they cost somebody who is behind one of them; unaccounted as soon as one is."""
    found = list(costs)
    epsilons = [cost.epsilon for cost in found if cost.epsilon is not None]
    if len(epsilons) < len(found) or not found:
        return Cost(None, 0.0)
    return Cost(max(epsilons), max(cost.delta for cost in found))


def together(costs: Iterable[Cost]) -> Cost:
    """What they cost somebody who is behind all of them; unaccounted as soon as one is.

    Reference: basic composition, which also holds for releases that are made side by side and look at one another
    (arXiv 2207.08335).
    """
    found = list(costs)
    epsilons = [cost.epsilon for cost in found if cost.epsilon is not None]
    if len(epsilons) < len(found) or not found:
        return Cost(None, 0.0)
    return Cost(sum(epsilons), sum(cost.delta for cost in found))


SILOS = "silos"
"""Setting of an adapter that does not name its silos: how many there were at most."""


def facts_of_silos(costs: Mapping[str, Cost]) -> dict[str, str | int | float | bool | None]:
    """Silo → cost, as settings of the adapter that they made."""
    facts: dict[str, str | int | float | bool | None] = {}
    for silo, cost in costs.items():
        facts[f"{_EPSILON}{silo}"] = "none" if cost.epsilon is None else cost.epsilon
        facts[f"{_DELTA}{silo}"] = None if cost.epsilon is None else cost.delta
    return facts


def silos_of(facts: Facts) -> dict[str, Cost]:
    """What `facts_of_silos` wrote, from all settings of an adapter; empty for one that no federation made."""
    costs: dict[str, Cost] = {}
    for name, epsilon in facts.items():
        if not name.startswith(_EPSILON):
            continue
        silo = name.removeprefix(_EPSILON)
        delta = facts.get(f"{_DELTA}{silo}")
        if isinstance(epsilon, int | float) and isinstance(delta, int | float):
            costs[silo] = Cost(float(epsilon), float(delta))
        else:
            costs[silo] = Cost(None, 0.0)
    return costs
