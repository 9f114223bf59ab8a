"""Letting chosen adapters act on the tokens of one layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from treadle.routing.decision import BASE, Mixture
from treadle.routing.latents import Latents
from treadle.routing.pool import MatrixPool


def mixture(scores: Float[Tensor, "tokens adapters"], best: int, temperature: float = 1.0) -> Mixture:
    """The `best` highest scores of each token (0: all), weighted by their softmax; -inf never acts."""
    count = scores.shape[1] if best == 0 else min(best, scores.shape[1])
    top, adapter = scores.topk(count, dim=1)
    there = top > -torch.inf
    weight = torch.where(there.any(1, keepdim=True), (top / temperature).softmax(1), 0.0)
    return Mixture(torch.where(there, adapter, BASE), torch.where(there, weight, 0.0).float())


@dataclass(frozen=True)
class _Pairs:
    """Adapters that act on tokens, one pair a row."""

    token: Int[Tensor, " pairs"]
    adapter: Int[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"] | None

    def where(self, kept: Bool[Tensor, " pairs"]) -> "_Pairs":
        """Some of the pairs."""
        return _Pairs(self.token[kept], self.adapter[kept], None if self.weight is None else self.weight[kept])


def act(pool: MatrixPool, latents: Latents, chosen: Mixture) -> Float[Tensor, "tokens outer"] | None:
    """What the chosen adapters add: Σ weight · B · A · x in float32, None where only the base acts."""
    tokens = chosen.adapter.shape[0]
    only = _only(chosen)
    if only is not None:
        return act_alone(pool, latents, only, tokens)
    pairs = _pairs(chosen, latents)
    if pairs.token.shape[0] == 0:
        return None
    np.add.at(pool.wins, pairs.adapter.cpu().numpy(), 1)
    if (
        pairs.token.shape[0] == tokens
        and chosen.adapter.shape[1] == 1
        and tokens <= pool.slots
        and not torch.is_grad_enabled()
    ):
        with pool.lock:  # every token has one adapter: what is gathered is the result
            return _gathered(pairs, pool, latents)
    result = torch.zeros(tokens, pool.out, device=chosen.adapter.device)
    add = _add_grouped if torch.is_grad_enabled() or chosen.adapter.shape[1] > MANY else _add_gathered
    for mine in _waves(pairs, pool.slots):
        with pool.lock:
            add(result, mine, pool, latents)
    return result


def act_alone(pool: MatrixPool, latents: Latents, adapter: int, tokens: int) -> Float[Tensor, "tokens outer"] | None:
    """B·A·x of one adapter for every token, None for the base, and where the adapter lacks the layer."""
    if adapter not in latents:
        return None
    with pool.lock:
        pool.wins[adapter] += tokens
        return _times(pool.rows_of(adapter), latents.of(adapter))


MANY = 16
"""Adapters a token above which each adapter's own product is cheaper than gathering its rows for every token."""


def _only(chosen: Mixture) -> int | None:
    """The one adapter (or the base) that acts alone on every token; None where there is none such."""
    if chosen.weight is not None or chosen.adapter.shape[0] == 0:
        return None
    if chosen.adapter.shape[0] > 1 and not bool((chosen.adapter == chosen.adapter[0]).all()):
        return None
    return int(chosen.adapter[0, 0])


def _pairs(chosen: Mixture, latents: Latents) -> _Pairs:
    """All pairs but those of the base and of adapters that lack the layer."""
    token = torch.arange(chosen.adapter.shape[0], device=chosen.adapter.device)
    weight = None if chosen.weight is None else chosen.weight.flatten()
    pairs = _Pairs(token.repeat_interleave(chosen.adapter.shape[1]), chosen.adapter.flatten(), weight)
    there = (pairs.adapter >= 0) & latents.present[pairs.adapter]
    return pairs if bool(there.all()) else pairs.where(there)


def _waves(pairs: _Pairs, slots: int) -> Iterator[_Pairs]:
    """The pairs, in parts of no more adapters than there are slots."""
    if pairs.token.shape[0] <= slots or len(distinct := torch.unique(pairs.adapter)) <= slots:
        yield pairs
        return
    for some in distinct.split(slots):
        yield pairs.where(torch.isin(pairs.adapter, some))


def _times(rows: Float[Tensor, "rows outer"], z: Float[Tensor, "tokens rank"]) -> Float[Tensor, "tokens outer"]:
    """B z of every token for the adapter whose rows come first."""
    B = rows[: z.shape[1]]
    return z @ (B.clone() if torch.is_grad_enabled() else B)  # a slot may be refilled before a backward pass


def _gathered(pairs: _Pairs, pool: MatrixPool, latents: Latents) -> Float[Tensor, "pairs outer"]:
    """Each pair's contribution, the sum of its adapter's rows weighted by z, in one kernel that copies nothing."""
    z = latents.gathered(pairs.token, pairs.adapter)
    if pairs.weight is not None:
        z = z * pairs.weight[:, None]
    places = pool.first_rows(pairs.adapter)[:, None] + torch.arange(z.shape[1], device=z.device)
    return embedding_bag(places, pool.rows, per_sample_weights=z, mode="sum")


def _add_gathered(result: Tensor, pairs: _Pairs, pool: MatrixPool, latents: Latents) -> None:
    """Add the pairs' contributions, all at once."""
    result.index_add_(0, pairs.token, _gathered(pairs, pool, latents))


def _add_grouped(result: Tensor, pairs: _Pairs, pool: MatrixPool, latents: Latents) -> None:
    """Add the pairs' contributions, adapter by adapter."""
    for adapter in torch.unique(pairs.adapter).tolist():
        mine = (pairs.adapter == adapter).nonzero().flatten()
        token = pairs.token[mine]
        added = _times(pool.rows[int(pool.first_rows(pairs.adapter[mine[:1]])) :], latents.of(adapter)[token])
        result.index_add_(0, token, added if pairs.weight is None else added * pairs.weight[mine, None])
