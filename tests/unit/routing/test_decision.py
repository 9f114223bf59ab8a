"""The argmax on scores made by hand, mixtures, and the acting of what was chosen."""

from dataclasses import replace

import pytest
import torch

from treadle.family.adapter import Adapter, Provenance
from treadle.family.plan import LayerShape, RankPlan
from treadle.routing.decision import BASE, TIE, Mixture, decide, ranked
from treadle.routing.factors import (
    LayerFactors,
    build_factors,
    calibrated,
    exact_norms,
    scaled_norms,
    triangles,
)
from treadle.routing.latents import Latents
from treadle.routing.mixture import act, mixture
from treadle.routing.pool import MatrixPool
from treadle.routing.scorers import SCORERS, arrow, norm, seqr
from treadle.routing.scores import Scores

INF = torch.inf


def no(rows: int) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.bool)


def layer(count: int = 4, rank: int = 3, *, seed: int = 0) -> tuple[list[Adapter], LayerFactors]:
    generator = torch.Generator().manual_seed(seed)
    plan = RankPlan.uniform({"m": LayerShape(10, 12)}, rank=rank, scaling=0.5)
    A = {"m": torch.randn(rank, 10, generator=generator)}
    adapters = [
        Adapter(f"a{i}", plan, A, {"m": torch.randn(12, rank, generator=generator)}, "0", None, Provenance("test"))
        for i in range(count)
    ]
    return adapters, build_factors("m", adapters)


def test_ranking() -> None:
    value = torch.tensor(
        [[3.0, 1.0, 2.0], [-INF, -5.0, -INF], [-INF, -INF, -INF], [2.0, 2.0 + TIE / 2, 0.0], [2.0, 2.0 + 5 * TIE, 0.0]],
        dtype=torch.float64,
    )
    decision = ranked(value, no(5))
    assert decision.winner.tolist() == [0, 1, BASE, 0, 1]
    assert decision.runner_up.tolist() == [2, BASE, BASE, 1, 0]
    assert decision.margin[:3].tolist() == [1.0, 0.0, 0.0]
    assert decision.margin[3] == 0.0  # never negative, though the one that stands first had a little less
    assert decision.margin[4] == pytest.approx(5 * TIE, rel=1e-3)


def test_a_tie_is_relative_above_one() -> None:
    value = torch.tensor([[1e4, 1e4 + 5e-3], [1e4, 1e4 + 5e-2], [-1e4, -1e4 + 5e-3]], dtype=torch.float64)
    assert ranked(value, no(3)).winner.tolist() == [0, 1, 0]


def test_disputes_are_settled_by_the_stored_matrices() -> None:
    """Bounds so wide that they say nothing: float64 decides, whatever the values claim."""
    _, factors = layer()
    x = torch.randn(50, 10)
    norms = torch.stack([exact_norms(factors, i, x) for i in range(4)], 1)
    lying = -norms
    everything = Scores(lying, torch.full_like(norms, -1e9), torch.full_like(norms, 1e9))
    decision = decide(factors, x, everything, norm.form(factors))
    assert torch.equal(decision.winner, norms.argmax(1))
    assert decision.rescored.all()
    certain = Scores(lying, lying, lying)
    assert torch.equal(decide(factors, x, certain, norm.form(factors)).winner, norms.argmin(1))
    means = calibrated(factors, {"mean": norms.mean(0), "std": norms.std(0)})
    decision = decide(means, x, everything, seqr.form(means))
    assert torch.equal(decision.winner, ((norms - norms.mean(0)) / norms.std(0)).argmax(1))


