"""Each adapter's own training text, as numbers that its silo released under differential privacy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from treadle import files
from treadle.errors import FormatError, InputError, MismatchError
from treadle.family.adapter import Adapter, is_privacy
from treadle.routing.calibration.statistics import Method, Statistics
from treadle.routing.factors import LayerFactors

FORMAT = "treadle.released-norms/1"


@dataclass(frozen=True)
class ReleasedNorms:
    """What one silo, or several by `pooled`, released about one adapter.

    Attributes:
        mean: module → mean norm of ‖B A x‖ over the adapter's own rows.
        std: module → deviation, likewise.
        B_digest: `Adapter.digest` of the lora_B that was measured.
        epsilon: that the release cost those rows, beside the adapter's training; None if nothing accounts for it.
        delta: belongs to epsilon.
    """

    mean: Mapping[str, float]
    std: Mapping[str, float]
    B_digest: str
    epsilon: float | None
    delta: float

    def save(self, path: Path) -> None:
        """Write them as JSON: plain numbers, which a silo may read before it passes them on."""
        files.write_json(path, {"format": FORMAT, **asdict(self)})

    @staticmethod
    def load(path: Path) -> "ReleasedNorms":
        """What `save` wrote.

        Raises:
            InputError: there is no such file.
            FormatError: it is something else.
        """
        content = files.read_json(path)
        try:
            if content.pop("format") != FORMAT:
                raise ValueError(f"key 'format' is not {FORMAT!r}")
            mean, std = (_numbers(content.pop(name)) for name in ("mean", "std"))
            epsilon, delta = content.pop("epsilon"), float(str(content.pop("delta")))
            found = ReleasedNorms(
                mean, std, str(content.pop("B_digest")), None if epsilon is None else float(str(epsilon)), delta
            )
            if not (is_privacy(found.epsilon, below=math.inf) and is_privacy(delta, below=1.0)):
                raise ValueError("key 'epsilon' or 'delta' is out of range")
            if content or mean.keys() != std.keys():
                raise ValueError("unknown keys, or other modules in 'mean' than in 'std'")
        except (KeyError, ValueError, TypeError) as error:
            raise FormatError(
                f"holds no released statistics ({error})", where=path, remedy="ask the silo for it again"
            ) from error
        return found


def pooled(released: Sequence[ReleasedNorms], *, where: object = None) -> ReleasedNorms:
    """What several silos released about one adapter as one release over all of their rows, every silo counting alike.

    Mean and deviation are those of the mixture. ε and δ are the largest, as the silos' rows are disjoint; None as soon
    as one is. Modules that one of them lacks are left out.

    Args:
        released: at least one.
        where: named in errors.

    Raises:
        MismatchError: they are about different lora_B.
    """
    if len(released) == 1:
        return released[0]
    if len({one.B_digest for one in released}) > 1:
        raise MismatchError("the releases are about different lora_B", where=where, remedy="ask the silos again")
    modules = set.intersection(*(set(one.mean) for one in released))
    mean = {module: fmean(one.mean[module] for one in released) for module in sorted(modules)}
    square = {m: fmean(one.std[m] ** 2 + (one.mean[m] - mean[m]) ** 2 for one in released) for m in mean}
    std = {module: math.sqrt(value) for module, value in square.items()}
    return ReleasedNorms(mean, std, released[0].B_digest, *_largest(released))


def _largest(released: Sequence[ReleasedNorms]) -> tuple[float | None, float]:
    """ε and δ, each the largest; ε None as soon as one is."""
    known = [one.epsilon for one in released if one.epsilon is not None]
    return max(known) if known and len(known) == len(released) else None, max(one.delta for one in released)


def _numbers(value: object) -> dict[str, float]:
    """Module → a finite number."""
    if not isinstance(value, dict):
        raise TypeError("no object")
    found = {str(module): float(number) for module, number in value.items()}
    if not all(map(math.isfinite, found.values())):
        raise ValueError("a number is not finite")
    return found


@dataclass(frozen=True)
class PrivateCalibration:
    """Every adapter's norms on its own text, as its silo released them; costs the ε that it states, and reads nothing.

    Attributes:
        released: adapter name → what its silo released.
        name: what the report calls it.
    """

    released: Mapping[str, ReleasedNorms]
    name: str = "private"

    @property
    def method(self) -> Method:
        """How the bank's files name it."""
        return "private"

    def statistics(
        self, layers: Mapping[str, LayerFactors], adapters: Sequence[Adapter], ignored: tuple[int, ...]
    ) -> Statistics:
        """The releases as statistics of these adapters, labelled with the largest ε; NaN where nothing was released.

        Raises:
            InputError: nothing was released about an adapter.
            MismatchError: it was released about another lora_B.
        """
        found = [self._of(adapter) for adapter in adapters]
        epsilon, delta = _largest(found)
        return Statistics(
            {module: _column(module, [released.mean for released in found]) for module in layers},
            {module: _column(module, [released.std for released in found]) for module in layers},
            self.method,
            self.name,
            "",
            0,  # how many tokens there were is not released
            ignored,
            tuple(adapter.digest for adapter in adapters),
            epsilon=epsilon,
            delta=delta,
        )

    def _of(self, adapter: Adapter) -> ReleasedNorms:
        released = self.released.get(adapter.name)
        if released is None:
            raise InputError(
                "nothing was released about it", where=adapter.name, remedy="ask its silo, or leave it out"
            )
        if released.B_digest != adapter.digest:
            raise MismatchError("was released about another lora_B", where=adapter.name, remedy="ask its silo again")
        return released


def _column(module: str, numbers: Sequence[Mapping[str, float]]) -> Tensor:
    return torch.tensor([row.get(module, torch.nan) for row in numbers], dtype=torch.float64)
