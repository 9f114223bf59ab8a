"""The search finds what float64 over every adapter finds, scores few, and is deaf to forbidden adapters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treadle.algebra import packed_gram
from treadle.errors import InputError
from treadle.routing.decision import BASE, TIE
from treadle.routing.search import ScoreIndex, _Walk, build_index, search


class Bank:
    """Random adapters with what the index is made of and the definition of their scores."""

    def __init__(self, Bs: Tensor, std: Tensor, mean: Tensor) -> None:
        self.Bs, self.std, self.mean = Bs, std, mean
        norms = torch.linalg.matrix_norm(Bs)
        unit = Bs / torch.where(norms > 0, norms, 1.0)[:, None, None]
        self.grams = torch.stack([packed_gram(B) for B in unit]).float()
        self.scales, self.centres = norms / std, mean / std

    def index(self, sample: Tensor) -> ScoreIndex:
        return build_index(self.grams, self.scales, self.centres, sample)

    def scores(self, z: Tensor, places: list[int] | None = None) -> Tensor:
        chosen = slice(None) if places is None else torch.tensor(places)
        return (torch.linalg.vector_norm(self.Bs[chosen] @ z, dim=1) - self.mean[chosen]) / self.std[chosen]

    def winner(self, z: Tensor, permitted: Tensor) -> int:
        value = self.scores(z).masked_fill(~permitted, -torch.inf)
        best = float(value.max())
        near = value >= best - TIE * max(1.0, abs(best))
        return int(near.nonzero()[0, 0]) if best > -torch.inf else BASE

    def settle(self, z: Tensor):
        return lambda places: self.scores(z, list(places)).tolist()


def bank(seed: int, count: int, rank: int, spread: float) -> Bank:
    """Adapters of falling spectra whose sizes differ by 10^±spread; the sixth part repeats others, one B is zero."""
    g = torch.Generator().manual_seed(seed)
    Bs = torch.randn(count, rank + 2, rank, generator=g, dtype=torch.float64)
    Bs = Bs * torch.exp(-torch.rand(count, 1, 1, generator=g) * torch.arange(rank)).double()
    Bs = Bs @ torch.linalg.qr(torch.randn(count, rank, rank, generator=g, dtype=torch.float64)).Q
    size = 10.0 ** (spread * (2.0 * torch.rand(count, generator=g, dtype=torch.float64) - 1.0))
    Bs = Bs * size[:, None, None]
    std = torch.linalg.matrix_norm(Bs) * (0.2 + torch.rand(count, generator=g, dtype=torch.float64))
    mean = std * 4.0 * torch.rand(count, generator=g, dtype=torch.float64)
    for place in range(0, count - 1, 6):
        twin = place + 1
        Bs[twin], std[twin], mean[twin] = Bs[place], std[place], mean[place]
    Bs[-1] = 0.0
    return Bank(Bs, std, mean)


def draw(seed: int, rows: int, rank: int) -> Tensor:
    """Latent inputs with a mean and unequal directions."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank, rank, generator=g, dtype=torch.float64)
    return torch.randn(rows, rank, generator=g, dtype=torch.float64) @ mix + 2.0 * mix[0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 300),
    rank=st.integers(1, 8),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    size=st.sampled_from([1e-6, 0.1, 1.0, 30.0, 1e6]),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_the_winner_is_the_brute_forces(
    seed: int, count: int, rank: int, spread: float, size: float, share: float
) -> None:
    fleet = bank(seed, count, rank, spread)
    index = fleet.index(draw(seed, 40, rank))
    permitted = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share
    for z in draw(seed + 1, 3, rank) * size:  # as in the sample, and far from it
        found = search(index, z, permitted=permitted, settle=fleet.settle(z))
        assert found.winner == fleet.winner(z, permitted)
        if found.winner != BASE:
            # The score is the definition's own where it was disputed, else that of the float32 Gram.
            true = float(fleet.scores(z, [found.winner])[0])
            assert found.score == pytest.approx(true, rel=1e-5, abs=1e-5 * (1 + float(fleet.centres[found.winner])))


def test_all_are_permitted_unless_said_otherwise() -> None:
    fleet, everybody = bank(0, 200, 4, 0.0), torch.ones(200, dtype=torch.bool)
    index = fleet.index(draw(0, 40, 4))
    for z in draw(1, 10, 4):
        assert search(index, z) == search(index, z, permitted=everybody)
        assert search(index, z).winner == fleet.winner(z, everybody)


