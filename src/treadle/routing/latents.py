"""z = A·x of one layer's input, computed once for each group of adapters that is asked for."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from treadle.routing.factors import LayerFactors


class Latents:
    """The latents of one call, in float32, each group's made when an adapter of it acts.

    Scoring has z in float64, but what acts is what PEFT would compute: the same product in the same precision.

    Args:
        x: the layer's input.
        factors: of the layer.
        known: every group's latent, where they are not A·x but something made of it.
    """

    def __init__(
        self, x: Float[Tensor, "tokens inner"], factors: LayerFactors, known: Sequence[Tensor] | None = None
    ) -> None:
        self._x, self._factors = x, factors
        self._made = {place: z.float() for place, z in enumerate(known or ())}

    @property
    def present(self) -> Bool[Tensor, " adapters"]:
        """Which adapters have this layer."""
        return self._factors.present

    def __contains__(self, adapter: int) -> bool:
        """Whether the adapter at this place in the bank has this layer; the base has none."""
        return adapter in self._factors.group_places

    def of(self, adapter: int) -> Float[Tensor, "tokens rank"]:
        """The latent of every token under the A of the adapter at this place in the bank."""
        return self._of_group(self._factors.group_places[adapter])

    def gathered(self, token: Int[Tensor, " pairs"], adapter: Int[Tensor, " pairs"]) -> Float[Tensor, "pairs rank"]:
        """The latent of each token under the A of its adapter, smaller ranks filled up with zeros."""
        groups = self._factors.groups
        if len(groups) == 1:
            return self._of_group(0)[token]
        result = torch.zeros(token.shape[0], self._factors.rank, device=token.device)
        for place, group in enumerate(groups):
            mine = torch.isin(adapter, group.columns)
            if bool(mine.any()):
                z = self._of_group(place)[token[mine]]
                result[mine, : z.shape[1]] = z
        return result

    def _of_group(self, place: int) -> Tensor:
        if place not in self._made:
            self._made[place] = torch.nn.functional.linear(self._x.float(), self._factors.groups[place].A)
        return self._made[place]
