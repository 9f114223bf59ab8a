"""How much every element or rank of an adapter matters to a set of samples, from their gradients one by one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from treadle import randomness
from treadle.errors import InputError, MismatchError, TreadleError
from treadle.example_gradients import per_example_gates, per_example_gradients
from treadle.partition.units import Granularity, key, module_of
from treadle.progress import Progress, silent

Score = Literal["taylor", "gradient", "fisher", "printed"]
"""With φ a unit's value, g its mean gradient and F̂ its mean squared gradient by sample:

- "taylor": |g·φ − ½·F̂·φ²|, the change of the loss that setting φ to 0 makes, to second order with F̂ for the curvature;
- "gradient": |g|;
- "fisher": F̂;
- "printed": |g|·F̂, as the article prints it.

A rank's φ is 1 and its gradient by sample Σ G·φ over its column of lora_B, and over its row of lora_A where A is
trained: summed before it is squared.
"""

SCORES: tuple[Score, ...] = get_args(Score)
"""All of them, the article's first."""

Loss = Callable[[Sequence[int]], Tensor]
"""Runs the model on the samples of these numbers, which stand in this order along every input's first axis, and
returns the sum of their losses. A sample's loss is over its answer's tokens alone; the article's is their mean."""

_WARM_UP = "warm the adapter up for some steps, or start from PiSSA, OLoRA or another non-zero lora_B"


@dataclass(frozen=True)
class Measured:
    """The sums over samples that every score is made of, apart for each of some blocks of the samples.

    Attributes:
        granularity: what the units are.
        samples: how many samples each block has.
        first: key → (blocks, *unit shape), the sum of the gradients by sample.
        second: key → the same of their squares.
        values: key → the units' values when they were measured; 1 for ranks.
        sizes: key → parameters that one unit stands for.
    """

    granularity: Granularity
    samples: tuple[int, ...]
    first: Mapping[str, Float64[Tensor, "blocks *unit"]]
    second: Mapping[str, Float64[Tensor, "blocks *unit"]]
    values: Mapping[str, Tensor]
    sizes: Mapping[str, int]

    def unfolded(self, scalings: Mapping[str, float]) -> "Measured":
        """The sums of lora_B, where s·lora_B was measured: gradients times s, values over s. Ranks' stay.

        Args:
            scalings: module → s = alpha/r.
        """
        factors = {name: scalings[module_of(name)] if name.endswith("/lora_B") else 1.0 for name in self.first}
        return replace(
            self,
            first={name: factors[name] * first for name, first in self.first.items()},
            second={name: factors[name] ** 2 * second for name, second in self.second.items()},
            values={name: value / factors[name] for name, value in self.values.items()},
        )


@dataclass(frozen=True)
class Importance:
    """The importance of every unit to one system.

    Attributes:
        granularity: what the units are.
        score: which of the scores it is.
        samples: from how many samples.
        units: key → importance, at least 0, not all 0.
        sizes: key → parameters that one unit stands for.
    """

    granularity: Granularity
    score: Score
    samples: int
    units: Mapping[str, Float64[Tensor, "..."]]
    sizes: Mapping[str, int]


