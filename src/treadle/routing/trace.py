"""What a routed model did: who acted where, by what margin, and who would have been next."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treadle.routing.decision import BASE, Decision


@dataclass(frozen=True)
class LayerTrace:
    """The decisions of one layer, each (rows, tokens); padding stands there too, `Trace.mask` tells it apart."""

    winner: Tensor
    runner_up: Tensor
    margin: Tensor


@dataclass
class Trace:
    """A growing record of one `with model.trace()` block; only adapters permitted to the caller ever appear in it.

    Attributes:
        names: the bank's adapters, in order.
        layers: module → the decisions of each forward pass, in order.
        masks: which tokens of each forward pass are real, (rows, tokens).
        choices: for `sequence`, one decision a row for each prompt that was read.
        rescored: how many decisions float64 settled.
    """

    names: Sequence[str]
    layers: dict[str, list[LayerTrace]] = field(default_factory=dict[str, list[LayerTrace]])
    masks: list[Tensor] = field(default_factory=list[Tensor])
    choices: list[Decision] = field(default_factory=list[Decision])
    rescored: int = 0

    def record(self, module: str, decision: Decision, rows: int) -> None:
        """Append one layer's decisions, (rows · tokens,) in row order."""
        parts = [part.reshape(rows, -1).cpu() for part in (decision.winner, decision.runner_up, decision.margin)]
        self.layers.setdefault(module, []).append(LayerTrace(*parts))
        self.rescored += int(decision.rescored.sum())

    def name(self, place: int) -> str | None:
        """The adapter's name, None for the base."""
        return None if place == BASE else self.names[place]

    def winners(self, row: int) -> dict[str, list[str | None]]:
        """Module → who acted on each real token of this row, in order of time."""
        return {
            module: [
                self.name(int(i))
                for i in torch.cat([self._real(part.winner, step, row) for step, part in enumerate(parts)])
            ]
            for module, parts in self.layers.items()
        }

    def _real(self, values: Tensor, step: int, row: int) -> Tensor:
        mask = self.masks[step][row] if step < len(self.masks) else torch.ones(0, dtype=torch.bool)
        return values[row][mask] if mask.shape == values[row].shape else values[row]

    def shares(self, row: int) -> dict[str | None, float]:
        """The share of (token, layer) decisions that each adapter won in this row; None is the base."""
        counts = Counter(name for names in self.winners(row).values() for name in names)
        total = counts.total()
        if total == 0 and self.choices:
            return {self.name(int(self.choices[-1].winner[row])): 1.0}
        return {name: count / total for name, count in counts.most_common()}

    def tokens(self, row: int) -> list[dict[str | None, float]]:
        """For every real token of this row, the share of layers that each adapter won."""
        columns: list[Counter[str | None]] = []
        for names in self.winners(row).values():
            for place, name in enumerate(names):
                if place == len(columns):
                    columns.append(Counter())
                columns[place][name] += 1
        return [{name: n / column.total() for name, n in column.most_common()} for column in columns]

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
                    }
                    for part in parts
                ]
                for module, parts in self.layers.items()
            },
            "rescored": self.rescored,
        }

    def _choice(self, choice: Decision) -> list[Mapping[str, object]]:
        return [
            {"winner": self.name(int(w)), "runner_up": self.name(int(r)), "margin": float(m)}
            for w, r, m in zip(choice.winner, choice.runner_up, choice.margin, strict=True)
        ]
