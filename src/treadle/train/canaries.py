"""Canaries among the rows of a private run: gradients that an auditor makes up, and a record of what was released."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle import randomness
from treadle.errors import ConfigError
from treadle.privacy.gradients import MicroBatch, PerExample
from treadle.privacy.noise import PrivateRandomness
from treadle.privacy.plan import DPPlan, Mechanism

_EXCESS = 10.0  # times the norm that a row is clipped to, so that clipping is audited too

Place = tuple[str, int]
"""A weight's name, and the number of one of its entries."""


@dataclass(frozen=True)
class Canaries:
    """Gradients that are zero but for one entry, each its own.

    Attributes:
        places: the entries.
        members: which of the canaries are among the rows.
    """

    places: Sequence[Place]
    members: Bool[np.ndarray, " canaries"]

    @staticmethod
    def drawn(sizes: Mapping[str, int], count: int, *, seed: int) -> "Canaries":
        """`count` different places in weights of these sizes, and a fair coin for each, as the seed has it.

        Raises:
            ConfigError: there are fewer entries than canaries.
        """
        entries = [(name, entry) for name, size in sizes.items() for entry in range(size)]
        if count > len(entries):
            raise ConfigError(
                f"{count} canaries for {len(entries)} entries of lora_B", remedy="audit fewer, or raise the rank"
            )
        order = np.argsort(randomness.uniform(seed, "canaries", (len(entries),)), kind="stable")
        return Canaries([entries[int(i)] for i in order[:count]], coins(seed, count))

    def seen(self, weights: Mapping[str, Tensor]) -> Float[np.ndarray, " canaries"]:
        """The entries of these weights, or of their gradients, at the canaries' places."""
        flat = {name: weight.detach().flatten().tolist() for name, weight in weights.items()}
        return np.array([flat[name][entry] for name, entry in self.places])


def coins(seed: int, count: int) -> Bool[np.ndarray, " count"]:
    """Fair coins, a function of the seed and their number."""
    return randomness.uniform(seed, "coins", (count,)) < 0.5


class AuditedMechanism(Mechanism):
    """A mechanism whose last rows are the canaries that are in, and that remembers its releases where they act.

    Everything that makes the promise is the mechanism's own: it samples, clips and noises canaries like other rows.

    Attributes:
        released: (canaries,) a step: the noised sum at each canary's entry, in units of the norm of clipping.
    """

    def __init__(self, plan: DPPlan, rows: int, randomness: PrivateRandomness, canaries: Canaries) -> None:
        super().__init__(plan, rows + int(canaries.members.sum()), randomness)
        self._genuine = rows
        self._canaries = canaries
        self._present = [place for place, is_in in zip(canaries.places, canaries.members, strict=True) if is_in]
        self.released: list[Float[np.ndarray, " canaries"]] = []

    def gradient(self, weights: Mapping[str, Tensor], per_example: PerExample) -> dict[str, Tensor]:
        """The release of `Mechanism.gradient`, canaries included."""

        def with_canaries(batch: Sequence[int]) -> Iterator[MicroBatch]:
            genuine = [row for row in batch if row < self._genuine]
            if genuine:
                yield from per_example(genuine)
            yield from self._spikes([row - self._genuine for row in batch if row >= self._genuine], weights)

        released = super().gradient(weights, with_canaries)
        settings = self.plan.settings
        self.released.append(self._canaries.seen(released) * (settings.expected_batch / settings.max_grad_norm))
        return released

    def _spikes(self, chosen: Sequence[int], weights: Mapping[str, Tensor]) -> Iterator[MicroBatch]:
        """The gradients of these canaries, those of one weight together; all others are zero."""
        entries: dict[str, list[int]] = {}
        for canary in chosen:
            name, entry = self._present[canary]
            entries.setdefault(name, []).append(entry)
        height = _EXCESS * self.plan.settings.max_grad_norm
        for name, places in entries.items():
            spikes = torch.zeros(len(places), weights[name].numel())
            spikes[torch.arange(len(places)), torch.tensor(places)] = height
            yield MicroBatch({name: spikes.view(-1, *weights[name].shape)}, torch.ones(len(places)))
