"""Both factors of an adapter, where its A may be another than the family's."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The two factors of every module: A is (rank, in_features), B (out_features, rank) with its scaling folded in."""

    lora_A: Mapping[str, Tensor]
    lora_B: Mapping[str, Tensor]