def test_forbidden_adapters_are_not_even_rescored() -> None:
    _, factors = layer()

    def folded_B(adapter: int) -> torch.Tensor:
        assert adapter != 2
        return factors.folded_B(adapter)

    x = torch.randn(5, 10)
    permitted = torch.tensor([True, True, False, True]).expand(5, -1)
    scores = SCORERS["norm"].scores(factors, x, permitted)
    wide = replace(scores, lower=scores.lower - 1e3, upper=scores.upper + 1e3)
    decision = decide(replace(factors, folded_B=folded_B), x, wide, norm.form(factors))
    assert not (decision.winner == 2).any()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_four_ways_to_one_norm(rank: int) -> None:
    adapters, factors = layer(rank=rank)
    x = torch.randn(30, 10)
    value, lower, upper = scaled_norms(factors, x, torch.tensor([1.0, 2.0, 1.0, 1.0]).double())
    small = triangles(factors, factors.groups[0], range(4))
    for i, adapter in enumerate(adapters):
        update = adapter.folded_B("m").double() @ adapter.lora_A["m"].double()
        expected = (x.double() @ update.T).norm(dim=1)
        assert torch.allclose(exact_norms(factors, i, x), expected, rtol=1e-12)
        z = x.double() @ adapter.lora_A["m"].double().T
        assert torch.allclose((z @ small[i].T).norm(dim=1), expected, rtol=1e-12)
        scale = 2.0 if i == 1 else 1.0
        assert torch.allclose(value[:, i] * scale, expected, rtol=1e-4)
        assert (lower[:, i] * scale <= expected).all()
        assert (upper[:, i] * scale >= expected).all()


@pytest.mark.parametrize("setting", ["legacy", "new"])
def test_lowered_matmul_precision_does_not_lower_the_bounds(setting: str) -> None:
    """torch may be told to multiply in bfloat16; scores then take the product in float64."""
    _, factors = layer(count=16, rank=8)
    x = torch.randn(64, 10)
    units = torch.ones(16).double()
    exact = torch.stack([exact_norms(factors, i, x) for i in range(16)], 1)
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    try:
        if setting == "legacy":
            torch.set_float32_matmul_precision("medium")
        else:
            backend.fp32_precision = "bf16"
        value, lower, upper = scaled_norms(factors, x, units)
    finally:
        backend.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
    assert torch.allclose(value, exact, rtol=1e-5)
    assert (lower <= exact).all()
    assert (upper >= exact).all()


def test_prototypes_are_the_directions_that_grow_most() -> None:
    adapters, factors = layer()
    found = arrow.prepare(factors).directions
    assert found is not None
    for i, adapter in enumerate(adapters):
        expected = torch.linalg.svd(adapter.folded_B("m") @ adapter.lora_A["m"]).Vh[0]
        assert abs(float(found[i, 0] @ expected)) == pytest.approx(1.0, abs=1e-5)
    x = torch.randn(6, 10)
    scores = SCORERS["arrow"].scores(arrow.prepare(factors), x, None)
    assert torch.allclose(scores.value, (x @ found[:, 0].T).abs())


def test_mixtures() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0], [-INF, 1.0, -INF, -INF], [-INF] * 4])
    best = mixture(scores, 2)
    assert best.weight is not None
    assert best.adapter.tolist() == [[1, 2], [1, BASE], [BASE, BASE]]
    assert torch.allclose(best.weight[0], torch.tensor([3.0, 2.0]).softmax(0))
    assert best.weight[1:].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    every = mixture(scores, 0)
    assert every.adapter.shape == (3, 4)
    assert mixture(scores[:, :1], 3).adapter.shape == (3, 1)


def acted(factors: LayerFactors, x: torch.Tensor, chosen: Mixture, *, slots: int = 4) -> torch.Tensor | None:
    device = torch.device("cpu")
    pool = MatrixPool(
        factors.folded_B,
        adapters=factors.present.shape[0],
        rank=factors.rank,
        out=factors.shape.out_features,
        slots=slots,
        device=device,
    )
    return act(pool, Latents(x, factors), chosen)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("slots", [1, 4])
