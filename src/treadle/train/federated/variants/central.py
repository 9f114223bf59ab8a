"""Pooled data: one silo holds all rows, so there is nothing to aggregate. The ceiling.

With every A frozen it is B-only training at one place; with none, LoRA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from treadle.errors import MismatchError
from treadle.train.federated.aggregation import Update
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.variants.variant import Aggregate, TrainedTogether, averaged, checked


@dataclass(frozen=True)
class Central(TrainedTogether):
    """Take over what the one silo sends."""

    name: ClassVar[str] = "central"
    exact: ClassVar[bool] = True
    averages: ClassVar[bool] = False

    def aggregate(self, state: GlobalState, updates: Sequence[Update], *, server_round: int) -> Aggregate:
        """The factors of the one silo.

        Raises:
            MismatchError: there are several.
        """
        work = self.work(server_round)
        ordered = checked(state, work, updates)
        if len(ordered) > 1:
            raise MismatchError(
                "central training has one silo with all rows", where=ordered[1].client, remedy="pool them, or use ffa"
            )
        return Aggregate(averaged(state, work, ordered))
