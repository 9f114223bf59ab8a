"""A small fixed bank decides as rational arithmetic does (`make_routing.py` made the values)."""

import json
from pathlib import Path

import pytest
import torch

from treadle import randomness
from treadle.family.adapter import Adapter, Provenance
from treadle.family.plan import LayerShape, RankPlan
from treadle.routing.decision import decide
from treadle.routing.factors import LayerFactors, build_factors, calibrated
from treadle.routing.scorers import SCORERS

GOLDEN = json.loads(Path(__file__).with_name("routing.json").read_text(encoding="utf-8"))


def grid(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.from_numpy(randomness.uniform(7, name, shape) * 64).floor() - 32).float() / 16


@pytest.fixture
def factors() -> LayerFactors:
    plan = RankPlan.uniform({"layer": LayerShape(12, 10)}, rank=4, scaling=1.0)
    A, Bs = grid("A", (4, 12)), [grid(f"B{i}", (10, 4)) for i in range(6)]
    Bs[4] = Bs[1]
    adapters = [
        Adapter(f"a{i}", plan, {"layer": A}, {"layer": B}, "0", None, Provenance("test")) for i, B in enumerate(Bs)
    ]
    mean, std = torch.tensor([20.0, 23, 26, 29, 23, 35]), torch.tensor([4.0, 4.5, 5, 5.5, 4.5, 6.5])
    return calibrated(build_factors("layer", adapters), {"mean": mean, "std": std})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["norm", "seqr", "seqr_without_1_and_4"])
def test_the_decisions(name: str, dtype: torch.dtype, factors: LayerFactors) -> None:
    x = grid("x", (40, 12)).to(dtype)  # multiples of 1/16 below 2: bfloat16 holds them exactly
    permitted = torch.tensor([True, False, True, True, False, True]).expand(40, -1) if "without" in name else None
    scorer = SCORERS[name.split("_")[0]]
    decision = decide(factors, x, scorer.scores(factors, x, permitted), scorer.form(factors) if scorer.form else None)
    assert decision.winner.tolist() == GOLDEN[name]
    assert len(set(GOLDEN[name])) >= 3


def test_the_scores(factors: LayerFactors) -> None:
    x = grid("x", (40, 12))[:1]
    for name, key in (("norm", "first_norms"), ("seqr", "first_scores")):
        assert SCORERS[name].scores(factors, x, None).value[0].tolist() == pytest.approx(GOLDEN[key], rel=1e-5)
