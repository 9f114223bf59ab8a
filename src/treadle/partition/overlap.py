"""Whether a difference between two systems' units is more than the draw of the samples.

Two draws of 100 samples of one system were seen to share .55 of their units where the two systems share .46: most of
what one system "alone" has was noise. So the overlap between systems is read beside that of a system with itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from treadle.errors import InputError, MismatchError
from treadle.partition.importance import Measured, Score, importance
from treadle.partition.selection import jaccard, smallest_set
from treadle.partition.units import Mask


@dataclass(frozen=True)
class Overlap:
    """Jaccard indices of sets that were each chosen from `samples` samples.

    Attributes:
        samples: of the smallest draw.
        first: of two draws of the first system.
        second: of two draws of the second system.
        between: of a draw of the one and a draw of the other; the mean of all four pairs.
    """

    samples: int
    first: float
    second: float
    between: float

    @property
    def floor(self) -> float:
        """The lesser of both systems' overlap with themselves: what noise alone leaves."""
        return min(self.first, self.second)


def split_half(measured: Measured, theta: float, *, score: Score = "taylor") -> float:
    """The Jaccard index of the sets at θ of two halves of the samples: of the first half of the blocks, and the rest.

    Args:
        measured: in an even number of blocks.
        theta: see `smallest_set`.
        score: see `Score`.

    Raises:
        InputError: the blocks cannot be halved.
    """
    return jaccard(*_halves(measured, theta, score, _blocks(measured) // 2))


def growth(first: Measured, second: Measured, theta: float, *, score: Score = "taylor") -> tuple[Overlap, ...]:
    """How overlaps grow with the samples: a row for draws of 1, 2, … blocks, up to half of all.

    Both draws of a row are of equal size, within a system and between systems, so that its figures compare.

    Args:
        first: of one system, in an even number of blocks.
        second: of the other, in as many blocks of about as many samples.
        theta: see `smallest_set`.
        score: see `Score`.

    Raises:
        InputError: the blocks cannot be halved.
        MismatchError: the numbers of blocks differ, or they are of other units.
    """
    if _blocks(first) != _blocks(second):
        raise MismatchError(
            f"{_blocks(first)} blocks stand beside {_blocks(second)}", remedy="measure both in as many blocks"
        )
    return tuple(_overlap(first, second, theta, score, width) for width in range(1, _blocks(first) // 2 + 1))


def samples_needed(rows: Sequence[Overlap], *, floor: float = 0.0) -> int | None:
    """The fewest samples a draw from which on the systems' overlap with themselves is at least `floor` and above
    that between them; None if no row is reached.

    Args:
        rows: as `growth` gives them.
        floor: a Jaccard index in [0, 1]; at 0 it only has to be above that between them.
    """
    needed: int | None = None
    for row in reversed(rows):
        if row.floor < floor or row.floor <= row.between:
            break
        needed = row.samples
    return needed


def _overlap(first: Measured, second: Measured, theta: float, score: Score, width: int) -> Overlap:
    draws = [_halves(measured, theta, score, width) for measured in (first, second)]
    pairs = [jaccard(one, other) for one, other in product(*draws)]
    samples = min(sum(m.samples[begin : begin + width]) for m in (first, second) for begin in (0, width))
    return Overlap(samples, jaccard(*draws[0]), jaccard(*draws[1]), sum(pairs) / len(pairs))


def _halves(measured: Measured, theta: float, score: Score, width: int) -> tuple[Mask, Mask]:
    """The sets of the first `width` blocks and of as many after them."""
    draws = (range(width), range(width, 2 * width))
    one, other = (smallest_set(importance(measured, score, blocks=draw), theta) for draw in draws)
    return one, other


def _blocks(measured: Measured) -> int:
    blocks = len(measured.samples)
    if blocks % 2:
        raise InputError(f"{blocks} blocks cannot be halved", remedy="measure in an even number of blocks")
    return blocks
