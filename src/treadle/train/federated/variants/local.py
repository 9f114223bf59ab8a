"""No federation: every client trains a B of its own, and nothing of it reaches another. A baseline.

The clients' B stand beside one another in the state; the shared B stays zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from treadle.train.federated.aggregation import Update
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.variants.variant import Aggregate, FrozenA, checked


@dataclass(frozen=True)
class Local(FrozenA):
    """Train B, keep every client's apart."""

    name: ClassVar[str] = "local"
    exact: ClassVar[bool] = True
    averages: ClassVar[bool] = False

    def aggregate(self, state: GlobalState, updates: Sequence[Update], *, server_round: int) -> Aggregate:
        """The state with the B of these clients in place of those that they had."""
        ordered = checked(state, self.work(server_round), updates)
        sent = {
            update.client: {name: update.tensors[name].float().cpu().contiguous() for name in state.lora_B}
            for update in ordered
        }
        return Aggregate(replace(state, own={**state.own, **sent}))
