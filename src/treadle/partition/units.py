"""What is scored and chosen: single elements of lora_A and lora_B, or whole ranks.

Tensors of units are kept under keys "MODULE/lora_A", "MODULE/lora_B" (elements, of the factor's own shape) or
"MODULE/rank" (ranks, of shape (rank,)). A rank is a column of lora_B, with its row of lora_A where A is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from treadle.errors import MismatchError

Granularity = Literal["element", "rank"]
Part = Literal["lora_A", "lora_B", "rank"]


def key(module: str, part: Part) -> str:
    """The key of a module's units."""
    return f"{module}/{part}"


def module_of(key: str) -> str:
    """The module that a key belongs to."""
    return key.rpartition("/")[0]


def of_part(tensors: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
    """Module → tensor, of one part alone."""
    return {module_of(name): tensor for name, tensor in tensors.items() if name.endswith(f"/{part}")}


@dataclass(frozen=True)
class Mask:
    """Some of the units.

    Attributes:
        units: key → True where a unit is chosen.
        sizes: key → parameters that one unit stands for: 1 an element; out_features, plus in_features where A is
            trained, a rank.
    """

    units: Mapping[str, Bool[Tensor, "..."]]
    sizes: Mapping[str, int]

    @property
    def ranks(self) -> dict[str, Tensor]:
        """Module → bool (rank,); empty at element granularity."""
        return of_part(self.units, "rank")

    @property
    def lora_A(self) -> dict[str, Tensor]:
        """Module → bool (rank, in_features); empty at rank granularity and where A is frozen."""
        return of_part(self.units, "lora_A")

    @property
    def lora_B(self) -> dict[str, Tensor]:
        """Module → bool (out_features, rank); empty at rank granularity."""
        return of_part(self.units, "lora_B")

    @property
    def count(self) -> int:
        """How many units are chosen."""
        return sum(int(chosen.sum()) for chosen in self.units.values())

    @property
    def parameters(self) -> int:
        """How many parameters are chosen."""
        return sum(int(chosen.sum()) * self.sizes[name] for name, chosen in self.units.items())

    @property
    def share(self) -> float:
        """The chosen parameters as a share of all, in [0, 1]."""
        return self.parameters / sum(chosen.numel() * self.sizes[name] for name, chosen in self.units.items())

    def __and__(self, other: "Mask") -> "Mask":
        return Mask({name: chosen & other.units[name] for name, chosen in self.units.items()}, self.sizes)

    def __or__(self, other: "Mask") -> "Mask":
        return Mask({name: chosen | other.units[name] for name, chosen in self.units.items()}, self.sizes)

    def __invert__(self) -> "Mask":
        return Mask({name: ~chosen for name, chosen in self.units.items()}, self.sizes)


def check_alike(what: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Nothing, where both are of the same units.

    Raises:
        MismatchError: they are not; names the first difference.
    """
    for name in [*first, *second]:
        shapes = tuple(tuple(side[name].shape) if name in side else None for side in (first, second))
        if shapes[0] != shapes[1]:
            raise MismatchError(
                f"{what} are of other units: {shapes[0]} beside {shapes[1]}",
                where=name,
                remedy="measure both on the same adapter at the same granularity",
            )


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All units in one row, in the order of the keys."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def unflattened(row: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The units of `flat` under their keys again."""
    parts = row.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape).clone() for (name, tensor), part in zip(like.items(), parts, strict=True)}