def test_acting(slots: int, gradients: bool) -> None:
    adapters, factors = layer()
    x = torch.randn(3, 10)
    updates = [a.folded_B("m") @ a.lora_A["m"] for a in adapters]
    torch.set_grad_enabled(gradients)
    alone = acted(factors, x, Mixture.of(torch.tensor([2, BASE, 0])), slots=slots)
    assert alone is not None
    assert torch.allclose(alone[0], updates[2] @ x[0], atol=1e-5)
    assert not alone[1].any()
    assert torch.allclose(alone[2], updates[0] @ x[2], atol=1e-5)
    weight = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    mixed = acted(factors, x, Mixture(torch.tensor([[0, 1], [3, BASE], [2, 3]]), weight), slots=slots)
    torch.set_grad_enabled(True)
    assert mixed is not None
    assert torch.allclose(mixed[0], (0.25 * updates[0] + 0.75 * updates[1]) @ x[0], atol=1e-5)
    assert torch.allclose(mixed[1], updates[3] @ x[1], atol=1e-5)
    assert acted(factors, x, Mixture.of(torch.full((3,), BASE))) is None
    assert acted(factors, x[:0], Mixture.of(torch.zeros(0, dtype=torch.long))) is None


def test_the_mean_divides_by_all_that_are_permitted() -> None:
    adapters, factors = layer()
    x = torch.randn(2, 10)
    permitted = torch.tensor([[True, True, False, False], [True, True, True, True]])
    chosen = mixture(SCORERS["mean"].scores(factors, x, permitted).value, 0)
    added = acted(factors, x, chosen)
    assert added is not None
    updates = torch.stack([a.folded_B("m") @ a.lora_A["m"] for a in adapters])
    assert torch.allclose(added[0], updates[:2].mean(0) @ x[0], atol=1e-5)
    assert torch.allclose(added[1], updates.mean(0) @ x[1], atol=1e-5)


def test_a_layer_no_permitted_adapter_has_is_left_to_the_base() -> None:
    _, factors = layer()
    nobody = torch.zeros(2, 4, dtype=torch.bool)
    for name in ("norm", "seqr", "mean"):
        scores = SCORERS[name].scores(factors, torch.randn(2, 10), nobody)
        assert (scores.value == -INF).all()
    decision = decide(factors, torch.randn(2, 10), scores, norm.form(factors))
    assert decision.winner.tolist() == [BASE, BASE]


def test_zero_tokens() -> None:
    _, factors = layer()
    x = torch.randn(0, 10)
    decision = decide(factors, x, SCORERS["norm"].scores(factors, x, None), norm.form(factors))
    assert decision.winner.shape == decision.margin.shape == (0,)


def test_not_a_number_is_left_to_the_base() -> None:
    _, factors = layer()
    x = torch.randn(2, 10)
    x[0, 0] = torch.nan
    decision = decide(factors, x, SCORERS["norm"].scores(factors, x, None), norm.form(factors))
    assert decision.winner[0] == BASE
    assert decision.winner[1] != BASE


def test_a_matrix_that_cannot_be_read_costs_nobody_a_slot() -> None:
    gone = {2}

    def load(adapter: int) -> torch.Tensor:
        if adapter in gone:
            raise OSError("gone")
        return torch.full((5, 2), adapter + 1.0)

    pool = MatrixPool(load, adapters=3, rank=2, out=5, slots=2, device=torch.device("cpu"))
    pool.prefetch([0, 1])
    for ask in (lambda: pool.rows_of(2), lambda: pool.first_rows(torch.tensor([2, 1]))):
        with pytest.raises(OSError, match="gone"):
            ask()
        assert [pool.rows_of(adapter).unique().tolist() for adapter in (0, 1)] == [[1.0], [2.0]]
        starts = pool.first_rows(torch.tensor([0, 1])).tolist()
        assert [pool.rows[start : start + 2].unique().tolist() for start in starts] == [[1.0], [2.0]]
    gone.clear()
    assert pool.rows_of(2).unique().tolist() == [3.0]
    assert [pool.rows_of(adapter).unique().tolist() for adapter in (0, 1)] == [[1.0], [2.0]]  # 2 goes again
