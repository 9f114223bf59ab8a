"""What the release of a whole bank has cost the people behind it, as far as its adapters state it.

silos of an adapter     disjoint rows: the largest; a person in several: added up
adapters of a bank      disjoint people: the largest; a person behind several: added up
none                    as soon as one adapter, the rank plan or the calibration is unaccounted
"""

from dataclasses import dataclass

from treadle.family.adapter import Adapter
from treadle.privacy.joint import SILOS, Cost, largest, silos_of, together
from treadle.routing.bank import AdapterBank


@dataclass(frozen=True)
class FleetPrivacy:
    """What a bank's release has spent, for one row more or less wherever a person has any.

    Attributes:
        epsilon_disjoint: the largest ε; true if no person is behind two adapters or in two silos. None is "none".
        delta_disjoint: that belongs to it.
        epsilon_shared: the sum over adapters; true for a person behind all of them, in one silo each.
        delta_shared: that belongs to it.
        epsilon_everywhere: the sum over adapters and their silos; true for a person in every silo of every adapter.
        delta_everywhere: that belongs to it.
        reason: why it is "none", or "".
    """

    epsilon_disjoint: float | None
    delta_disjoint: float
    epsilon_shared: float | None
    delta_shared: float
    epsilon_everywhere: float | None
    delta_everywhere: float
    reason: str

    @staticmethod
    def none(reason: str) -> "FleetPrivacy":
        """Nothing is promised, for this reason."""
        return FleetPrivacy(None, 0.0, None, 0.0, None, 0.0, reason)

    @property
    def statement(self) -> str:
        """The same in one line."""
        if self.reason:
            return f"none ({self.reason})"
        several = self.epsilon_everywhere != self.epsilon_shared
        said = [
            f"{self.epsilon_disjoint:.4g} at δ = {self.delta_disjoint:.4g} if no person is behind two adapters"
            + (" or in two silos" if several else ""),
            f"{self.epsilon_shared:.4g} at δ = {self.delta_shared:.4g} for one behind all of them"
            + (", in one silo each" if several else ""),
        ]
        if several:
            said.append(f"{self.epsilon_everywhere:.4g} at δ = {self.delta_everywhere:.4g} for one in every silo")
        return "; ".join(said)


def fleet_privacy(bank: AdapterBank) -> FleetPrivacy:
    """The ε of releasing the whole bank."""
    unaccounted = _unaccounted(bank)
    if unaccounted:
        return FleetPrivacy.none(unaccounted)
    measured = _measured(bank)
    whole = [together([_stated(adapter), *measured]) for adapter in bank.adapters]
    silos = [together([cost, *measured]) for adapter in bank.adapters for cost in _by_silo(adapter)]
    one, several, all_of_them = largest(whole), together(whole), together(silos)
    return FleetPrivacy(
        one.epsilon, one.delta, several.epsilon, several.delta, all_of_them.epsilon, all_of_them.delta, ""
    )


def _unaccounted(bank: AdapterBank) -> str:
    """What nothing accounts for, or ""."""
    if bank.family.plan.unaccounted:  # before its adapters, which state no ε for the same reason
        return bank.family.plan.unaccounted
    for adapter in bank.adapters:
        if largest([_stated(adapter), *_by_silo(adapter)]).epsilon is None:
            return f"{adapter.name} states no ε"
    if bank.statistics is not None and bank.statistics.spends_privacy:
        return "the calibration read the adapters' own data"
    return ""


def _stated(adapter: Adapter) -> Cost:
    """What the adapter says of itself."""
    stated = adapter.provenance
    if stated.epsilon is None or stated.delta is None:
        return Cost(None, 0.0)
    return Cost(stated.epsilon, stated.delta)


def _by_silo(adapter: Adapter) -> list[Cost]:
    """What it says of each of its silos; of itself, once for each it might have had, where it names none."""
    settings = adapter.provenance.settings
    unnamed = settings.get(SILOS)
    return list(silos_of(settings).values()) or [_stated(adapter)] * (unnamed if isinstance(unnamed, int) else 1)


def _measured(bank: AdapterBank) -> list[Cost]:
    """What statistics of the same rows cost beside their training."""
    statistics = bank.statistics
    return [] if statistics is None or statistics.epsilon is None else [Cost(statistics.epsilon, statistics.delta)]
