"""Which units belong to which system, and which to several."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

import torch

from treadle import randomness
from treadle.errors import InputError, MismatchError
from treadle.files import checked_name
from treadle.partition.importance import Importance, Measured, Score, importance
from treadle.partition.overlap import Overlap, growth
from treadle.partition.selection import jaccard, smallest_set, top_share
from treadle.partition.units import Mask, check_alike, flat, module_of, unflattened

Facts = Mapping[str, str | int | float | bool | None]
"""What regions come from: seeds, family, digests of public data. Never a digest of private data, nor a path."""


@dataclass(frozen=True)
class ModuleShares:
    """What of one module falls into which region.

    Attributes:
        parameters: that its units stand for, all together.
        own: system → parameters that it alone selected.
        shared: parameters that at least two systems selected.
        importance: system → the module's share of the system's whole importance, in [0, 1].
    """

    parameters: int
    own: Mapping[str, int]
    shared: int
    importance: Mapping[str, float]


@dataclass(frozen=True)
class Regions:
    """What every system selected at θ.

    Of two systems a unit is selected by the one alone, by the other alone, by both or by none. Of more than two,
    `shared` is what at least two selected, whichever they are.

    Attributes:
        theta: the share of each system's importance that its units hold, in (0, 1].
        importances: system → importance of every unit, in the systems' order.
        selected: system → the units that it selected.
        facts: what is known of their making.
        floors: pair of systems → how far draws of their samples agree, within a system and between the two, for
            growing draws up to half of the samples; what the overlap of the pair is to be read beside. Empty where
            importance alone was given.
    """

    theta: float
    importances: Mapping[str, Importance]
    selected: Mapping[str, Mask]
    facts: Facts
    floors: Mapping[tuple[str, str], tuple[Overlap, ...]] = field(
        default_factory=dict[tuple[str, str], tuple[Overlap, ...]]
    )

    @classmethod
    def measured(
        cls, found: Mapping[str, Measured], *, theta: float, score: Score = "taylor", facts: Facts | None = None
    ) -> "Regions":
        """The regions of the systems, with the floors that noise puts under their overlaps.

        Args:
            found: system → its sums, all of the same units and in as many blocks, an even number.
            theta: see `of`.
            score: of importance.
            facts: to be kept beside them.

        Raises:
            TreadleError: every importance to a system is 0.
            The others: those of `of` and of `overlap.growth`.
        """
        regions = cls.of({s: importance(sums, score) for s, sums in found.items()}, theta=theta, facts=facts)
        pairs = combinations(found, 2)
        return replace(regions, floors={(a, b): growth(found[a], found[b], theta, score=score) for a, b in pairs})

    @classmethod
    def of(cls, importances: Mapping[str, Importance], *, theta: float, facts: Facts | None = None) -> "Regions":
        """The regions of the systems, each selecting the smallest set that holds θ of its importance.

        Args:
            importances: system → its importance, all of the same units and score.
            theta: in (0, 1]; over all modules together, as in the article.
            facts: to be kept beside them.

        Raises:
            ConfigError: θ is outside (0, 1].
            InputError: no system, or a name that cannot be one.
            MismatchError: the importances are of other units, or by other scores.

        Reference: arXiv 2507.20999 §3.2. Deviations: any number of systems; ranks may stand for elements.
        """
        _check(importances)
        selected = {system: smallest_set(found, theta) for system, found in importances.items()}
        return cls(theta, dict(importances), selected, dict(facts or {}))

    @property
    def systems(self) -> tuple[str, ...]:
        """The systems' names, in order."""
        return tuple(self.selected)

    @property
    def shared(self) -> Mask:
        """What at least two systems selected."""
        masks = list(self.selected.values())
        counts = {name: torch.stack([mask.units[name] for mask in masks]).sum(0) for name in masks[0].units}
        return Mask({name: count >= 2 for name, count in counts.items()}, masks[0].sizes)

    def own(self, system: str) -> Mask:
        """What that system selected and no other did.

        Raises:
            InputError: no such system.
        """
        return self._selected(system) & ~self.shared

    def active(self, system: str, share: float) -> Mask:
        """What the system trains: its own, and of what it shares with others that share (the article's α or β).

        Shared units are ranked by the importance to `system`, which trains them. Of more than two systems, units that
        only others share are not among them.

        Args:
            system: the one that trains.
            share: of the number of shared units, in [0, 1]; half a unit is rounded up.

        Raises:
            InputError: no such system.
            ConfigError: the share is outside [0, 1].
        """
        among = self._selected(system) & self.shared
        return self.own(system) | top_share(among, self.importances[system], share)

    def overlap(self, first: str, second: str) -> float:
        """The Jaccard index of what two systems selected, to be read beside `floors`.

        Raises:
            InputError: no such system.
        """
        return jaccard(self._selected(first), self._selected(second))

    def modules(self) -> dict[str, ModuleShares]:
        """Module → what of it falls into which region, in the modules' order."""
        shared, own = self.shared, {system: self.own(system) for system in self.systems}
        names = list(dict.fromkeys(module_of(name) for name in shared.units))
        return {module: self._shares(module, shared, own) for module in names}

    def _shares(self, module: str, shared: Mask, own: Mapping[str, Mask]) -> ModuleShares:
        keys = [name for name in shared.units if module_of(name) == module]

        def within(mask: Mask) -> int:
            return sum(int(mask.units[name].sum()) * mask.sizes[name] for name in keys)

        return ModuleShares(
            parameters=sum(shared.units[name].numel() * shared.sizes[name] for name in keys),
            own={system: within(mask) for system, mask in own.items()},
            shared=within(shared),
            importance={
                system: sum(float(found.units[name].sum()) for name in keys) / float(flat(found.units).sum())
                for system, found in self.importances.items()
            },
        )

    def _selected(self, system: str) -> Mask:
        if system not in self.selected:
            raise InputError(f"no system {system!r}", remedy=f"choose among {', '.join(self.systems)}")
        return self.selected[system]


