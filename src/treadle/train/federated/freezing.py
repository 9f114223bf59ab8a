"""Which modules keep their A: a share of all, which may change from the first round to the last."""

import hashlib
import math
from dataclasses import dataclass

from treadle.errors import InputError


@dataclass(frozen=True)
class Freezing:
    """The share of modules whose A is frozen, by round.

    Attributes:
        modules: all of them, in plan order.
        first: the share in round 1, in [0, 1]: 1 is FFA-LoRA, 0 is LoRA.
        last: the share in the last round; between them it changes linearly.
        rounds: how many there are.

    Raises:
        InputError: a share is outside [0, 1], or there is no round.
    """

    modules: tuple[str, ...]
    first: float
    last: float
    rounds: int

    def __post_init__(self) -> None:
        for share in (self.first, self.last):
            if not 0.0 <= share <= 1.0:
                raise InputError(f"frozen_share {share} is outside 0..1", remedy="1 freezes every A, 0 none")
        if self.rounds < 1:
            raise InputError(f"{self.rounds} rounds", remedy="run at least one")

    @property
    def always(self) -> bool:
        """Whether no A ever moves."""
        return self.first == self.last == 1.0

    def frozen(self, server_round: int) -> frozenset[str]:
        """The modules whose A is frozen in this round, counted from 1; a larger share holds the smaller one.

        They are taken in the order of the SHA-256 of their names, so that the choice depends on neither depth nor
        kind of layer, nor on how many modules there are.
        """
        way = (min(server_round, self.rounds) - 1) / max(1, self.rounds - 1)
        share = self.first + way * (self.last - self.first)
        order = sorted(self.modules, key=lambda name: hashlib.sha256(name.encode()).digest())
        return frozenset(order[: math.floor(share * len(order) + 0.5)])
