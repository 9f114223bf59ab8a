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
RATIO_LIMIT = 1.5
"""Where the yardstick is called stale. docs/calibration.md has what prompts of other kinds of text measure."""


@dataclass(frozen=True)
class AdapterDrift:
    """One adapter's drift over its modules; NaN if it has no statistics.

    Attributes:
        shift: the mean of abs(shift), in deviations of the bank.
        bias: the mean shift, in which modules that went up and down cancel.
        ratio: the geometric mean of the ratio or its inverse, whichever is above 1.
    """

    shift: float
    bias: float
    ratio: float


@dataclass(frozen=True)
class Drift:
    """Traffic against the statistics of a bank.

    Attributes:
        shift: module → (adapters,), the traffic's mean less the bank's, in deviations of the bank; NaN where unknown.
        ratio: module → (adapters,), the traffic's deviation over the bank's; NaN where unknown.
        names: of the adapters.
        shift_limit: the largest shift of an adapter that is not stale.
        ratio_limit: the largest ratio of an adapter that is not stale.
        uncalibrated: adapters that the bank has no statistics of.
    """

    shift: Mapping[str, Tensor]
    ratio: Mapping[str, Tensor]
    names: tuple[str, ...]
    shift_limit: float
    ratio_limit: float
    uncalibrated: tuple[str, ...]

    def of_adapter(self, name: str) -> AdapterDrift:
        """The drift of the adapter of this name over its modules."""
        place = self.names.index(name)
        shifts = torch.stack([values[place] for values in self.shift.values()])
        ratios = torch.stack([values[place] for values in self.ratio.values()])
        return AdapterDrift(
            float(shifts.abs().nanmean()), float(shifts.nanmean()), float(ratios.log().abs().nanmean().exp())
        )

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
        return tuple(name for name in self.names if name in self.uncalibrated or self._has_left(name))

    def _has_left(self, name: str) -> bool:
        found = self.of_adapter(name)
        return found.shift > self.shift_limit or found.ratio > self.ratio_limit  # False of NaN

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
