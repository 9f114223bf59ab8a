"""The mean score of a prompt over its tokens and all layers: what `sequence` chooses by."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.routing.decision import settled
from treadle.routing.factors import LayerFactors
from treadle.routing.rows import check_rows, spread
from treadle.routing.scorers import Scorer
from treadle.routing.scores import Scores


@dataclass
class PromptTotals:
    """Running sums over tokens and layers, while the base reads prompts; each (rows, adapters) in float64.

    Attributes:
        counted: (rows, tokens), which tokens count.
        value: of the scores.
        lower: of their lower bounds.
        upper: of their upper bounds.
        counts: how many scores each sum has.
    """

    counted: Bool[Tensor, "rows tokens"]
    value: Float[Tensor, "rows adapters"]
    lower: Float[Tensor, "rows adapters"]
    upper: Float[Tensor, "rows adapters"]
    counts: Float[Tensor, "rows adapters"]

    @staticmethod
    def empty(counted: Bool[Tensor, "rows tokens"], adapters: int) -> "PromptTotals":
        """Totals of nothing."""
        zero = torch.zeros(counted.shape[0], adapters, dtype=torch.float64, device=counted.device)
        return PromptTotals(counted, zero, zero, zero, zero)

    def add(self, scorer: Scorer, factors: LayerFactors, x: Tensor, settle: Tensor | None) -> None:
        """Add one layer's scores of its input x.

        Args:
            scorer: whose scores.
            factors: of the layer.
            x: (rows, tokens, inner), or one vector a row, as a pooler sees it: there is no padding in those.
            settle: (rows, adapters), whose scores to take in float64 from the stored matrices; None for nobody's.

        Raises:
            UnsupportedError: the rows of x cannot be told apart.
        """
        rows, tokens = self.counted.shape
        if rows > 1:
            check_rows(x, rows, (rows, tokens), factors.module)
        flat = x.reshape(-1, x.shape[-1])
        scores = scorer.scores(factors, flat, None)
        parts = [scores.value.double(), scores.lower.double(), scores.upper.double()]
        if settle is not None:
            wanted = spread(settle.to(x.device), flat.shape[0]) & (parts[0] > -torch.inf)
            parts = [settled(factors, flat, parts[0], wanted, calibrated=scorer.calibrated)] * 3
        cubes = [part.reshape(rows, part.shape[0] // rows, part.shape[1]) for part in parts]
        mask = self.counted if cubes[0].shape[1] == tokens else torch.ones_like(self.counted[:, :1])
        there = (cubes[0] > -torch.inf) & mask.to(x.device)[:, :, None]
        home = self.counts.device
        sums = [torch.where(there, cube, 0.0).sum(1).to(home) for cube in cubes]
        self.value, self.lower, self.upper = self.value + sums[0], self.lower + sums[1], self.upper + sums[2]
        self.counts = self.counts + there.sum(1).to(home)

    def means(self, permitted: Tensor | None) -> Scores:
        """Mean scores and their bounds, -inf for an adapter that is forbidden, or eligible nowhere."""
        allowed = self.counts > 0 if permitted is None else (self.counts > 0) & permitted
        number = self.counts.clamp_min(1.0)
        value, lower, upper = (
            torch.where(allowed, part / number, -torch.inf) for part in (self.value, self.lower, self.upper)
        )
        return Scores(value, lower, upper)
