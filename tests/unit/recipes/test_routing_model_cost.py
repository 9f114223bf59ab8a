"""The benchmark of a whole model, on one with two blocks."""

from pathlib import Path

from treadle.configs.bench.routing_cost import RoutingModelCostRun
from treadle.recipes.bench.routing_model_cost import routing_model_cost


def test_every_granularity_is_timed_beside_one_adapter(small_fleet: Path) -> None:
    config = RoutingModelCostRun(
        base=str(small_fleet / "base"),
        rank=2,
        size=0.1,
        adapters=(1, 3),
        judged=3,
        granularities=("token", "evidence", "layer", "sequence"),
        tokens=6,
        prompts=2,
        rounds=1,
        memory=10**6,
    )
    result = routing_model_cost(config)
    assert [(row["adapters"], row["granularity"]) for row in result.rows] == [
        (count, kind) for count in (1, 3) for kind in config.granularities
    ]
    judged = [row for row in result.rows if row["adapters"] == 3]
    for phase in ("prefill", "decode"):
        expected = max(float(row[phase]) / float(row[f"lora_{phase}"]) for row in judged)  # type: ignore[arg-type]
        assert result.metrics[f"{phase}_ratio_n256"].value == expected
    assert all(row["chosen"] == 1 for row in result.rows if row["adapters"] == 1)
    assert any(row["chosen"] == 3 for row in result.rows if row["granularity"] == "token")
