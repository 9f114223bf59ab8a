"""A bank that grows: what old tasks lose is told apart from what their own adapter lost."""

from pathlib import Path

import pytest
import torch

from treadle.configs.bench.routing_quality import RoutingContinualRun
from treadle.configs.fleet import FleetSettings
from treadle.errors import ConfigError
from treadle.recipes.bench.routing_continual import (
    altered_numbers,
    quick_routing_continual,
    routing_continual,
    summary,
)
from treadle.recipes.fleet import grow_fleet
from treadle.toml import checked


@pytest.fixture
def config(tiny_fleet: FleetSettings, tmp_path: Path) -> RoutingContinualRun:
    """Three generated tasks of a few hundred tokens on a tiny base."""
    tasks = ("chain_sum", "syllogism", "family_relationships")
    return RoutingContinualRun(
        fleet=tiny_fleet.run(tasks, out=tmp_path / "fleet"),
        updated="syllogism",
        limit=3,
        quick_tasks=tasks[:2],
        quick_limit=2,
        quick_tokens=200,
    )


def row(step: int, task: str, accuracy: float, oracle: float, right: float) -> dict[str, object]:
    return {"step": step, "task": task, "accuracy": accuracy, "oracle": oracle, "right": right}


def test_what_the_oracle_lost_is_no_drop() -> None:
    rows = [
        row(0, "a", 0.9, 0.9, 1.0),
        row(1, "a", 0.8, 0.9, 0.9),
        row(1, "b", 0.7, 0.7, 1.0),
        row(2, "a", 0.88, 0.9, 0.97),
        row(2, "b", 0.4, 0.5, 0.9),  # replaced by a worse adapter: 0.3 lost, 0.2 of it by the oracle too
    ]
    found = summary(rows, 0)
    assert found["old_tasks_drop"].value == pytest.approx(0.1)
    assert found["old_tasks_right_drop"].value == pytest.approx(0.1)
    assert found["right_adapter_share_end"].value == pytest.approx((0.97 + 0.9) / 2)
    assert found["oracle_minus_routed_end"].value == pytest.approx((0.02 + 0.1) / 2)
    assert found["altered_numbers"].holds is True
    assert summary(rows[:1], 3)["altered_numbers"].holds is False
    worse = summary([*rows, row(3, "b", 0.0, 0.5, 0.9)], 0)
    assert worse["old_tasks_drop"].value == pytest.approx(0.5)


def test_a_bank_grows_step_by_step_and_is_updated(config: RoutingContinualRun) -> None:
    result = routing_continual(config)
    changes = list(dict.fromkeys(str(row["change"]) for row in result.rows))
    assert changes == [
        "begun with chain_sum",
        "added syllogism",
        "added family_relationships",
        "updated syllogism",
    ]
    assert [row["task"] for row in result.rows] == [
        "chain_sum",
        *("chain_sum", "syllogism"),
        *("chain_sum", "syllogism", "family_relationships") * 2,
    ]
    assert result.metrics["altered_numbers"].value == 0
    assert str(config.fleet.out) not in str(result.to_json())
    again = routing_continual(config)  # everything is reused, the second training included
    assert again.rows == result.rows
    assert (config.fleet.out / "updates" / "syllogism").exists()


def test_a_quick_study_decides_nothing(config: RoutingContinualRun) -> None:
    result = quick_routing_continual(config)
    assert all(metric.holds is None for metric in result.metrics.values())
    assert {row["task"] for row in result.rows} == {"chain_sum", "syllogism"}


def test_an_altered_bit_is_counted(config: RoutingContinualRun) -> None:
    bank = grow_fleet(config.fleet).bank
    assert altered_numbers(bank, bank, bank.names) == 0
    smaller = bank.remove("chain_sum")
    assert altered_numbers(smaller, bank, smaller.names) == 0
    assert bank.statistics is not None
    module = next(iter(bank.layers))
    bank.layers[module].groups[0].norms[1] = torch.nextafter(
        bank.layers[module].groups[0].norms[1], torch.tensor(torch.inf, dtype=torch.float64)
    )
    assert altered_numbers(smaller, bank, smaller.names) == 1


def test_the_updated_task_is_one_of_the_fleet(config: RoutingContinualRun) -> None:
    content = config.model_dump() | {"updated": "sst2"}
    with pytest.raises(ConfigError, match="which is none of fleet.tasks"):
        checked(content, RoutingContinualRun, where="run.toml")
