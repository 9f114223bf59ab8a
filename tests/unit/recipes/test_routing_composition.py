"""`routing-composition`: where the answers are in a text of two, and a small study from end to end."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from treadle.configs.bench.routing_quality import RoutingCompositionRun
from treadle.configs.fleet import FleetSettings
from treadle.data.prompts import Example
from treadle.recipes.bench.result import finished_runs
from treadle.recipes.bench.routing_composition import question, quick_routing_composition, routing_composition


@pytest.fixture
def config(tiny_fleet: FleetSettings) -> RoutingCompositionRun:
    return RoutingCompositionRun(
        seeds=(0, 1, 2), tasks=("chain_sum", "syllogism"), limit=1, top_k=(1, 2), temperature=0.5, fleet=tiny_fleet
    )


def test_both_answers_are_marked_and_nothing_else(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    asked = question(tiny_tokenizer, Example("the film is", " good"), Example("a question is", " bad"))
    ids = asked.ids[0]
    said = tiny_tokenizer.decode(ids[asked.answer])
    assert said.split() == ["good", "bad"]
    assert tiny_tokenizer.decode(ids[asked.asked :]).split() == ["bad"]


def test_a_study_from_end_to_end_and_resumed(config: RoutingCompositionRun, tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    result = routing_composition(config, runs=runs, work=tmp_path / "work")
    arms = {row["arm"] for row in result.rows}
    assert {"base", "first alone", "second alone", "pair", "token, top 1", "sequence, top 2", "evidence, top 2"} <= arms
    assert all(row["seeds"] == 3 for row in result.rows)
    rows = [row for run in finished_runs(runs) for row in run["rows"]]  # type: ignore[attr-defined]
    for row in rows:
        assert row["nll"] > 0.0
    again = routing_composition(config, runs=runs, work=tmp_path / "gone")
    assert again.metrics == result.metrics


def test_the_quick_study_decides_nothing(config: RoutingCompositionRun, tmp_path: Path) -> None:
    result = quick_routing_composition(config, work=tmp_path / "quick")
    assert all(metric.goal is None for metric in result.metrics.values())
