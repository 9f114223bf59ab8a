"""`routing-quality`: shares and leads from recorded verdicts, and a small study from end to end."""

import json
from pathlib import Path

import pytest

from treadle.configs.bench.routing_quality import ArmGroup, RoutingQualityRun
from treadle.configs.fleet import FleetSettings
from treadle.errors import InputError
from treadle.recipes.bench.result import finished_runs
from treadle.recipes.bench.routing_quality import quick_routing_quality, routing_quality, summary
from treadle.toml import load_toml

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
TASKS = ("chain_sum", "syllogism")


@pytest.fixture
def config(tiny_fleet: FleetSettings) -> RoutingQualityRun:
    groups = (
        ArmGroup(name="ours", arms=("base", "oracle", "sequence", "linear")),
        ArmGroup(name="own", arms=("token",), calibration="own"),
        ArmGroup(name="absent", arms=("base", "sequence"), absent=True),
    )
    return RoutingQualityRun(
        seeds=(0, 1, 2),
        tasks=TASKS,
        asked=TASKS,
        limit=5,
        conditions=("trained", "paraphrase", "bare"),
        least_gain=0.1,
        resamples=200,
        groups=groups,
        fleet=tiny_fleet,
    )


def run(seed: int, **arms: str) -> dict[str, object]:
    """A recorded run in which these arms answered so, in every form of both tasks."""
    cells = [
        {"task": task, "condition": condition, "arm": arm, "right": right}
        for task in TASKS
        for condition in ("trained", "paraphrase", "bare")
        for arm, right in arms.items()
    ]
    return {"group": "ours", "seed": seed, "adapters": list(TASKS), "cells": cells}


def test_a_share_is_of_the_way_from_the_base_to_the_reference(config: RoutingQualityRun) -> None:
    runs = [run(seed, base="1000", oracle="1111", linear="1110", sequence="1100") for seed in (0, 1, 2)]
    result = summary(config, runs)
    assert result.metrics["oracle_share_trained_form"].value == pytest.approx(1 / 3)
    assert result.metrics["oracle_share_trained_form"].holds is False
    assert result.metrics["linear_share_bare_text"].value == pytest.approx(1 / 2)
    rows = {(row["condition"], row["arm"]): row for row in result.rows if row["task"] == "(mean)"}
    lead = rows["bare", "linear"]
    assert lead["lead"] == pytest.approx(-0.25)
    assert lead["lead_low"] <= lead["lead"] <= lead["lead_high"]  # type: ignore[operator]


def test_pairs_are_kept_together_by_the_bootstrap(config: RoutingQualityRun) -> None:
    """Two arms with equal answers lead by nothing in every resample, however their accuracy varies."""
    runs = [run(seed, base="0000", oracle="1111", linear="1010", sequence="1010") for seed in (0, 1, 2)]
    rows = {(row["condition"], row["arm"]): row for row in summary(config, runs).rows if row["task"] == "(mean)"}
    assert (rows["trained", "linear"]["lead_low"], rows["trained", "linear"]["lead_high"]) == (0.0, 0.0)
    assert rows["trained", "linear"]["low"] < rows["trained", "linear"]["high"]  # type: ignore[operator]


def test_a_missing_seed_decides_nothing(config: RoutingQualityRun) -> None:
    runs = [run(seed, base="1000", oracle="1111", linear="1110", sequence="1111") for seed in (0, 1)]
    assert all(metric.holds is None for metric in summary(config, runs).metrics.values())


def test_a_task_that_its_adapter_hardly_helps_does_not_count(config: RoutingQualityRun) -> None:
    runs = [run(seed, base="1000", oracle="1100", linear="1000", sequence="1100") for seed in (0, 1, 2)]
    for each in runs:
        for cell in each["cells"]:  # type: ignore[attr-defined]
            if cell["task"] == "syllogism":
                cell["right"] = "1111"
    result = summary(config, runs)
    assert result.settings["counted"] == ["chain_sum"]
    assert result.metrics["oracle_share_trained_form"].value == pytest.approx(1.0)


def test_a_study_from_end_to_end_and_resumed(config: RoutingQualityRun, tmp_path: Path) -> None:
    small: dict[str, object] = {"least_gain": -1.0, "limit": 2, "conditions": ("trained",)}
    runs, short = tmp_path / "runs.jsonl", config.model_copy(update=small)
    result = routing_quality(short, runs=runs, work=tmp_path / "work", data=tmp_path)
    stored = list(finished_runs(runs))
    assert [(row["group"], row["seed"]) for row in stored] == [
        (group.name, seed) for group in config.groups for seed in config.seeds
    ]
    cells = [cell for row in stored for cell in row["cells"]]  # type: ignore[attr-defined]
    assert {cell["arm"] for cell in cells} == {
        "base", "oracle", "sequence", "linear", "token", "base, absent", "sequence, absent",
    }  # fmt: skip
    assert all(len(cell["right"]) == 2 for cell in cells)
    for cell in cells:
        if cell["arm"] == "sequence, absent":  # the bank of the run is numbered without the task's own adapter
            assert set(cell["chosen"]) <= {-1, 0}
    assert all(row["public_overlap"] == 0.0 for row in stored)
    before = runs.read_bytes()
    again = routing_quality(short, runs=runs, work=tmp_path / "gone", data=tmp_path)
    assert runs.read_bytes() == before
    assert json.dumps(again.to_json()["metrics"]) == json.dumps(result.to_json()["metrics"])


def test_the_quick_study_decides_nothing(config: RoutingQualityRun, tmp_path: Path) -> None:
    result = quick_routing_quality(config, work=tmp_path / "quick")
    assert all(metric.holds is None for metric in result.metrics.values())
    assert {row["arm"] for row in result.rows} == {"base", "oracle", "sequence", "linear"}


def test_without_data_it_says_what_is_missing(config: RoutingQualityRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data DIR"):
        routing_quality(config, runs=tmp_path / "runs.jsonl", work=tmp_path, data=None)


def test_the_shipped_study_asks_tasks_that_have_an_adapter() -> None:
    shipped = load_toml(BENCHMARKS / "routing-quality.toml", RoutingQualityRun)
    assert set(shipped.asked) <= set(shipped.tasks)
    assert len(shipped.asked) >= 6