def shuffled(regions: Regions, *, seed: int, within: Literal["module", "all"] = "module") -> Regions:
    """The regions with their units dealt out anew: the control in which importance says nothing of places.

    One permutation moves all that is said of a unit, so that every region, and every α share of shared, keeps its
    number of units; within modules it keeps its parameters as well.

    Args:
        regions: to be dealt out.
        seed: any integer.
        within: "module": a unit stays in its factor of its module; "all": it may go anywhere.
    """
    like = regions.shared.units
    names = [*like] if within == "module" else [""]
    rows = [like[name].numel() for name in like] if within == "module" else [len(flat(like))]
    order, begin = [], 0
    for name, length in zip(names, rows, strict=True):
        drawn = torch.from_numpy(randomness.uniform(seed, f"partition/shuffled/{name}", (length,)))
        order.append(begin + torch.sort(drawn, stable=True).indices)
        begin += length
    places = torch.cat(order)

    def moved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return unflattened(flat(tensors)[places], like)

    return replace(
        regions,
        importances={s: replace(found, units=moved(found.units)) for s, found in regions.importances.items()},
        selected={s: Mask(moved(mask.units), mask.sizes) for s, mask in regions.selected.items()},
        facts={**regions.facts, "shuffled": seed, "shuffled_within": within},
    )


def _check(importances: Mapping[str, Importance]) -> None:
    if not importances:
        raise InputError("there is no system", remedy="give the importance to one system at least")
    first = next(iter(importances.values()))
    for system, found in importances.items():
        checked_name(system)
        check_alike(f"the importances to {system}", first.units, found.units)
        if found.score != first.score or found.sizes != first.sizes:
            raise MismatchError(
                f"{found.score!r} stands beside {first.score!r}, or the factors differ",
                where=system,
                remedy="measure every system on the same adapter by the same score",
            )
