"""The score of a prompt over its tokens and layers: what `sequence` chooses by.

Without public prompts it is the mean over the layers of their mean over tokens. With them it is the weighted sum of
`calibration.prompts`, in deviations of what public prompts score, which chooses better and can be compared with them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from treadle.algebra import FP32_UNIT, trusted_product
from treadle.routing.calibration.prompts import PromptStatistics
from treadle.routing.decision import contenders, settled
from treadle.routing.layer import RoutedLayer
from treadle.routing.rows import check_rows, spread
from treadle.routing.scores import Scores
from treadle.routing.table import ScoreTable, latents_of, spread_out, squares


@dataclass
class PromptTotals:
    """Running sums over tokens and layers, while the base reads prompts; each (rows, adapters) in float64.

    Attributes:
        counted: (rows, tokens), which tokens count.
        permitted: (rows, adapters), None for all; the sums of the others are of no use.
        value: of the scores, weighted where there are weights.
        lower: of their lower bounds, likewise.
        upper: of their upper bounds, likewise.
        counts: how many scores each sum has.
        prompts: how the layers add up; None to take the mean.
    """

    counted: Bool[Tensor, "rows tokens"]
    permitted: Bool[Tensor, "rows adapters"] | None
    value: Float[Tensor, "rows adapters"]
    lower: Float[Tensor, "rows adapters"]
    upper: Float[Tensor, "rows adapters"]
    counts: Float[Tensor, "rows adapters"]
    prompts: PromptStatistics | None

    @staticmethod
    def empty(
        counted: Bool[Tensor, "rows tokens"],
        permitted: Bool[Tensor, "rows adapters"] | None,
        adapters: int,
        prompts: PromptStatistics | None,
    ) -> "PromptTotals":
        """Totals of nothing."""
        zero = torch.zeros(counted.shape[0], adapters, dtype=torch.float64, device=counted.device)
        return PromptTotals(counted, permitted, zero, zero, zero, zero, prompts)

    def add(self, layer: RoutedLayer, x: Tensor, settle: Tensor | None) -> None:
        """Add one layer's scores of its input x.

        Args:
            layer: whose scores.
            x: (rows, tokens, inner), or one vector a row, as a pooler sees it: there is no padding in those.
            settle: (rows, adapters), whose scores to take in float64 from the stored matrices; None for nobody's.

        Raises:
            UnsupportedError: the rows of x cannot be told apart.
        """
        rows, tokens = self.counted.shape
        if rows > 1:
            check_rows(x, rows, (rows, tokens), layer.factors.module, layer.layout)
        flat = x.reshape(-1, x.shape[-1])
        seen = flat.shape[0] // rows
        mask = (self.counted if seen == tokens else torch.ones(rows, seen, dtype=torch.bool)).to(x.device)
        there = (mask[:, :, None] & layer.eligible).sum(1)
        if settle is not None:
            sums = [_settled(layer, flat, mask, settle.to(x.device))] * 3
        elif layer.table is None:
            allowed = None if self.permitted is None else spread(self.permitted.to(x.device), flat.shape[0])
            sums = list(_plain(layer, flat, mask, allowed))
        else:
            sums = list(_bounds(layer, layer.table, flat, mask))
        home = self.counts.device
        sums, there = [torch.where(layer.eligible, part, 0.0).to(home) for part in sums], there.to(home)
        if self.prompts is not None:
            weight = self.prompts.weight_of(layer.factors.module).to(home) / there.clamp_min(1)
            value, low, high = (weight * part for part in sums)  # a weight below 0 turns bounds around
            sums = [value, torch.minimum(low, high), torch.maximum(low, high)]
        self.value, self.lower, self.upper = self.value + sums[0], self.lower + sums[1], self.upper + sums[2]
        self.counts = self.counts + there

    def scores(self) -> Scores:
        """The prompts' scores and their bounds, -inf for an adapter that is forbidden, or eligible nowhere."""
        allowed = self.counts > 0 if self.permitted is None else (self.counts > 0) & self.permitted
        number, centre = self.counts.clamp_min(1.0), torch.zeros_like(self.counts[0])
        if self.prompts is not None:
            number, centre = torch.ones_like(number), self.prompts.centre.to(number.device)
            allowed = allowed & ~centre.isnan()
        value, lower, upper = (
            torch.where(allowed, part / number - centre, -torch.inf) for part in (self.value, self.lower, self.upper)
        )
        return Scores(value, lower, upper)


