"""The ways of federating LoRA by name, one a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.errors import ConfigError
from treadle.train.federated.freezing import Freezing
from treadle.train.federated.variants.central import Central
from treadle.train.federated.variants.fedit import FedIt
from treadle.train.federated.variants.fedsvd import FedSvd
from treadle.train.federated.variants.ffa import Ffa
from treadle.train.federated.variants.flora import FLora
from treadle.train.federated.variants.local import Local
from treadle.train.federated.variants.rolora import RoLora
from treadle.train.federated.variants.variant import Aggregate, MovingA, Variant, Work

VARIANTS: Mapping[str, type[Variant]] = {
    kind.name: kind for kind in (Ffa, FedIt, FLora, RoLora, FedSvd, Local, Central)
}

_FROZEN_BY_DEFAULT = {
    "ffa": 1.0,
    "fedit": 0.0,
    "flora": 0.0,
    "rolora": 0.0,
    "fedsvd": 0.0,
    "local": 1.0,
    "central": 1.0,
}
_MOVING: Mapping[str, type[MovingA]] = {name: kind for name, kind in VARIANTS.items() if issubclass(kind, MovingA)}


@dataclass(frozen=True)
class VariantSettings:
    """Which variant a federation runs.

    Attributes:
        name: one of `VARIANTS`.
        frozen_share: share of modules whose A is frozen, in [0, 1]; None for the variant's own: 1 for ffa, local and
            central, else 0.
        frozen_share_last: the share in the last round, towards which it changes linearly; None for the same in all.

    Raises:
        ConfigError: no such variant, a share outside [0, 1], or a share below 1 of ffa or local.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = "ffa"
    frozen_share: float | None = None
    frozen_share_last: float | None = None

    def __post_init__(self) -> None:
        if self.name not in VARIANTS:
            raise ConfigError(f"no such variant {self.name!r}", remedy=f"choose among {', '.join(VARIANTS)}")
        for share in self.frozen:
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"frozen_share {share} is outside 0..1", remedy="1 freezes every A, 0 none")
            if share < 1.0 and self.name not in _MOVING:
                raise ConfigError(
                    f"{self.name} freezes every A, frozen_share {share} does not",
                    remedy=f"choose among {', '.join(_MOVING)}",
                )

    @property
    def frozen(self) -> tuple[float, float]:
        """The shares in the first and in the last round."""
        first = _FROZEN_BY_DEFAULT[self.name] if self.frozen_share is None else self.frozen_share
        return first, first if self.frozen_share_last is None else self.frozen_share_last

    def variant(self, modules: Sequence[str], *, rounds: int) -> Variant:
        """The variant for these modules of a plan, over this many rounds."""
        if self.name in _MOVING:
            return _MOVING[self.name](Freezing(tuple(modules), *self.frozen, rounds))
        return (Local if self.name == "local" else Ffa)(tuple(modules))


__all__ = ["VARIANTS", "Aggregate", "Variant", "VariantSettings", "Work"]
