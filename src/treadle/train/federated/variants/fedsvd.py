"""FedSVD: B is trained and averaged; then the server makes a new A of orthonormal rows from the SVD of mean B·A.

B̄·A = U·S·Vᵀ; the next round starts from A' = Vᵀ and B' = U·S. B̄·A has the rank of A at most, so nothing is cut off
and the aggregate is exact. B crosses upwards, A and B downwards. The SVD is of what was released, so it costs no ε.
Every round makes a new family; modules whose A is frozen keep theirs.

Reference: arXiv 2505.12805.

Deviations: none known to us. Worth knowing, and tested: the rows of A' span what the rows of A span, so A is turned
within the subspace that it began with, and SGD, clipping by norm and Gaussian noise do not see a turn. From an
orthonormal A the method is FFA-LoRA, but for optimisers that look at single coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.algebra import orthonormal_factors
from treadle.train.federated.aggregation import Update
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.variants.variant import Aggregate, MovingA, Work, averaged, checked, deviations


@dataclass(frozen=True)
class FedSvd(MovingA):
    """Train and average B, then turn A to the right singular vectors of the mean update."""

    name: ClassVar[str] = "fedsvd"
    exact: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    def work(self, server_round: int) -> Work:
        """Every B."""
        return Work(frozenset(), frozenset(self.freezing.modules))

    def aggregate(self, state: GlobalState, updates: Sequence[Update], *, server_round: int) -> Aggregate:
        """The mean of the B, and the same product from an orthonormal A, with what rounding misses."""
        work = self.work(server_round)
        ordered = checked(state, work, updates)
        mean = averaged(state, work, ordered)
        turning = work.lora_B - self.freezing.frozen(server_round)
        pairs = {
            name: orthonormal_factors(mean.lora_A[name], mean.lora_B[name], rank=len(mean.lora_A[name]))
            for name in sorted(turning)
        }
        after = mean.with_factors(
            lora_A={name: A for name, (A, _) in pairs.items()}, lora_B={name: B for name, (_, B) in pairs.items()}
        )
        return Aggregate(after, deviations(state, after, ordered, turning))
