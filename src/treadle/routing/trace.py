"""What a routed model did: who acted where, by what margin, and who would have been next."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from treadle.errors import InputError
from treadle.routing.decision import BASE, Decision


@dataclass(frozen=True)
class LayerTrace:
    """The decisions of one layer in one forward pass, each (rows, tokens), beams as rows.

    Attributes:
        winner: place in the bank, `BASE` for the base.
        runner_up: likewise.
        margin: between the two.
        real: False on padding, and on what a batch still feeds to a row that has ended.
    """

    winner: Tensor
    runner_up: Tensor
    margin: Tensor
    real: Tensor


def _places(part: LayerTrace, row: int, rows: int | None) -> range:
    """Where the caller's row is among those that the layer saw: its beams follow one another."""
    seen = part.winner.shape[0]
    if rows is None:
        return range(row, row + 1)
    if seen % rows != 0:
        raise InputError(f"a layer saw {seen} rows, the caller gave {rows}", remedy="trace one batch a block")
    each = seen // rows
    return range(row * each, (row + 1) * each)


def _real(part: LayerTrace, place: int) -> Tensor:
    return part.winner[place][part.real[place]]


@dataclass
class Trace:
    """A growing record of one `with model.trace()` block; only adapters permitted to the caller ever appear in it.

    Attributes:
        names: the bank's adapters, in order.
        of_prompt: the layers whose tokens are the caller's and the generated ones; of an encoder–decoder the encoder's.
        layers: module → the decisions of each forward pass, in order; empty for scorers that mix or `sequence`.
        choices: for `sequence`, one decision a row for each prompt that was read.
        rescored: how many decisions float64 settled.
    """

    names: Sequence[str]
    of_prompt: Collection[str]
    layers: dict[str, list[LayerTrace]] = field(default_factory=dict[str, list[LayerTrace]])
    choices: list[Decision] = field(default_factory=list[Decision])
    rescored: int = 0

    def record(self, module: str, decision: Decision, real: Tensor) -> None:
        """Append one layer's decisions, (rows · tokens,) in row order, shaped like `real`."""
        winner, runner_up, margin = (
            part.reshape(real.shape).cpu() for part in (decision.winner, decision.runner_up, decision.margin)
        )
        self.layers.setdefault(module, []).append(LayerTrace(winner, runner_up, margin, real))
        self.rescored += int(decision.rescored.sum())

    def choose(self, decision: Decision) -> None:
        """Append the choice of one adapter a row."""
        self.choices.append(decision)
        self.rescored += int(decision.rescored.sum())

    def lengths(self) -> dict[str, int]:
        """Module → how many forward passes are recorded."""
        return {module: len(parts) for module, parts in self.layers.items()}

    def end_rows(self, before: Mapping[str, int], ended: Tensor) -> None:
        """Mark what was fed to rows that had ended as unreal.

        Args:
            before: `lengths` before generation.
            ended: (rows, new tokens), whether the row had ended with that token.
        """
        for module, parts in self.layers.items():
            start = before.get(module, 0)
            for step, part in enumerate(parts[start:]):
                if step > 0 and part.real.shape == (ended.shape[0], 1):  # step k is fed generated token k - 1
                    parts[start + step] = replace(part, real=part.real & ~ended[:, step - 1 : step].cpu())

    def name(self, place: int) -> str | None:
        """The adapter's name, None for the base."""
        return None if place == BASE else self.names[place]

    def winners(self, row: int, *, rows: int | None = None) -> dict[str, list[str | None]]:
        """Module → who acted on each real token of this row, in order of time.

        Args:
            row: beams are rows of their own, unless the number of rows is given.
            rows: how many the caller gave; the beams of a row, and its other sequences, then count as that row.

        Raises:
            InputError: what was recorded is of another number of rows.
        """
        return {
            module: [
                self.name(int(i)) for part in parts for place in _places(part, row, rows) for i in _real(part, place)
            ]
            for module, parts in self.layers.items()
        }

    def shares(self, row: int, *, rows: int | None = None) -> dict[str | None, float]:
        """The share of (token, layer) decisions that each adapter won in this row; None is the base."""
        counts = Counter(name for names in self.winners(row, rows=rows).values() for name in names)
        total = counts.total()
        if total == 0 and self.choices:
            return {self.name(int(self.choices[-1].winner[row])): 1.0}
        return {name: count / total for name, count in counts.most_common()}

    def tokens(self, row: int) -> list[dict[str | None, float]]:
        """For every real token of this row, the share of layers that each adapter won; poolers are left out."""
        winners = [names for module, names in self.winners(row).items() if module in self.of_prompt]
        length = max(map(len, winners), default=0)
        columns = zip(*(names for names in winners if len(names) == length), strict=True)
        return [{name: n / len(column) for name, n in Counter(column).most_common()} for column in columns]

    def to_json(self) -> dict[str, object]:
        """The whole trace as plain JSON values."""
        return {
            "choices": [self._choice(choice) for choice in self.choices],
            "layers": {
                module: [
                    {
                        "winner": [[self.name(int(i)) for i in row] for row in part.winner],
                        "runner_up": [[self.name(int(i)) for i in row] for row in part.runner_up],
                        "margin": part.margin.tolist(),
                        "real": part.real.tolist(),
                    }
                    for part in parts
                ]
                for module, parts in self.layers.items()
            },
            "rescored": self.rescored,
        }

    def _choice(self, choice: Decision) -> list[Mapping[str, object]]:
        return [
            {"winner": self.name(int(w)), "runner_up": self.name(int(r)), "margin": float(m), "chance": chance}
            for w, r, m, chance in zip(
                choice.winner,
                choice.runner_up,
                choice.margin,
                [None] * len(choice.winner) if choice.chance is None else choice.chance.tolist(),
                strict=True,
            )
        ]
