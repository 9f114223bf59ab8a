"""Moments of ‖B A x‖ over text, adapter by adapter: what `own`, `public` and `traffic` are made of."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treadle.progress import Progress, silent
from treadle.routing.calibration.moments import Moments
from treadle.routing.calibration.text import Observer, read_text
from treadle.routing.factors import LayerFactors, latent, triangles


def norm_moments(
    model: PreTrainedModel,
    layers: Mapping[str, LayerFactors],
    places: Sequence[int],
    batches: Sequence[Mapping[str, Tensor]],
    ignored: Sequence[int],
    progress: Progress = silent,
) -> dict[tuple[str, int], Moments]:
    """(module, place) → the moments of that adapter's norms, of one column, for every layer that it has.

    Columns are kept apart since the order in which torch adds up a column may depend on how many there are: so an
    adapter's moments are, bit for bit, the same whoever else is in the bank.

    Args:
        model: the base model.
        layers: the factors, by module.
        places: of the adapters, in the bank.
        batches: of `text_batches`.
        ignored: the token ids that do not count.
        progress: told of every batch.

    Raises:
        InputError: no token counts, or a layer never ran.
        UnsupportedError: a layer's inputs cannot be told apart by row and token.
    """
    found: dict[tuple[str, int], Moments] = {}

    def observer(factors: LayerFactors) -> Observer:
        norms = _norms_of(factors, places)

        def observe(x: Tensor) -> None:
            for place, column in norms(x).items():
                new, key = Moments.of(column[:, None]), (factors.module, place)
                found[key] = found[key].merge(new) if key in found else new

        return observe

    mine = {name: factors for name, factors in layers.items() if bool(factors.present[list(places)].any())}
    observers = {name: (factors.shape, observer(factors)) for name, factors in mine.items()}
    read_text(model, batches, ignored, observers, progress)
    return found


def _norms_of(factors: LayerFactors, places: Sequence[int]) -> Callable[[Tensor], dict[int, Tensor]]:
    """x ↦ place → ‖B_i A_i x‖, (tokens,) in float64, of the adapters at these places that have the layer."""
    small = [(group, triangles(factors, group, places)) for group in factors.groups]

    def norms(x: Tensor) -> dict[int, Tensor]:
        columns: dict[int, Tensor] = {}
        for group, by_place in small:
            z = latent(group, x)
            columns |= {place: torch.linalg.vector_norm(z @ R.T, dim=1) for place, R in by_place.items()}
        return columns

    return norms
