"""What routing needs of the adapters at one layer: small Gram factors, computed once and never in `forward`.

Adapters of the family share A, so they form one group whose z = A·x is computed once; a foreign adapter is a group
of its own, scored exactly by its own A, and costs its own product with x.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.algebra import packed_gram, pair_products, squared_norm_error, trusted_product
from treadle.family.adapter import Adapter
from treadle.family.plan import LayerShape

# Below this share of its mean, the spread of a norm is rounding, not signal.
_RELATIVE_FLOOR = 1e-6


@dataclass(frozen=True)
class Group:
    """Adapters of one layer that share an A.

    Attributes:
        columns: their places in the bank.
        A: (rank, inner), float32 as stored.
        grams: (adapters of the group, pairs), float32: packed BᵀB, scaling folded in, divided by ‖B‖_F²; so no scale
            of B under- or overflows.
        norms: ‖B‖_F, float64.
    """

    columns: Tensor
    A: Float[Tensor, "rank inner"]
    grams: Float[Tensor, "members pairs"]
    norms: Float[Tensor, " members"]

    def to(self, device: torch.device) -> "Group":
        """The same group on another device; the dtypes stay."""
        return Group(self.columns.to(device), self.A.to(device), self.grams.to(device), self.norms.to(device))


@dataclass(frozen=True)
class LayerFactors:
    """All groups of one layer, and its calibration.

    Attributes:
        module: the layer's full name.
        shape: the layer's own.
        groups: the family's group first, if any adapter belongs to it, then the foreign ones.
        present: (adapters,), whether the adapter has this layer.
        mean: (adapters,) of ‖B A x‖, float64; NaN before calibration.
        std: (adapters,) of ‖B A x‖, float64; NaN before calibration.
        directions: (adapters, rows, inner or rank), what a scorer's `prepare` made of every B·A; None without it.
        folded_B: loads the (out, rank) matrix of an adapter by its place in the bank.
    """

    module: str
    shape: LayerShape
    groups: tuple[Group, ...]
    present: Bool[Tensor, " adapters"]
    mean: Float[Tensor, " adapters"]
    std: Float[Tensor, " adapters"]
    directions: Float[Tensor, "adapters rows _"] | None
    folded_B: Callable[[int], Tensor]

    @property
    def eligible(self) -> Bool[Tensor, " adapters"]:
        """Which adapters have a z-score here: present, calibrated and trained (a zero B has no spread)."""
        return self.present & has_spread(self.mean, self.std)

    def to(self, device: torch.device) -> "LayerFactors":
        """The same factors on another device; the dtypes stay."""
        return replace(
            self,
            groups=tuple(group.to(device) for group in self.groups),
            present=self.present.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
            directions=None if self.directions is None else self.directions.to(device),
        )

    @property
    def rank(self) -> int:
        """The largest rank of the layer's adapters."""
        return max(group.A.shape[0] for group in self.groups)

    @cached_property
    def group_places(self) -> Mapping[int, int]:
        """Place of an adapter in the bank → place of its group; adapters without this layer are left out."""
        return {adapter: place for place, group in enumerate(self.groups) for adapter in group.columns.tolist()}

    def group_of(self, adapter: int) -> Group | None:
        """The group of the adapter at this place in the bank, None if it lacks this layer."""
        place = self.group_places.get(adapter)
        return None if place is None else self.groups[place]


def has_spread(mean: Float[Tensor, "*some"], std: Float[Tensor, "*some"]) -> Bool[Tensor, "*some"]:
    """Whether norms of this mean and deviation can be told from their mean; where they are NaN, they cannot."""
    return (mean > 0) & (std > _RELATIVE_FLOOR * mean)


def build_factors(module: str, adapters: Sequence[Adapter]) -> LayerFactors:
    """The uncalibrated factors of one layer for the adapters of a bank, in their order."""
    return assemble(module, adapters, [_group(module, adapters, columns) for columns in grouped(module, adapters)])


def grouped(module: str, adapters: Sequence[Adapter]) -> list[list[int]]:
    """The places of the adapters that have this layer: the family's members together first, then each foreign one."""
    members = [i for i, a in enumerate(adapters) if module in a.plan.modules and a.family is not None]
    foreign = [[i] for i, a in enumerate(adapters) if module in a.plan.modules and a.family is None]
    return [members, *foreign] if members else foreign


