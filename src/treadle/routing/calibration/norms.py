"""Norms ‖B A x‖ over text, adapter by adapter: what `own`, `public` and `traffic` are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treadle.progress import Progress, silent
from treadle.routing.calibration.moments import Moments
from treadle.routing.calibration.text import Observer, read_text
from treadle.routing.factors import LayerFactors, latent, triangles


@dataclass(frozen=True)
class NormReading:
    """What a text said of adapters: (module, place in the bank) → numbers, for every layer that the adapter has.

    Attributes:
        moments: of the norms of all tokens that count, of one column.
        passages: the mean norm of each passage in the order of reading, (passages,) in float64.
        squares: the mean squared norm of each, likewise.
    """

    moments: dict[tuple[str, int], Moments] = field(default_factory=dict[tuple[str, int], Moments])
    passages: dict[tuple[str, int], Tensor] = field(default_factory=dict[tuple[str, int], Tensor])
    squares: dict[tuple[str, int], Tensor] = field(default_factory=dict[tuple[str, int], Tensor])


def read_norms(
    model: PreTrainedModel,
    layers: Mapping[str, LayerFactors],
    places: Sequence[int],
    batches: Sequence[Mapping[str, Tensor]],
    ignored: Sequence[int],
    progress: Progress = silent,
    *,
    by_passage: bool = False,
) -> NormReading:
    """The norms of these adapters over the text.

    Columns are kept apart since the order in which torch adds up a column may depend on how many there are: so an
    adapter's numbers are, bit for bit, the same whoever else is in the bank.

    Args:
        model: the base model.
        layers: the factors, by module.
        places: of the adapters, in the bank.
        batches: of `text_batches`.
        ignored: the token ids that do not count.
        progress: told of every batch.
        by_passage: whether to keep two numbers a passage, too.

    Raises:
        InputError: no token counts, or a layer never ran.
        UnsupportedError: a layer's inputs cannot be told apart by row and token.
    """
    found = NormReading()
    parts: dict[tuple[str, int], list[Tensor]] = {}

    def observer(factors: LayerFactors) -> Observer:
        norms = _norms_of(factors, places)

        def observe(x: Tensor, rows: Tensor) -> None:
            lengths = torch.unique_consecutive(rows, return_counts=True)[1].tolist()
            for place, column in norms(x).items():
                new, key = Moments.of(column[:, None]), (factors.module, place)
                found.moments[key] = found.moments[key].merge(new) if key in found.moments else new
                if by_passage:
                    split = column.split(lengths)
                    means = torch.stack([torch.stack([part.mean(), part.square().mean()]) for part in split])
                    parts.setdefault(key, []).append(means)

        return observe

    mine = {name: factors for name, factors in layers.items() if bool(factors.present[list(places)].any())}
    observers = {name: (factors.shape, observer(factors)) for name, factors in mine.items()}
    read_text(model, batches, ignored, observers, progress)
    for key, means in parts.items():
        found.passages[key], found.squares[key] = torch.cat(means).unbind(1)
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
