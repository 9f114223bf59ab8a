"""RoLoRA: rounds take turns, B in odd ones and A in even ones.

In each round one factor is the same everywhere, so the mean of the other is exact. One factor crosses upwards a
round, both downwards: a client need not remember. Modules whose A is frozen train B in every round.

Reference: arXiv 2502.01755.

Deviations: B goes first, since A has no gradient while B is zero. The paper sends only the factor that changed; a
client that missed a round could not go on from that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.train.federated.aggregation import Update
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.variants.variant import Aggregate, MovingA, Work, averaged, checked


@dataclass(frozen=True)
class RoLora(MovingA):
    """Train and average B, then A, then B, …"""

    name: ClassVar[str] = "rolora"
    exact: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    def work(self, server_round: int) -> Work:
        """Every B in odd rounds; in even ones the A that are not frozen, and B of the modules where it is."""
        modules = frozenset(self.freezing.modules)
        moving = frozenset[str]() if server_round % 2 else modules - self.freezing.frozen(server_round)
        return Work(moving, modules - moving)

    def aggregate(self, state: GlobalState, updates: Sequence[Update], *, server_round: int) -> Aggregate:
        """The mean of the factors whose turn it was."""
        work = self.work(server_round)
        return Aggregate(averaged(state, work, checked(state, work, updates)))
