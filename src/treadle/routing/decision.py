"""The exact argmax: float32 scores with proven error bounds, disputed decisions settled in float64.

Order of work for every token: forbidden adapters are masked, then the best is taken, then every permitted adapter
whose upper bound reaches the best lower bound, or a tie with it, is scored again from its stored matrices. Ties go to
the adapter that stands first in the bank.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from treadle.routing.factors import LayerFactors, exact_norms
from treadle.routing.rows import spread
from treadle.routing.scores import NormScore, Scores

BASE = -1
"""The place of "no adapter": the base model alone."""

TIE = 1e-6
"""Two scores closer than this, relative to max(1, abs(score)), are a tie."""


@dataclass(frozen=True)
class Mixture:
    """Which adapters act on each token, and with what weight.

    Attributes:
        adapter: places in the bank, `BASE` for none.
        weight: None where a single adapter acts alone.
    """

    adapter: Int[Tensor, "tokens slots"]
    weight: Float[Tensor, "tokens slots"] | None

    @staticmethod
    def of(winner: Int[Tensor, " tokens"]) -> "Mixture":
        """One adapter a token, acting alone."""
        return Mixture(winner[:, None], None)

    def repeated(self, times: int) -> "Mixture":
        """Every row `times` times in a row."""
        weight = None if self.weight is None else self.weight.repeat_interleave(times, dim=0)
        return Mixture(self.adapter.repeat_interleave(times, dim=0), weight)

    def spread(self, tokens: int) -> "Mixture":
        """One row's adapters → those of each of its tokens."""
        weight = None if self.weight is None else spread(self.weight, tokens)
        return Mixture(spread(self.adapter, tokens), weight)

    def to(self, device: torch.device) -> "Mixture":
        """The same on another device."""
        return Mixture(self.adapter.to(device), None if self.weight is None else self.weight.to(device))

    def narrowed(self, permitted: Bool[Tensor, "tokens adapters"]) -> "Mixture":
        """The same without those who are not permitted; the weights of the others stay."""
        kept = permitted.gather(1, self.adapter.clamp_min(0))
        return Mixture(torch.where(kept, self.adapter, BASE), self.weight)


@dataclass(frozen=True)
class Decision:
    """Who acts on each token at one layer.

    Attributes:
        winner: place in the bank, `BASE` where no permitted adapter is eligible.
        runner_up: the second best permitted adapter, `BASE` where there is none.
        margin: winner's score minus the runner-up's, 0 where there is no runner-up.
        rescored: whether float64 settled it.
        together: who acts, where more than the winner may.
        chance: of the winner's score among public prompts, see `abstention`; None where nobody asked.
    """

    winner: Int[Tensor, " tokens"]
    runner_up: Int[Tensor, " tokens"]
    margin: Float[Tensor, " tokens"]
    rescored: Bool[Tensor, " tokens"]
    together: Mixture | None = None
    chance: Float[Tensor, " tokens"] | None = None

    @property
    def mixture(self) -> Mixture:
        """Who acts: the winner alone, unless more may."""
        return self.together or Mixture.of(self.winner)

    def replaced(self, rows: Int[Tensor, " few"], other: "Decision") -> "Decision":
        """These decisions of one winner each, those at `rows` taken from `other`."""
        return Decision(
            self.winner.index_copy(0, rows, other.winner),
            self.runner_up.index_copy(0, rows, other.runner_up),
            self.margin.index_copy(0, rows, other.margin),
            self.rescored.index_copy(0, rows, other.rescored),
        )

    def renamed(self, places: Int[Tensor, "tokens columns"]) -> "Decision":
        """The same, each token's columns being the adapters at these places in the bank."""

        def of(column: Tensor) -> Tensor:
            return torch.where(column == BASE, BASE, places.gather(1, column.clamp_min(0)[:, None]).squeeze(1))

        return Decision(of(self.winner), of(self.runner_up), self.margin, self.rescored)

    def repeated(self, times: int) -> "Decision":
        """Every decision `times` times in a row, as beams and candidates of one prompt need it."""
        return Decision(
            self.winner.repeat_interleave(times),
            self.runner_up.repeat_interleave(times),
            self.margin.repeat_interleave(times),
            self.rescored.repeat_interleave(times),
            None if self.together is None else self.together.repeated(times),
            None if self.chance is None else self.chance.repeat_interleave(times),
        )


def decide(factors: LayerFactors, x: Float[Tensor, "tokens inner"], scores: Scores, form: NormScore | None) -> Decision:
    """The argmax of the scores, exact: what float64 on the stored matrices would choose, ties by the bank's order.

    Args:
        factors: of the layer.
        x: the layer's input, as the layer got it.
        scores: of a scorer on the same x.
        form: of the scores; None where they are exact as computed.
    """
    value, rivals = scores.value, contenders(scores)
    disputed = rivals.sum(1) > 1
    if form is None:
        disputed = torch.zeros_like(disputed)
    elif bool(disputed.any()):
        value = settled(factors, x, value, rivals & disputed[:, None], form)
    return ranked(value, disputed)


def contenders(scores: Scores) -> Bool[Tensor, "tokens adapters"]:
    """Whose true score may be the best, or a tie with it, by the bounds alone."""
    best = scores.lower.max(1, keepdim=True).values
    # Twice the tie: what could be a tie with the winner is decided in float64 too.
    return (scores.upper >= best - 2.0 * TIE * best.abs().clamp_min(1.0)) & (scores.value > -torch.inf)


def best(value: Float[Tensor, "rows adapters"]) -> Int[Tensor, " rows"]:
    """The winner of each row of scores, `BASE` where all are -inf; ties go to the adapter that stands first."""
    most = value.max(1, keepdim=True).values
    near = value >= most - TIE * most.abs().clamp_min(1.0)
    winner = near.int().argmax(1)  # argmax of 0/1 is the first 1
    return torch.where(most.squeeze(1) > -torch.inf, winner, BASE)


def ranked(value: Float[Tensor, "rows adapters"], rescored: Bool[Tensor, " rows"]) -> Decision:
    """The decision for each row of scores: -inf never wins, and ties go to the adapter that stands first."""
    winner = best(value)
    first = winner.clamp_min(0)[:, None]
    second, runner_up = value.scatter(1, first, -torch.inf).max(1)
    there = second > -torch.inf
    margin = torch.where(there, value.gather(1, first).squeeze(1) - second, 0.0).clamp_min(0.0)
    return Decision(winner, torch.where(there, runner_up, BASE), margin.float(), rescored)


def settled(
    factors: LayerFactors,
    x: Float[Tensor, "tokens inner"],
    value: Float[Tensor, "tokens adapters"],
    rivals: Bool[Tensor, "tokens adapters"],
    form: NormScore,
) -> Float[Tensor, "tokens adapters"]:
    """The values with every rival's replaced by its float64 score, from the stored matrices."""
    value = value.clone()
    for adapter in rivals.any(0).nonzero().flatten().tolist():
        rows = rivals[:, adapter].nonzero().flatten()
        value[rows, adapter] = exact_norms(factors, adapter, x[rows]) / form.unit[adapter] - form.centre[adapter]
    return value
