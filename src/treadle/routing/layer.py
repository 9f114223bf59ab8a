"""One layer of a routed model: its factors, laid out once, and the lora_B at hand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from treadle.routing.blending import blended
from treadle.routing.decision import Decision, Mixture, decide
from treadle.routing.factors import LayerFactors
from treadle.routing.latents import Latents
from treadle.routing.mixture import act, act_alone, mixture
from treadle.routing.pool import MatrixPool
from treadle.routing.rows import Layout
from treadle.routing.scorers import Scorer
from treadle.routing.scores import NormScore
from treadle.routing.table import (
    ScoreTable,
    decision_of,
    latents_of,
    leaders,
    lone_winner,
    score_table,
    settled_by_grams,
    settled_leaders,
    values,
)


@dataclass(frozen=True)
class Composition:
    """How scores turn into action.

    Attributes:
        top_k: how many of the best permitted adapters act, 0 for all; 1 is the argmax.
        temperature: of the softmax that weighs them, above 0.
    """

    top_k: int
    temperature: float

    @property
    def mixes(self) -> bool:
        """Whether more than one adapter may act on a token."""
        return self.top_k != 1


@dataclass(frozen=True)
class Choice:
    """Who acts on each token, and the latents that scoring made on the way; `decision` where one adapter wins."""

    mixture: Mixture
    latents: Latents
    decision: Decision | None


class RoutedLayer(nn.Module):
    """One layer's factors and the lora_B it has used; moves between devices, never between dtypes."""

    layout: Layout | None
    """How the rows of a batch lie in what the layer sees; None where nobody can say."""

    def __init__(self, factors: LayerFactors, scorer: Scorer, *, slots: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.factors = scorer.prepare(factors)
        self.pool = MatrixPool(
            factors.folded_B,
            adapters=factors.present.shape[0],
            rank=factors.rank,
            out=factors.shape.out_features,
            slots=slots,
            device=factors.present.device,
        )
        self.layout: Layout | None = None
        self._lay_out()

    def _lay_out(self) -> None:
        form = None if self.scorer.form is None else self.scorer.form(self.factors)
        self.form: NormScore | None = form
        self.table: ScoreTable | None = None if form is None else score_table(self.factors, form)
        self.eligible: Tensor = self.scorer.eligible(self.factors) if form is None else form.eligible

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoutedLayer":
        """Follow the model to another device; scores stay in float32 when the model turns to bfloat16."""
        device = fn(torch.empty(0, device=self.factors.present.device)).device
        self.factors, self.pool = self.factors.to(device), self.pool.to(device)
        self._lay_out()
        return self

    def choose(
        self,
        x: Float[Tensor, "tokens inner"],
        permitted: Bool[Tensor, "tokens adapters"] | None,
        composition: Composition,
        *,
        explained: bool,
    ) -> Choice:
        """Who acts on each token by this layer's scores.

        Args:
            x: the layer's input.
            permitted: who may act on each token; None for everybody.
            composition: how scores turn into action.
            explained: whether a decision with margin and runner-up is wanted.
        """
        if composition.mixes or self.table is None or self.form is None:
            scores = self.scorer.scores(self.factors, x, permitted)
            latents = Latents(x, self.factors)
            if composition.mixes:
                return Choice(mixture(scores.value, composition.top_k, composition.temperature), latents, None)
            decision = decide(self.factors, x, scores, self.form)
            return Choice(Mixture.of(decision.winner), latents, decision)
        if x.shape[0] == 1 and not explained and (quick := lone_winner(self.table, x, permitted)) is not None:
            return Choice(Mixture.of(torch.tensor([quick], device=x.device)), Latents(x, self.factors), None)
        zs = latents_of(self.table, x)
        found = leaders(self.table, zs, permitted)
        winner, ready = found.winner, Latents(x, self.factors)
        decision = decision_of(self.table, found) if explained else None
        if found.doubtful.shape[0] == 0:
            return Choice(Mixture.of(winner), ready, decision)
        if not explained and (ends := settled_by_grams(self.factors, self.form, zs, found)) is not None:
            return Choice(Mixture.of(winner.index_copy(0, found.doubtful, ends)), ready, None)
        rows, settled, others = settled_leaders(self.factors, self.form, x, zs, found)
        winner = winner.index_copy(0, rows, settled.winner)
        decision = None if decision is None else decision.replaced(rows, settled)
        if others.shape[0] > 0:
            exact = self._settled(x, permitted, others)
            winner = winner.index_copy(0, others, exact.winner)
            decision = None if decision is None else decision.replaced(others, exact)
        return Choice(Mixture.of(winner), ready, decision)

    def _settled(self, x: Tensor, permitted: Tensor | None, rows: Tensor) -> Decision:
        """The exact decisions of the tokens that have too many rivals, or numbers that float32 cannot hold."""
        scores = self.scorer.scores(self.factors, x[rows], None if permitted is None else permitted[rows])
        return decide(self.factors, x[rows], scores, self.form)

    def scored(
        self, x: Float[Tensor, "tokens inner"], permitted: Bool[Tensor, "tokens adapters"] | None
    ) -> Float[Tensor, "tokens adapters"]:
        """The scores of the permitted, without bounds, to be summed; the others' and the ineligible's are of no use."""
        if self.table is not None:
            return values(self.table, x)
        value = self.scorer.scores(self.factors, x, permitted).value
        return torch.where(value > -torch.inf, value, 0.0)

    def added(self, x: Float[Tensor, "tokens inner"], choice: Choice) -> Float[Tensor, "tokens outer"] | None:
        """What the chosen adapters add to the layer's output, float32; None where only the base acts."""
        latents = choice.latents
        if self.scorer.blends and choice.mixture.weight is not None:
            latents = blended(self.factors, x, latents, choice.mixture)
        return act(self.pool, latents, choice.mixture)

    def added_alone(self, x: Float[Tensor, "tokens inner"], adapter: int) -> Float[Tensor, "tokens outer"] | None:
        """What one adapter adds to the layer's output for every token, float32; None where only the base acts."""
        return act_alone(self.pool, Latents(x, self.factors), adapter, x.shape[0])

    def acting(self, x: Float[Tensor, "tokens inner"], chosen: Mixture) -> Choice:
        """What was chosen elsewhere, as this layer's choice."""
        return Choice(chosen, Latents(x, self.factors), None)
