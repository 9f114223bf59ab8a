"""`routing-ranks`: cosines are those of whole updates, shares those of recorded verdicts, and a fleet grows a rank."""

from pathlib import Path

import pytest
import torch

from treadle.configs.bench.routing_quality import RoutingQualityRun, RoutingRanksRun
from treadle.configs.fleet import FleetSettings
from treadle.recipes.bench import routing_ranks as subject
from treadle.recipes.bench.result import finished_runs
from treadle.recipes.bench.routing_ranks import routing_ranks, summary, update_cosines
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank

TASKS = ("chain_sum", "syllogism")
CONFIG = RoutingRanksRun(ranks=(2, 3), seed=0, limit=2)


def brute_force(bank: AdapterBank) -> list[list[float]]:
    """The cosines of updates that are written out."""
    whole = [
        torch.cat([(B.double() @ bank.family.lora_A[m].double()).flatten() for m, B in adapter.folded().items()])
        for adapter in bank.adapters
    ]
    return [[float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for b in whole] for a in whole]


def test_a_fleet_is_grown_a_rank_and_asked(tiny_fleet: FleetSettings, tmp_path: Path) -> None:
    quality = RoutingQualityRun.model_validate(
        {
            "seeds": (0, 1, 2), "tasks": TASKS, "asked": TASKS, "limit": 5, "conditions": ("trained",),
            "least_gain": 0.1, "resamples": 200, "groups": ({"name": "ours", "arms": ("base",)},), "fleet": tiny_fleet,
        }
    )  # fmt: skip
    runs, work = tmp_path / "runs.jsonl", tmp_path / "work"
    result = routing_ranks(CONFIG, quality, runs=runs, work=work, data=tmp_path)
    assert [row["rank"] for row in result.rows if "condition" in row] == [2, 3]
    assert (work / "quality-0" / "bank").exists()  # the rank of the quality study, where that study keeps it
    bank = load_bank(work / "rank-3" / "quality-0" / "bank")
    assert {row.rank for row in bank.family.plan.modules.values()} == {3}
    found = list(finished_runs(runs))[1]["cosines"]
    assert found == [pytest.approx(row) for row in brute_force(bank)]
    assert found == [pytest.approx(row) for row in update_cosines(bank)]
    recorded = runs.read_bytes()
    routing_ranks(CONFIG, quality, runs=runs, work=tmp_path / "gone", data=tmp_path)
    assert runs.read_bytes() == recorded


def test_relatedness_is_held_against_what_a_task_gains() -> None:
    names = ("a", "b", "c")
    verdicts = {"base": "0000", "oracle": "1111"}
    routed = {"a": "1111", "b": "1100", "c": "1000"}
    cells = [
        {"task": task, "condition": "trained", "arm": arm, "right": right}
        for task in names
        for arm, right in {**verdicts, subject.ROUTED: routed[task]}.items()
    ]
    cosines = [[1.0, 0.1, 0.2], [0.1, 1.0, 0.6], [0.2, 0.6, 1.0]]
    result = summary(CONFIG, [{"rank": 4, "cells": cells, "adapters": list(names), "cosines": cosines}])
    assert result.metrics["oracle_share_rank_4"].value == pytest.approx((1 + 0.5 + 0.25) / 3)
    by_task = {row["task"]: row for row in result.rows if "task" in row}
    assert [by_task[name]["relatedness"] for name in names] == [0.2, 0.6, 0.6]
    assert by_task["b"]["lost_to_oracle"] == pytest.approx(0.5)
    # ranks of relatedness 1, 2.5, 2.5 and of gains 3, 2, 1: covariance -1.5 over √1.5·√2
    assert result.metrics["relatedness_with_gain"].value == pytest.approx(-1.5 / 3**0.5)
    # and of losses 1, 2, 3
    assert result.metrics["relatedness_with_loss"].value == pytest.approx(1.5 / 3**0.5)