def measure(
    loss: Loss,
    batches: Sequence[Sequence[int]],
    *,
    lora_A: Mapping[str, nn.Parameter],
    lora_B: Mapping[str, nn.Parameter],
    granularity: Granularity = "element",
    blocks: int = 2,
    progress: Progress = silent,
) -> Measured:
    """The sums that importance is made of, from one forward and one backward pass a batch.

    Only one batch's gradients by sample exist at a time (at rank granularity only their (samples, rank) sums), and two
    float64 sums a block. float64, because g is the small mean of large terms of either sign: in float32 some hundred
    terms leave an error of 1e-5 of their size, which is 1e-3 of a mean a hundred times smaller; and because squares of
    gradients below 1e-23 are 0 in float32. Nothing is accumulated in any `.grad`; the model must drop nothing out.

    Args:
        loss: of some samples.
        batches: the numbers of the samples, each once, by the batch; samples of like length together are quickest.
        lora_A: module → lora_A where it is trained; empty inside a family.
        lora_B: module → lora_B of every adapted module, read by nothing but `torch.nn.functional.linear`.
        granularity: "element" or "rank".
        blocks: into how many parts the samples are split, as near to equal as can be, by a draw that is a function of
            their numbers' order alone; two are enough for a split half, more show its growth.
        progress: called after every batch.

    Raises:
        InputError: a sample stands twice, or there are fewer than blocks.
        MismatchError: an lora_A has no lora_B, or another rank than it.
        TreadleError: lora_B is 0 everywhere, so that every importance is; a loss or gradient is NaN or infinite.
        UnsupportedError: a factor is frozen, or its gradients cannot be told apart by sample.

    Reference: arXiv 2507.20999 §3.2. Deviations: the formulas there are garbled, see `Score`; ranks are ours.
    """
    _check_factors(lora_A, lora_B)
    block_of = _blocks([number for batch in batches for number in batch], blocks)
    watched = {key(name, "lora_B"): B for name, B in lora_B.items()}
    if granularity == "element":
        watched |= {key(name, "lora_A"): A for name, A in lora_A.items()}
        sums = _Sums.zero({name: factor.shape for name, factor in watched.items()}, blocks, _device(watched))
    else:
        ranks = {key(name, "rank"): torch.Size([B.shape[1]]) for name, B in lora_B.items()}
        sums = _Sums.zero(ranks, blocks, _device(watched))
    for done, batch in enumerate(batches):
        if granularity == "element":
            found = per_example_gradients(lambda batch=batch: _finite(loss(batch)), watched, len(batch))
        else:
            gates = per_example_gates(lambda batch=batch: _finite(loss(batch)), watched, len(batch))
            twice = {name: 2.0 if module_of(name) in lora_A else 1.0 for name in gates}  # column of B, and row of A
            found = {key(module_of(name), "rank"): twice[name] * gate for name, gate in gates.items()}
        sums.add(found, [block_of[number] for number in batch])
        progress("importance", done + 1, len(batches))
    counts = tuple(list(block_of.values()).count(block) for block in range(blocks))
    return sums.measured(granularity, counts, lora_A, lora_B)


def importance(measured: Measured, score: Score = "taylor", *, blocks: Sequence[int] | None = None) -> Importance:
    """The importance of every unit, from all samples or from those of some blocks.

    Args:
        measured: the sums.
        score: see `Score`.
        blocks: numbers of blocks; None takes all.

    Raises:
        TreadleError: every importance is 0.
    """
    chosen = list(range(len(measured.samples)) if blocks is None else blocks)
    samples = sum(measured.samples[block] for block in chosen)
    units = {
        name: _scored(
            score, first[chosen].sum(0) / samples, measured.second[name][chosen].sum(0) / samples, measured.values[name]
        )
        for name, first in measured.first.items()
    }
    if not any(bool(unit.any()) for unit in units.values()):
        raise TreadleError(f"every importance is 0 by the score {score!r}", remedy=_WARM_UP)
    return Importance(measured.granularity, score, samples, units, measured.sizes)


def _scored(score: Score, g: Tensor, F: Tensor, value: Tensor) -> Tensor:
    if score == "taylor":
        return (g * value - 0.5 * F * value.square()).abs()
    if score == "gradient":
        return g.abs()
    return F if score == "fisher" else g.abs() * F


