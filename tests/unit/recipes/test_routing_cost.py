"""The benchmark of one layer: every arm really routes, and the ratios are those of the rows."""

import pytest
import torch

from treadle.configs.bench.routing_cost import LayerShapeRow, RoutingCostRun
from treadle.recipes.bench import peers
from treadle.recipes.bench import routing_cost as recipe
from treadle.recipes.bench.routing_cost import routing_cost

SHAPE = LayerShapeRow(inner=24, outer=20, rank=4)


def test_peers_and_treadle_choose_and_add_the_same() -> None:
    fleet = recipe._fleet(SHAPE, 6)
    x = torch.randn(30, 24)
    loop = peers.article_loop(fleet)(x)
    torch.testing.assert_close(recipe._ours(fleet)(x), loop, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(peers.batched_qr(fleet)(x), loop, rtol=1e-4, atol=1e-5)
    update = fleet.Bs[0] @ fleet.A
    torch.testing.assert_close(peers.single_lora(fleet)(x), fleet.base(x) + x @ update.T, rtol=1e-4, atol=1e-5)
    assert peers.peft_arrow(fleet)(x).shape == (30, 20)


def test_metrics_are_ratios_at_the_judged_shape_with_most_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(arms: object, inner: int, tokens: int, rounds: int) -> dict[str, float]:
        step = 10.0 * torch.get_num_threads() + tokens
        return {"linear": 1.0, "lora": step, "treadle": 2 * step, "peft_arrow": 90 * step}

    monkeypatch.setattr(recipe, "_seconds", seconds)
    monkeypatch.setattr(recipe, "_arms", lambda shape, count, *, arrow: {})
    config = RoutingCostRun(
        tokens=(1, 128),
        adapters=(8, 256, 1024),
        threads=(1, 2),
        rounds=1,
        most_of_arrow=1024,
        judged=SHAPE,
        shapes=(LayerShapeRow(inner=8, outer=8, rank=2), SHAPE),
    )
    result = routing_cost(config)
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert values == {
        "single_lora_ratio_n1024_t128": 2.0,
        "single_lora_ratio_n1024_t1": 2.0,
        "arrow_speedup_n256_t128": 45.0,
        "arrow_speedup_n1024_t128": 45.0,
        "growth_n8_n1024": 1.0,
    }
    assert [result.metrics[name].holds for name in values] == [False, False, True, False, True]
    assert len(result.rows) == 2 * 3 * 2 * 2


def test_a_quick_run_measures_and_decides_nothing() -> None:
    config = RoutingCostRun(
        tokens=(1, 128), adapters=(2,), threads=(1,), rounds=1, most_of_arrow=2, judged=SHAPE, shapes=(SHAPE,)
    )
    result = routing_cost(config, quick=True)
    assert all(
        metric.holds is None and metric.value > 0 for metric in result.metrics.values() if metric.value == metric.value
    )
    assert all(row["treadle"] > 0 and row["lora"] > 0 for row in result.rows)
