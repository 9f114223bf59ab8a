"""One adapter, named beforehand: what every router is compared with, and what a caller who knows asks for.

FLOPs and storage: none. The scorer works with every granularity; a row that may not use the adapter is left to the
base. `oracle`, a fixed adapter for each row, is `RoutedModel.chosen`.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from treadle.routing.bank import AdapterBank
from treadle.routing.factors import LayerFactors
from treadle.routing.scorers import Scorer, mean


def fixed(bank: AdapterBank, name: str) -> Scorer:
    """The scorer that always chooses this adapter of the bank.

    Raises:
        InputError: there is no such adapter.
    """
    place = bank.names.index(bank.adapter(name).name)

    def eligible(factors: LayerFactors) -> Bool[Tensor, " adapters"]:
        """It alone, whether it has this layer or not: where it has not, nobody else steps in."""
        return torch.arange(factors.present.shape[0], device=factors.present.device) == place

    return Scorer(f"fixed:{name}", plain=mean.scores, eligible=eligible)
