"""FFA-LoRA: A is frozen everywhere, B is trained and averaged.

mean(B_i)·A = mean(B_i·A): the aggregate is exact. Only B crosses, up and down. Ranks may differ by client: B of the
first rows of A, filled with zeros, has the same product.

Reference: arXiv 2403.12313 §3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.train.federated.aggregation import Update
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.variants.variant import Aggregate, FrozenA, averaged, checked


@dataclass(frozen=True)
class Ffa(FrozenA):
    """Train and average B."""

    name: ClassVar[str] = "ffa"
    exact: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    def aggregate(self, state: GlobalState, updates: Sequence[Update], *, server_round: int) -> Aggregate:
        """The mean of the B."""
        work = self.work(server_round)
        return Aggregate(averaged(state, work, checked(state, work, updates)))