def _check_factors(lora_A: Mapping[str, nn.Parameter], lora_B: Mapping[str, nn.Parameter]) -> None:
    for name, A in lora_A.items():
        if name not in lora_B or A.shape[0] != lora_B[name].shape[1]:
            raise MismatchError(
                "its lora_A has no lora_B of the same rank", where=name, remedy="give both factors of one adapter"
            )
    for name, factor in (*lora_A.items(), *lora_B.items()):
        if not factor.requires_grad:
            raise InputError("it is frozen, so it has no importance", where=name, remedy="leave it out, or train it")
    if not any(bool(B.detach().any()) for B in lora_B.values()):
        raise TreadleError("lora_B is 0 everywhere, so every importance is exactly 0", remedy=_WARM_UP)


def _blocks(numbers: Sequence[int], blocks: int) -> dict[int, int]:
    """Sample → its block: a draw over the samples in ascending order, cut into runs of like length."""
    if len(set(numbers)) != len(numbers):
        raise InputError("a sample stands in two places", remedy="name each sample once")
    if not 1 <= blocks <= len(numbers):
        raise InputError(
            f"{len(numbers)} samples cannot make {blocks} blocks", remedy="give more samples, or ask for fewer blocks"
        )
    drawn = np.argsort(randomness.uniform(0, "partition/blocks", (len(numbers),)), kind="stable")
    ordered = sorted(numbers)
    return {ordered[int(i)]: place * blocks // len(numbers) for place, i in enumerate(drawn)}


def _finite(loss: Tensor) -> Tensor:
    if not bool(loss.isfinite()):
        raise TreadleError(f"the loss is {loss.item()}", remedy="check the samples and the adapter")
    return loss


def _device(watched: Mapping[str, nn.Parameter]) -> torch.device:
    return next(iter(watched.values())).device


@dataclass(frozen=True)
class _Sums:
    """Sums that grow in place, (blocks, units) a key."""

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    shapes: Mapping[str, torch.Size]

    @classmethod
    def zero(cls, shapes: Mapping[str, torch.Size], blocks: int, device: torch.device) -> "_Sums":
        def zeros() -> dict[str, Tensor]:
            return {
                name: torch.zeros(blocks, shape.numel(), dtype=torch.float64, device=device)
                for name, shape in shapes.items()
            }

        return cls(zeros(), zeros(), shapes)

    def add(self, found: Mapping[str, Tensor], block_of_row: Sequence[int]) -> None:
        """Add a batch's gradients, (samples, *unit shape) a key, each to the block of its sample."""
        blocks = len(next(iter(self.first.values())))
        for name, gradients in found.items():
            rows = gradients.to(torch.float64, memory_format=torch.contiguous_format).flatten(1)
            member = torch.zeros(blocks, len(rows), dtype=torch.float64)
            member[block_of_row, range(len(rows))] = 1.0  # the sums by block are one product of matrices
            member = member.to(rows.device)
            self.first[name].addmm_(member, rows)
            squares = rows.square()
            if not bool(squares.sum().isfinite()):
                raise TreadleError(
                    "a sample's gradient is NaN or infinite", where=name, remedy="check the samples and the adapter"
                )
            self.second[name].addmm_(member, squares)

    def measured(
        self,
        granularity: Granularity,
        samples: tuple[int, ...],
        lora_A: Mapping[str, nn.Parameter],
        lora_B: Mapping[str, nn.Parameter],
    ) -> Measured:
        def shaped(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: row.view(len(samples), *self.shapes[name]).cpu() for name, row in sums.items()}

        if granularity == "element":
            factors = {key(name, "lora_B"): B for name, B in lora_B.items()}
            factors |= {key(name, "lora_A"): A for name, A in lora_A.items()}
            values = {name: factor.detach().double().cpu() for name, factor in factors.items()}
            sizes = dict.fromkeys(values, 1)
        else:
            values = {name: torch.ones(shape, dtype=torch.float64) for name, shape in self.shapes.items()}
            sizes = {
                key(name, "rank"): B.shape[0] + (lora_A[name].shape[1] if name in lora_A else 0)
                for name, B in lora_B.items()
            }
        return Measured(granularity, samples, shaped(self.first), shaped(self.second), values, sizes)
