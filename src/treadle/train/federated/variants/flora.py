"""FLoRA: A and B are both trained, and stacked: [w_1 B_1 … w_n B_n]·[A_1; …; A_n] is the mean update, exactly.

The stack's rank grows with every client. It is cut back to the family's ranks by the best approximation there is, a
truncated SVD; what is cut off is reported. A and B cross, up and down.

Reference: arXiv 2409.05976 (stacking).

Deviations: the paper sends the whole stack down, adds it to the base's weights and starts every round from a new
adapter. Our base is frozen and what comes out is an adapter of the planned ranks; until the cut, the two are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.algebra import orthonormal_factors
from treadle.train.federated.aggregation import Update, stacked
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.variants.variant import (
    Aggregate,
    TrainedTogether,
    Work,
    averaged,
    checked,
    deviations,
    products,
)


@dataclass(frozen=True)
class FLora(TrainedTogether):
    """Train A and B, stack them, cut the stack to the planned rank."""

    name: ClassVar[str] = "flora"
    exact: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    def aggregate(self, state: GlobalState, updates: Sequence[Update], *, server_round: int) -> Aggregate:
        """The best approximation of the stack in the planned ranks, with what it misses."""
        work = self.work(server_round)
        ordered = checked(state, work, updates)
        pairs = {
            name: orthonormal_factors(*stacked(*products(state, ordered, name)), rank=len(state.lora_A[name]))
            for name in sorted(work.both)
        }
        after = averaged(state, Work(frozenset(), work.lora_B - work.both), ordered).with_factors(
            lora_A={name: A for name, (A, _) in pairs.items()}, lora_B={name: B for name, (_, B) in pairs.items()}
        )
        return Aggregate(after, deviations(state, after, ordered, work.both))
