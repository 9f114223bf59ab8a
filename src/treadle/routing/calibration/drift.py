"""How far one reading's norms are from a bank's statistics: traffic that has moved away, or a closed form's error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.errors import MismatchError
from treadle.family.adapter import Adapter
from treadle.routing.calibration.statistics import Statistics
from treadle.routing.calibration.traffic import TrafficStatistics

SHIFT_LIMIT = 0.5
"""A mean that is off by half a deviation, over all modules: as much as one token's score scatters in two draws."""
RATIO_LIMIT = 1.5


@dataclass(frozen=True)
class Drift:
    """Traffic against the statistics of a bank.

    Attributes:
        shift: module → (adapters,), the traffic's mean less the bank's, in deviations of the bank; NaN where unknown.
        ratio: module → (adapters,), the traffic's deviation over the bank's; NaN where unknown.
        names: of the adapters.
        shift_limit: the largest mean shift, over an adapter's modules and without sign, that is not stale.
        ratio_limit: the largest mean ratio that is not stale; its inverse is the smallest.
        uncalibrated: adapters that the bank has no statistics of.
    """

    shift: Mapping[str, Tensor]
    ratio: Mapping[str, Tensor]
    names: tuple[str, ...]
    shift_limit: float
    ratio_limit: float
    uncalibrated: tuple[str, ...]

    def of_adapter(self, name: str) -> tuple[float, float]:
        """The mean shift and the geometric mean ratio of an adapter over its modules; NaN if nothing is known."""
        place = self.names.index(name)
        shifts = torch.stack([values[place] for values in self.shift.values()])
        ratios = torch.stack([values[place] for values in self.ratio.values()])
        return float(shifts.nanmean()), float(ratios.log().nanmean().exp())

    def of_kind(self, kind: str) -> tuple[float, float]:
        """The means of abs(shift) and abs(ratio − 1) over all adapters and the modules whose last name is `kind`."""
        chosen = [module for module in self.shift if module.rsplit(".", 1)[-1] == kind]
        shifts = torch.cat([self.shift[module] for module in chosen])
        ratios = torch.cat([self.ratio[module] for module in chosen])
        return float(shifts.abs().nanmean()), float((ratios - 1.0).abs().nanmean())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The last names of the modules, in their order."""
        return tuple(dict.fromkeys(module.rsplit(".", 1)[-1] for module in self.shift))

    @property
    def stale_adapters(self) -> tuple[str, ...]:
        """The adapters whose traffic has left their statistics by more than the limits, or that have none."""
        found: list[str] = []
        for name in self.names:
            shift, ratio = self.of_adapter(name)
            off = abs(shift) > self.shift_limit or not 1 / self.ratio_limit <= ratio <= self.ratio_limit
            if name in self.uncalibrated or (shift == shift and off):
                found.append(name)
        return tuple(found)

    @property
    def stale(self) -> bool:
        """Whether any adapter is stale."""
        return bool(self.stale_adapters)


def drift(
    statistics: Statistics,
    traffic: TrafficStatistics,
    adapters: Sequence[Adapter],
    *,
    shift_limit: float = SHIFT_LIMIT,
    ratio_limit: float = RATIO_LIMIT,
) -> Drift:
    """How far the traffic's norms are from the statistics, by module and adapter.

    Statistics of public text differ from any task's traffic to begin with: the verdict says that the yardstick is no
    longer the text that is asked, not that routing is wrong.

    Args:
        statistics: of the bank.
        traffic: enough of it (`TrafficStatistics.check_enough`), read with the same adapters.
        adapters: the bank's, in order.
        shift_limit: in deviations.
        ratio_limit: above 1.

    Raises:
        MismatchError: the traffic was read with another lora_B.
        InputError: there is too little of it.
    """
    traffic.check_enough()
    for adapter in adapters:
        if traffic.adapters.get(adapter.name) != adapter.digest:
            raise MismatchError(
                "the traffic was read with another lora_B",
                where=adapter.name,
                remedy="collect the traffic again with this bank",
            )
    order = torch.tensor([list(traffic.adapters).index(adapter.name) for adapter in adapters])
    shift: dict[str, Tensor] = {}
    ratio: dict[str, Tensor] = {}
    for module, mean in statistics.mean.items():
        found, std = traffic.moments[module], statistics.std[module]
        usable = std > 0
        shift[module] = torch.where(usable, (found.mean[order] - mean) / std, torch.nan)
        ratio[module] = torch.where(usable, found.std[order] / std, torch.nan)
    unknown = [a.name for a, digest in zip(adapters, statistics.B_digests, strict=True) if not digest]
    names = tuple(adapter.name for adapter in adapters)
    return Drift(shift, ratio, names, shift_limit, ratio_limit, tuple(unknown))
