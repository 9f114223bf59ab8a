"""Letting chosen adapters act on the tokens of one layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
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

    def among(self, adapters: list[int]) -> "_Pairs":
        """The pairs of these adapters."""
        kept = torch.isin(self.adapter, torch.tensor(adapters, device=self.adapter.device))
        return _Pairs(self.token[kept], self.adapter[kept], None if self.weight is None else self.weight[kept])


def _pairs(chosen: Mixture) -> _Pairs:
    token = torch.arange(chosen.adapter.shape[0], device=chosen.adapter.device)
    weight = None if chosen.weight is None else chosen.weight.flatten()
    return _Pairs(token.repeat_interleave(chosen.adapter.shape[1]), chosen.adapter.flatten(), weight)


def act(pool: MatrixPool, latents: Latents, chosen: Mixture) -> Float[Tensor, "tokens outer"] | None:
    """What the chosen adapters add: Σ weight · B · A · x in float32, None where only the base acts."""
    present = torch.unique(chosen.adapter).tolist()
    adapters = [place for place in present if place in latents]  # the others lack this layer, or are the base
    if not adapters:
        return None
    pool.wins.update(adapters)
    if len(present) == 1 and chosen.weight is None:
        with pool.rows(adapters) as (rows, slots):
            return _alone(rows[slots[adapters[0]] * pool.rank :], latents.of(adapters[0]))
    pairs = _pairs(chosen)
    result = torch.zeros(chosen.adapter.shape[0], pool.out, device=chosen.adapter.device)
    for start in range(0, len(adapters), pool.slots):
        wave = adapters[start : start + pool.slots]
        mine = pairs if wave == present else pairs.among(wave)
        # Many tokens an adapter: a product each. Few: one kernel that gathers rows and copies nothing.
        add = _add_gathered if len(wave) * 4 > mine.token.shape[0] and not torch.is_grad_enabled() else _add_grouped
        with pool.rows(wave) as (rows, slots):
            add(result, mine, rows, {place: slots[place] * pool.rank for place in wave}, latents)
    return result


def _alone(rows: Float[Tensor, "rows outer"], z: Float[Tensor, "tokens rank"]) -> Float[Tensor, "tokens outer"]:
    """One adapter, whose rows come first, on all tokens."""
    B = rows[: z.shape[1]]
    return z @ (B.clone() if torch.is_grad_enabled() else B)  # a slot may be refilled before a backward pass


def _add_grouped(result: Tensor, pairs: _Pairs, rows: Tensor, first: Mapping[int, int], latents: Latents) -> None:
    """Add the pairs' contributions, adapter by adapter."""
    for adapter, row in first.items():
        mine = (pairs.adapter == adapter).nonzero().flatten()
        token = pairs.token[mine]
        added = _alone(rows[row:], latents.of(adapter)[token])
        result.index_add_(0, token, added if pairs.weight is None else added * pairs.weight[mine, None])


def _add_gathered(result: Tensor, pairs: _Pairs, rows: Tensor, first: Mapping[int, int], latents: Latents) -> None:
    """Add the pairs' contributions, all at once: each is the sum of its adapter's rows weighted by z."""
    device = rows.device
    starts = torch.zeros(max(first) + 1, dtype=torch.long, device=device)
    starts[torch.tensor(list(first), device=device)] = torch.tensor(list(first.values()), device=device)
    z = latents.gathered(pairs.token, pairs.adapter)
    if pairs.weight is not None:
        z = z * pairs.weight[:, None]
    places = starts[pairs.adapter][:, None] + torch.arange(z.shape[1], device=device)
    result.index_add_(0, pairs.token, embedding_bag(places, rows, per_sample_weights=z, mode="sum"))
