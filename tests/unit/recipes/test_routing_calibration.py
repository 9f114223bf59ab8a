"""`routing-calibration`: areas under curves, and a small study from end to end."""

from pathlib import Path

import pytest
import torch

from treadle.configs.bench.routing_quality import ArmGroup, PublicTextChoice, RoutingCalibrationRun, RoutingQualityRun
from treadle.configs.fleet import FleetSettings
from treadle.recipes.bench.result import finished_runs
from treadle.recipes.bench.routing_calibration import auroc, quick_routing_calibration, routing_calibration

TEXTS = (
    PublicTextChoice(name="prose", limit=24, words=8),
    PublicTextChoice(name="closed form", limit=6, words=8, method="analytic"),
)


@pytest.fixture
def quality(tiny_fleet: FleetSettings) -> RoutingQualityRun:
    tasks = ("chain_sum", "syllogism")
    return RoutingQualityRun(
        seeds=(0, 1, 2), tasks=tasks, asked=tasks, limit=4, conditions=("trained", "bare"), least_gain=0.1,
        resamples=100, groups=(ArmGroup(name="none", arms=("base",)),), fleet=tiny_fleet,
    )  # fmt: skip


@pytest.fixture
def config() -> RoutingCalibrationRun:
    return RoutingCalibrationRun(limit=3, outside=("family_relationships",), texts=TEXTS)


def test_the_area_counts_pairs() -> None:
    assert auroc(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])) == 1.0
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) == 0.5
    assert auroc(torch.tensor([0.0, 2.0]), torch.tensor([1.0])) == 0.5
    assert auroc(torch.tensor([0.0]), torch.tensor([1.0, 0.0])) == 0.25


def test_a_study_from_end_to_end_and_resumed(
    config: RoutingCalibrationRun, quality: RoutingQualityRun, tmp_path: Path
) -> None:
    runs = tmp_path / "runs.jsonl"
    result = routing_calibration(config, quality, runs=runs, work=tmp_path / "work", data=tmp_path)
    assert [(row["text"], row["condition"]) for row in result.rows] == [
        (text.name, condition) for text in TEXTS for condition in ("trained", "bare")
    ]
    by_text = {str(row["text"]): row for row in result.rows if row["condition"] == "trained"}
    assert 0.0 <= float(by_text["prose"]["auroc"]) <= 1.0  # type: ignore[arg-type]
    assert "auroc" not in by_text["closed form"]  # only public prompts have chances
    rows = [row for run in finished_runs(runs) for row in run["rows"]]  # type: ignore[attr-defined]
    assert {row["task"] for row in rows if "right_adapter" not in row} == {"family_relationships"}
    right = [row["right_adapter"] for row in rows if (row.get("text"), row["condition"]) == ("prose", "trained")
             and "right_adapter" in row]  # fmt: skip
    assert result.metrics["right_adapter_trained"].value == pytest.approx(sum(right) / len(right))
    again = routing_calibration(config, quality, runs=runs, work=tmp_path / "gone", data=tmp_path)
    assert again.metrics == result.metrics


def test_the_quick_study_decides_nothing(
    config: RoutingCalibrationRun, quality: RoutingQualityRun, tmp_path: Path
) -> None:
    result = quick_routing_calibration(config, quality, work=tmp_path / "quick")
    assert all(metric.holds is None for metric in result.metrics.values())
