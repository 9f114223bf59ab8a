"""ARROW, SPECTR and LAG against float64 oracles that form the whole product B·A."""

import pytest
import torch
from torch import Tensor

from treadle.family.plan import LayerShape
from treadle.routing import blending
from treadle.routing.decision import Mixture
from treadle.routing.factors import Group, LayerFactors, calibrated
from treadle.routing.latents import Latents
from treadle.routing.scorers import SCORERS, lag, spectr

OUTER, INNER, TOKENS = 20, 16, 50


def layer(*, shared: int = 5, foreign: int = 2, seed: int = 0) -> tuple[LayerFactors, list[Tensor], list[Tensor]]:
    """A layer of adapters with one A of rank 4 and of foreign ones of rank 3, and every adapter's A and B, float64."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randn(4, INNER, generator=draw)
    As = [common] * shared + [torch.randn(3, INNER, generator=draw) for _ in range(foreign)]
    # Columns of unlike lengths, so that directions alone and scaled directions rank adapters differently.
    Bs = [torch.randn(OUTER, A.shape[0], generator=draw) * torch.tensor([3.0, 1.0, 0.3, 0.1])[: A.shape[0]] for A in As]
    groups = [Group(torch.arange(shared), common, torch.zeros(shared, 10), torch.ones(shared).double())]
    for place in range(shared, shared + foreign):
        groups.append(Group(torch.tensor([place]), As[place], torch.zeros(1, 6), torch.ones(1).double()))
    count = shared + foreign
    numbers = torch.ones(count, dtype=torch.float64)
    factors = LayerFactors(
        "layer", LayerShape(INNER, OUTER), tuple(groups), torch.ones(count, dtype=torch.bool), numbers, numbers, None,
        lambda place: Bs[place],
    )  # fmt: skip
    return factors, [A.double() for A in As], [B.double() for B in Bs]


def scored(name: str, factors: LayerFactors, x: Tensor, allowed: Tensor | None = None) -> Tensor:
    scorer = SCORERS[name]
    return scorer.scores(scorer.prepare(factors), x, allowed).value


def test_spectr_is_the_norm_of_what_the_adapter_does() -> None:
    factors, As, Bs = layer()
    x = torch.randn(TOKENS, INNER)
    truth = torch.stack([torch.linalg.vector_norm(x.double() @ (B @ A).T, dim=1) for A, B in zip(As, Bs, strict=True)])
    torch.testing.assert_close(scored("spectr", factors, x).double(), truth.T, rtol=1e-5, atol=1e-5)


def test_directions_without_their_lengths_would_not_tell_adapters_apart() -> None:
    """The trap of a shared A: ‖Vᵀx‖ is one number for all of them; SPECTR's score is not."""
    factors, _, _ = layer(foreign=0)
    prepared = spectr.prepare(factors)
    assert prepared.directions is not None
    x = torch.randn(TOKENS, INNER)
    units = torch.nn.functional.normalize(prepared.directions, dim=2)
    unscaled = torch.linalg.vector_norm(torch.einsum("nri,ti->tnr", units, x), dim=2)
    torch.testing.assert_close(unscaled, unscaled[:, :1].expand_as(unscaled), rtol=1e-4, atol=1e-4)
    spread = scored("spectr", factors, x)
    assert float((spread.max(1).values / spread.min(1).values).min()) > 1.05


def test_the_articles_factors_score_as_ours_do() -> None:
    factors, As, Bs = layer()
    mean, std = torch.rand(len(As)).double() + 1.0, torch.rand(len(As)).double() + 0.5
    factors = calibrated(factors, {"mean": mean, "std": std})
    x = torch.randn(TOKENS, INNER)
    norms = torch.stack([(x.double() @ A.T @ B.T).norm(dim=1) for A, B in zip(As, Bs, strict=True)], 1)
    # Float64 all along: what is left is the rounding of a product of the layer's width.
    torch.testing.assert_close(scored("seqr-qr", factors, x), (norms - mean) / std, rtol=1e-12, atol=1e-12)


def test_arrow_is_the_alignment_with_the_strongest_direction() -> None:
    factors, As, Bs = layer()
    x = torch.randn(TOKENS, INNER)
    strongest = [torch.linalg.svd(B @ A).Vh[0] for A, B in zip(As, Bs, strict=True)]
    truth = (x.double() @ torch.stack(strongest).T).abs()
    torch.testing.assert_close(scored("arrow", factors, x).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_lag_ranks_by_the_norm_whom_arrow_found_among_the_permitted(share: float) -> None:
    factors, As, Bs = layer(shared=9)
    x = torch.randn(TOKENS, INNER)
    allowed = torch.rand(TOKENS, 11) < share
    found = scored("lag", factors, x, allowed)
    for token in range(TOKENS):
        mine = allowed[token].nonzero().flatten().tolist()
        wide = {place: Bs[place] @ As[place] for place in mine}
        aligned = {place: abs(float(torch.linalg.svd(W).Vh[0] @ x[token].double())) for place, W in wide.items()}
        best = sorted(mine, key=lambda place, known=aligned: -known[place])[: lag.RETRIEVED]
        for place in range(11):
            expected = float(torch.linalg.vector_norm(wide[place] @ x[token].double())) if place in best else 0.0
            expected = expected if place in mine else -torch.inf
            assert float(found[token, place]) == pytest.approx(expected, rel=1e-5)
    if share == 1.0:  # else the ranking would be the norm's, and ARROW's part untested
        assert not torch.equal(found.argmax(1), scored("spectr", factors, x).argmax(1))


def test_mixed_parameters_are_sums_of_a_and_of_b() -> None:
    """(Σ w B)(Σ w A) x with lower ranks filled up by zeros; under one A, the mixed outputs."""
    factors, As, Bs = layer()
    x = torch.randn(TOKENS, INNER)
    adapter = torch.stack([torch.randperm(7)[:3] for _ in range(TOKENS)])
    weight = torch.rand(TOKENS, 3).softmax(1)
    latents = blending.blended(factors, x, Latents(x, factors), Mixture(adapter, weight))
    for token in range(TOKENS):
        A, B = torch.zeros(4, INNER).double(), torch.zeros(OUTER, 4).double()
        for place, w in zip(adapter[token].tolist(), weight[token].double(), strict=True):
            rank = As[place].shape[0]
            A[:rank] += w * As[place]
            B[:, :rank] += w * Bs[place]
        truth = B @ A @ x[token].double()
        z = [latents.of(place)[token].double() for place in adapter[token].tolist()]
        ours = sum(w * (Bs[p] @ part) for p, w, part in zip(adapter[token].tolist(), weight[token], z, strict=True))
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_under_one_a_mixing_parameters_is_mixing_outputs() -> None:
    factors, _, _ = layer(foreign=0)
    x = torch.randn(TOKENS, INNER)
    chosen = Mixture(torch.randint(5, (TOKENS, 3)), torch.rand(TOKENS, 3).softmax(1))
    own = Latents(x, factors)
    torch.testing.assert_close(blending.blended(factors, x, own, chosen).of(0), own.of(0), rtol=1e-5, atol=1e-5)