def assemble(module: str, adapters: Sequence[Adapter], groups: Sequence[Group]) -> LayerFactors:
    """The uncalibrated factors of one layer from its groups."""
    unknown = torch.full((len(adapters),), torch.nan, dtype=torch.float64)
    present = torch.tensor([module in adapter.plan.modules for adapter in adapters])
    shape = next(adapter.plan.modules[module].shape for adapter in adapters if module in adapter.plan.modules)
    return LayerFactors(
        module, shape, tuple(groups), present, unknown, unknown, None, lambda i: adapters[i].folded_B(module)
    )


def _group(module: str, adapters: Sequence[Adapter], columns: Sequence[int]) -> Group:
    matrices = [adapters[i].folded_B(module).double() for i in columns]
    norms = torch.stack([torch.linalg.matrix_norm(B) for B in matrices])
    grams = torch.stack([packed_gram(B / n if n > 0 else B) for B, n in zip(matrices, norms, strict=True)])
    return Group(torch.tensor(columns), adapters[columns[0]].lora_A[module].float(), grams.float(), norms)


def latent(group: Group, x: Float[Tensor, "tokens inner"]) -> Float[Tensor, "tokens rank"]:
    """A·x in float64, from the layer's actual input whatever its dtype.

    Deviation from arXiv 2509.18093, which does not say: in float32 the error of this product alone would leave a
    few per cent of all decisions in doubt, in float64 none of it is felt, at rank/out_features of the layer's cost.
    """
    return x.double() @ group.A.double().T


def scaled_norms(
    factors: LayerFactors, x: Float[Tensor, "tokens inner"], units: Float[Tensor, " adapters"]
) -> tuple[Tensor, Tensor, Tensor]:
    """‖B_i A_i x‖ / units_i, a number never above it and one never below, each (tokens, adapters) in float64.

    Zero where an adapter lacks the layer. The one costly product, of width rank·(rank+1)/2 a group and with no
    (tokens, adapters, rank) in between, is taken in float32 on unit vectors; its error is the only one to be felt.
    """
    value = x.new_zeros(x.shape[0], factors.present.shape[0], dtype=torch.float64)
    lower, upper = torch.zeros_like(value), torch.zeros_like(value)
    for group in factors.groups:
        z = latent(group, x)
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        products = pair_products((z / torch.where(length > 0, length, 1.0)).float())
        squares = trusted_product(products, group.grams.T).double()
        scale = length * (group.norms / units[group.columns])
        slack = squared_norm_error(z.shape[1])
        value[:, group.columns] = squares.clamp_min(0.0).sqrt() * scale
        lower[:, group.columns] = (squares - slack).clamp_min(0.0).sqrt() * scale
        upper[:, group.columns] = (squares + slack).clamp_min(0.0).sqrt() * scale
    return value, lower, upper


def triangles(factors: LayerFactors, group: Group, places: Sequence[int]) -> dict[int, Float[Tensor, "small rank"]]:
    """Place → R in float64 with ‖R z‖ = ‖B z‖ (B = QR, arXiv 2509.18093), for those of `places` that are in the group.

    Read from each adapter's stored B on its own, so that none of it depends on the rest of the bank.
    """
    mine = sorted(set(places) & set(group.columns.tolist()))
    return {place: torch.linalg.qr(factors.folded_B(place).to(group.A.device).double(), mode="r").R for place in mine}


def exact_norms(factors: LayerFactors, adapter: int, x: Float[Tensor, "tokens inner"]) -> Float[Tensor, " tokens"]:
    """‖B A x‖ of one adapter in float64, straight from its stored matrices: the definition, for disputed decisions."""
    group = factors.group_of(adapter)
    if group is None:
        return x.new_zeros(x.shape[0], dtype=torch.float64)
    B = factors.folded_B(adapter).to(x.device, torch.float64)
    return torch.linalg.vector_norm(latent(group, x) @ B.T, dim=1)


def calibrated(factors: LayerFactors, statistics: Mapping[str, Tensor]) -> LayerFactors:
    """The factors with these "mean" and "std", (adapters,) each."""
    return replace(factors, mean=statistics["mean"].double(), std=statistics["std"].double())