def test_few_are_scored_and_none_of_them_in_vain() -> None:
    fleet = bank(3, 5000, 8, 0.0)
    z = draw(3, 2000, 8)
    norms = torch.linalg.vector_norm(torch.einsum("nor,tr->tno", fleet.Bs, z[:300]), dim=2)
    fleet = Bank(fleet.Bs, norms.std(0).clamp_min(1e-3), norms.mean(0))
    index = fleet.index(z[:1000])
    scored = [search(index, row).scored for row in z[1000:1100]]
    assert np.median(scored) < 5000 / 50


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 8), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_bounds_of_adapters_and_blocks_are_never_below_the_score(seed: int, rank: int, size: float) -> None:
    fleet = bank(seed, 150, rank, 2.0)
    index = fleet.index(draw(seed, 40, rank))
    real = index.places >= 0
    for z in draw(seed + 1, 4, rank) * size:
        walk = _Walk(index, z.numpy(), None)
        heights = walk.heights()
        score = np.where(real, fleet.scores(z).numpy()[index.places], -np.inf).reshape(len(heights), -1)
        assert (walk.reaches(np.arange(len(heights))) >= score).all()
        assert (heights >= score.max(1)).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e300, 1e30, 0.0, -1.0])
def test_what_forbidden_adapters_hold_changes_nothing(poison: float) -> None:
    clean = bank(5, 400, 4, 1.0)
    permitted = torch.arange(400) % 3 > 0
    sample = draw(5, 40, 4)
    queries = draw(6, 20, 4)
    before = clean.index(sample)
    expected = [search(before, z, permitted=permitted, settle=clean.settle(z)) for z in queries]
    for field in ("grams", "scales", "centres"):
        dirty = bank(5, 400, 4, 1.0)
        column = getattr(dirty, field)
        column[~permitted] = torch.tensor(poison, dtype=torch.float64).to(column.dtype)  # inf where float32 ends
        index = dirty.index(sample)
        for z, found in zip(queries, expected, strict=True):
            again = search(index, z, permitted=permitted, settle=clean.settle(z))
            assert (again.winner, again.score) == (found.winner, found.score)


def test_nobody_is_the_base() -> None:
    index = bank(0, 10, 3, 0.0).index(draw(0, 10, 3))
    found = search(index, torch.ones(3, dtype=torch.float64), permitted=torch.zeros(10, dtype=torch.bool))
    assert (found.winner, found.score) == (BASE, -np.inf)


def test_a_permitted_adapter_without_a_score_is_never_chosen() -> None:
    fleet = bank(1, 60, 3, 0.0)
    fleet.scales[:30] = torch.nan
    index = fleet.index(draw(1, 20, 3))
    alone = torch.arange(60) < 30
    assert search(index, torch.ones(3, dtype=torch.float64), permitted=alone).winner == BASE
    assert search(index, torch.ones(3, dtype=torch.float64)).winner >= 30


def test_disputes_are_settled_by_the_stored_matrices() -> None:
    fleet = bank(2, 40, 3, 0.0)
    z = draw(2, 1, 3)[0]
    winner = fleet.winner(z, torch.ones(40, dtype=torch.bool))
    # A twin that is better by less than float32 tells, but by more than a tie: only B itself knows.
    twin = 39
    fleet.Bs[twin] = fleet.Bs[winner] * (1.0 + 4e-6)
    fleet.std[twin], fleet.mean[twin] = fleet.std[winner], fleet.mean[winner]
    fleet.grams[twin] = fleet.grams[winner]
    fleet.scales[twin], fleet.centres[twin] = fleet.scales[winner] * (1.0 + 1e-8), fleet.centres[winner]
    index = fleet.index(draw(2, 20, 3))
    assert search(index, z, settle=fleet.settle(z)).winner == fleet.winner(z, torch.ones(40, dtype=torch.bool))


@pytest.mark.parametrize(
    ("grams", "sample"),
    [
        (torch.zeros(0, 6), torch.ones(2, 3)),
        (torch.zeros(4, 6), torch.zeros(2, 3)),
        (torch.zeros(4, 5), torch.ones(2, 3)),
    ],
)
def test_an_index_needs_adapters_and_a_sample_of_their_rank(grams: Tensor, sample: Tensor) -> None:
    column = torch.ones(grams.shape[0], dtype=torch.float64)
    with pytest.raises(InputError, match="no adapters, no sample, or ranks that differ"):
        build_index(grams, column, column, sample)
