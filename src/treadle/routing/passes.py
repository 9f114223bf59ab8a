"""What a forward pass tells the hooks of a routed model: who acts, or that somebody reads along."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from treadle.routing.decision import Mixture
from treadle.routing.layer import RoutedLayer
from treadle.routing.running import EvidencePass


@dataclass(frozen=True)
class Acting:
    """What a forward pass tells the hooks: adapters act.

    Attributes:
        permitted: (rows, adapters), None for all.
        chosen: who acts on a row at all layers; None lets every layer decide.
        real: (rows, tokens) of the prompt, False on padding.
        uniform: whether all rows are treated alike.
        alone: the one adapter (or the base) that acts everywhere, where that is so.
    """

    permitted: Tensor | None
    chosen: Mixture | None
    real: Tensor
    uniform: bool
    alone: int | None = None


Note = Callable[[RoutedLayer, Tensor], None]
"""Takes a layer and its input."""


@dataclass(frozen=True)
class Reading:
    """What a forward pass tells the hooks: nobody acts, `note` is told what layers see.

    Attributes:
        note: is told.
        waiting: the layers that have still to run before the pass may end; None for all of the pass.
    """

    note: Note
    waiting: set[str] | None


class Enough(Exception):  # noqa: N818 - not an error: every layer that was waited for has run
    """Ends a reading pass."""


@dataclass
class Current:
    """The pass that this thread (or task) is in: whose it is, what the hooks shall do, and what the base was given.

    Attributes:
        owner: the model that began it; another model's hooks on the same base stay silent.
        task: acting or reading.
        batch: (rows, tokens) of the base's latest input, beams included.
        evidence: what that input adds to the running sums.
        blocks: block → who acts on each token, once its first layer has chosen.
    """

    owner: object
    task: Acting | Reading
    batch: tuple[int, int]
    evidence: EvidencePass | None = None
    blocks: dict[str, Mixture] = field(default_factory=dict[str, Mixture])


def told(reading: Reading, layer: RoutedLayer, x: Tensor) -> None:
    """Tell of one layer's input, unless nobody waits for it; end the pass when nobody waits for any other."""
    if reading.waiting is None:
        reading.note(layer, x)
        return
    if layer.factors.module in reading.waiting:
        reading.note(layer, x)
        reading.waiting.remove(layer.factors.module)
        if not reading.waiting:
            raise Enough
