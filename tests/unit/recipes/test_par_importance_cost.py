"""The benchmark of importance: every arm passes over the samples, and ratios are within a round."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.bench.partition import ParImportanceCostRun
from treadle.recipes.bench.par_importance_cost import par_importance_cost, quick_par_importance_cost, summary
from treadle.recipes.bench.result import finished_runs, record_run
from treadle.toml import load_toml

CONFIGURATION = Path(__file__).parents[3] / "benchmarks" / "par-importance-cost.toml"


@pytest.fixture
def config(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> ParImportanceCostRun:
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    changes = {"base": str(tmp_path), "rank": 2, "samples": 5, "batch": 2, "rounds": 2}
    sizes = {"prompt_tokens": 3, "answer_tokens": 2}
    return load_toml(CONFIGURATION, ParImportanceCostRun).model_copy(update=changes | sizes)


@pytest.mark.parametrize("moves_A", [False, True])
def test_every_arm_of_every_round_is_timed(config: ParImportanceCostRun, tmp_path: Path, moves_A: bool) -> None:
    result = par_importance_cost(config.model_copy(update={"moves_A": moves_A}), runs=tmp_path / "runs.jsonl")
    assert [row["round"] for row in result.rows] == [1, 2]
    assert all(float(str(row[arm])) > 0 for row in result.rows for arm in ("plain", "element", "rank"))
    assert result.metrics["importance_over_fwdbwd"].holds is not None


def test_rounds_that_are_recorded_are_not_run_again(config: ParImportanceCostRun, tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    record_run(runs, {"round": 1, "plain": 1.0, "element": 9.0, "rank": 1.0})
    par_importance_cost(config, runs=runs)
    first, second = finished_runs(runs)
    assert (first["element"], second["round"]) == (9.0, 2)


def test_a_quick_run_decides_nothing(config: ParImportanceCostRun, tmp_path: Path) -> None:
    result = quick_par_importance_cost(config, work=tmp_path)
    assert len(result.rows) == 3
    assert all(metric.holds is None for metric in result.metrics.values())


def test_metrics_are_medians_of_ratios_within_a_round(config: ParImportanceCostRun) -> None:
    rows = [
        {"round": 1, "plain": 1.0, "element": 1.2, "rank": 1.1},
        {"round": 2, "plain": 10.0, "element": 16.0, "rank": 9.0},
        {"round": 3, "plain": 2.0, "element": 2.2, "rank": 2.0},
    ]
    metrics = summary(config, rows).metrics
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {"importance_over_fwdbwd": 1.2, "rank_importance_over_fwdbwd": 1.0}
    )
    assert metrics["importance_over_fwdbwd"].holds is True
    assert metrics["rank_importance_over_fwdbwd"].holds is None
