"""FedIT: A and B are both trained, and each is averaged for itself. The baseline.

mean(B_i)·mean(A_i) is not mean(B_i·A_i): the difference is Σ w_i (B_i − B̄)(A_i − Ā), and is reported. Modules whose A
is frozen are joined exactly. A and B cross, up and down.

Reference: arXiv 2305.05644.

Deviations: `freezing` is ours; the paper trains every A.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.train.federated.aggregation import Update
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.variants.variant import Aggregate, TrainedTogether, averaged, checked, deviations


@dataclass(frozen=True)
class FedIt(TrainedTogether):
    """Train A and B, average them apart."""

    name: ClassVar[str] = "fedit"
    exact: ClassVar[bool] = False
    averages: ClassVar[bool] = True

    def aggregate(self, state: GlobalState, updates: Sequence[Update], *, server_round: int) -> Aggregate:
        """The mean of the A and the mean of the B, with what that misses."""
        work = self.work(server_round)
        ordered = checked(state, work, updates)
        after = averaged(state, work, ordered)
        return Aggregate(after, deviations(state, after, ordered, work.both))
