"""The loop of the probes that shake one layer at a time: what was before it is cached, what it is run with is stacked.

For one batch of texts a clean run is recorded once. A layer's trials then run without the blocks before it, and as
many noisy copies of the layer together as `_TOKENS` allows: the texts are repeated, a copy's share of the rows goes
through its own weight, and everything behind the layer runs once on all rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from treadle.ranks.noise import pointed
from treadle.ranks.outputs import Metric, Observe, disagreement, is_out_of_memory, memory_for
from treadle.ranks.prefix import Recording, record, replaced, skipping
from treadle.ranks.probing import Probing

# Run together at most, unless a batch of texts alone has more. On a CPU two cores are busy with some hundred tokens,
# and more together costs memory and no less time; an accelerator waits for work.
_TOKENS, _TOKENS_ON_ACCELERATORS = 512, 16384


@dataclass(frozen=True)
class Noisy:
    """A layer's parameters and what they are to show instead."""

    parameters: Sequence[nn.Parameter]
    tensors: Sequence[Tensor]


Shake = Callable[[str, nn.Module, int, int], Noisy]
"""Maps a module's name, the module, the number of the trial and that of the copy to a draw of noise."""


@dataclass(frozen=True)
class Shaking:
    """How layers are shaken and compared: against another copy, or against the layer as it is."""

    shake: Shake
    copies: bool
    metric: Metric


def shake_each(probing: Probing, observe: Observe, shaking: Shaking) -> None:
    """Measure every trial of every layer that is still missing, each layer alone.

    Raises:
        InputError: outputs are not finite.
        UnavailableError: memory does not suffice for one batch of texts.
    """
    batches, layers = probing.inputs.batches, probing.layers
    with torch.no_grad():
        for number, ids in enumerate(batches):
            batch = _Batch(probing, ids, observe, shaking)
            for index, (name, layer) in enumerate(layers.items()):
                missing = probing.partial.missing(number, probing.recipe.trials, [name])
                for trial, values in batch.measured(name, layer, missing):
                    probing.partial.add(number, trial, {name: values})
                probing.progress(f"probing {name}", number * len(layers) + index + 1, len(batches) * len(layers))


class _Batch:
    """One batch of texts: its recorded clean runs, alone and repeated, and how many trials run together."""

    def __init__(self, probing: Probing, ids: Int[Tensor, "texts tokens"], observe: Observe, shaking: Shaking) -> None:
        self._probing, self._ids, self._observe, self._shaking = probing, ids, observe, shaking
        self._copies = 2 if shaking.copies else 1
        room = _TOKENS if probing.model.device.type == "cpu" else _TOKENS_ON_ACCELERATORS
        self._together = room // (ids.numel() * self._copies)
        self._recordings: dict[int, Recording] = {}

    def measured(self, name: str, layer: nn.Module, trials: Sequence[int]) -> list[tuple[int, Float[Tensor, " texts"]]]:
        """The trials, each with its texts' disagreements."""
        found: list[tuple[int, Tensor]] = []
        with memory_for(self._ids):
            while left := trials[len(found) :]:
                together = left[: max(1, self._together)]
                try:
                    found += zip(together, self._values(name, layer, together), strict=True)
                except (RuntimeError, MemoryError) as error:
                    if self._together == 0 or not is_out_of_memory(error):
                        raise
                    self._together = 0
                    self._recordings = {1: self._recording(1)}
        return found

    def _values(self, name: str, layer: nn.Module, trials: Sequence[int]) -> Float[Tensor, "trials texts"]:
        draws = [(trial, copy) for trial in trials for copy in range(self._copies)]
        if self._together > 0 and self._stackable(name, len(draws)):
            outputs = self._stacked(name, layer, draws)
        else:
            outputs = torch.stack([self._alone(name, layer, draw) for draw in draws])
        texts = len(self._ids)
        outputs = outputs.reshape(len(trials), self._copies, texts, -1)
        clean = self._recording(1).output.reshape(texts, -1)
        other = outputs[:, 1] if self._shaking.copies else clean.expand_as(outputs[:, 0])
        return disagreement(outputs[:, 0], other, self._shaking.metric).cpu()

    def _stackable(self, name: str, copies: int) -> bool:
        """Whether the rows of the layer's every input are the texts: then each copy can have its own."""
        return self._counts(name, 1) and self._counts(name, copies)

    def _counts(self, name: str, copies: int) -> bool:
        rows = self._recording(copies).rows[name]
        return bool(rows) and set(rows) == {copies * len(self._ids)}

    def _recording(self, copies: int) -> Recording:
        if copies not in self._recordings:
            ids = self._ids.repeat(copies, 1)
            self._recordings[copies] = record(self._probing.model, self._probing.layers, partial(self._observe, ids))
        return self._recordings[copies]

    def _alone(self, name: str, layer: nn.Module, draw: tuple[int, int]) -> Tensor:
        noisy = self._shaking.shake(name, layer, *draw)
        with skipping(self._recording(1), name), pointed(noisy.parameters, noisy.tensors):
            return self._observe(self._ids)

    def _stacked(self, name: str, layer: nn.Module, draws: Sequence[tuple[int, int]]) -> Tensor:
        noisy = [self._shaking.shake(name, layer, *draw) for draw in draws]
        inner = layer.forward

        def forward(x: Tensor) -> Tensor:
            outputs: list[Tensor] = []
            for copy, share in zip(noisy, x.chunk(len(noisy)), strict=True):
                with pointed(copy.parameters, copy.tensors):
                    outputs.append(inner(share))
            return torch.cat(outputs)

        with skipping(self._recording(len(draws)), name), replaced(layer, forward):
            return self._observe(self._ids.repeat(len(draws), 1))