def prompt_scores(
    read: Callable[[Callable[[RoutedLayer, Tensor], None]], None],
    empty: PromptTotals,
    *,
    exact: bool,
) -> tuple[Float[Tensor, "rows adapters"], Bool[Tensor, " rows"]]:
    """The scores of each row, and whether float64 settled them.

    Args:
        read: lets the base read the prompts, and tells of every layer's input.
        empty: totals of nothing, for those prompts.
        exact: whether the scores have bounds, and disputes are settled.
    """

    def totals(settle: Tensor | None) -> PromptTotals:
        found = replace(empty)
        read(lambda layer, x: found.add(layer, x, settle))
        return found

    scores = totals(None).scores()
    rivals = contenders(scores)
    disputed = (rivals.sum(1) > 1) & exact
    if not bool(disputed.any()):
        return scores.value, disputed
    rivals &= disputed[:, None]
    return torch.where(rivals, totals(rivals).scores().value, scores.value), disputed


def _bounds(layer: RoutedLayer, table: ScoreTable, flat: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the counted tokens of each row: scores, lower and upper bounds, (rows, adapters) in float64.

    A score is affine in the norm, so roots are summed first, by a product with the lengths, and scaled once a row.
    """
    rows, seen = mask.shape
    low: list[Tensor] = []
    high: list[Tensor] = []
    for group, z in zip(table.groups, latents_of(table, flat), strict=True):
        square, length = squares(group, z)
        weight = (length.reshape(rows, 1, seen) * mask[:, None]).float()
        for sums, slack in ((low, -group.slack), (high, group.slack)):
            roots = (square + slack).clamp_min_(0.0).sqrt_()
            sums.append(trusted_product(weight, roots.reshape(rows, seen, -1)).squeeze(1))
    number = mask.sum(1, keepdim=True)
    scale, centre = table.scale.double(), -table.offset.double()
    lower, upper = (spread_out(table, sums).double() * scale for sums in (low, high))
    shift = number * centre
    # The sum over tokens, the table's own numbers and the roots round in float32.
    rounding = (seen + 16) * FP32_UNIT * (upper + shift.abs())
    bounds = (0.5 * (lower + upper) - shift, lower - shift - rounding, upper - shift + rounding)
    if table.doubtful is None:
        return bounds
    exact = _plain(layer, flat, mask, None)
    return tuple(torch.where(table.doubtful, one, two) for one, two in zip(exact, bounds, strict=True))  # type: ignore[return-value]


def _plain(layer: RoutedLayer, flat: Tensor, mask: Tensor, permitted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same sums from the scorer's own scores, token by token."""
    scores = layer.scorer.scores(layer.factors, flat, permitted)
    value, lower, upper = (_summed(part.double(), mask) for part in (scores.value, scores.lower, scores.upper))
    return value, lower, upper


def _settled(layer: RoutedLayer, flat: Tensor, mask: Tensor, settle: Tensor) -> Tensor:
    """The sums of the wanted scores in float64 from the stored matrices; of the others, of no use."""
    assert layer.form is not None, "scores without bounds are never disputed"
    wanted = spread(settle, flat.shape[0]) & layer.eligible
    return _summed(
        settled(layer.factors, flat, torch.zeros(wanted.shape).double().to(flat.device), wanted, layer.form), mask
    )


def _summed(part: Tensor, mask: Tensor) -> Tensor:
    cube = part.reshape(*mask.shape, part.shape[1])
    return torch.where(mask[:, :, None] & (cube > -torch.inf), cube, 0.0).sum(1)
