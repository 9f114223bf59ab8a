"""The benchmark of depth trends: arms differ in nothing but reset and order, and trends are those of the scores."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.bench.ranks import RankDepthRun
from treadle.recipes.bench.rank_depth import ARMS, BACKWARDS, PILED, RESET, quick_rank_depth, rank_depth, summary
from treadle.recipes.bench.result import finished_runs, record_run
from treadle.reports.benchmark_charts import benchmark_chart


@pytest.fixture
def config(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> RankDepthRun:
    tiny_llama.save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    base = str(tmp_path / "llama")
    return RankDepthRun(bases=(base,), quick_base=base, sequences=2, tokens=8, trials=1, seeds=(0, 1))


def test_piled_up_noise_outgrows_the_first_modules(config: RankDepthRun, tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    result = rank_depth(config, runs=runs, work=tmp_path)
    found = {row["arm"]: row for row in result.rows}
    assert set(found) == set(ARMS)
    assert found[PILED]["trend"] > 0.5  # whatever the model, each score has all noise before it in it
    assert found[BACKWARDS]["trend"] < -0.5
    assert "no reset" in benchmark_chart(result.to_json())
    recorded = list(finished_runs(runs))
    assert len(recorded) == 6
    rank_depth(config, runs=runs, work=tmp_path)
    assert list(finished_runs(runs)) == recorded
    assert all(metric.holds is None for metric in quick_rank_depth(config, work=tmp_path).metrics.values())


def test_trends_are_paired_by_seed(config: RankDepthRun, tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    for seed in config.seeds:
        for arm, scores in ((RESET, [3.0, 1.0, 2.0]), (PILED, [1.0, 2.0, 3.0 + seed]), (BACKWARDS, [3.0, 2.0, 1.0])):
            record_run(runs, {"base": config.bases[0], "arm": arm, "seed": seed, "scores": scores})
    record_run(runs, {"base": config.bases[0], "arm": RESET, "seed": 7, "scores": [1.0, 2.0, 3.0]})
    result = summary(config, list(finished_runs(runs)))
    assert [row["trend"] for row in result.rows] == pytest.approx([-0.5, 1.0, -1.0])
    assert result.rows[0]["scores"] == pytest.approx([1.5, 0.5, 1.0])
    assert result.metrics["least_excess_of_trend"].value == pytest.approx(1.5)
    assert [row["agreement"] for row in result.rows] == pytest.approx([1.0, -0.5, 0.5])
    assert result.metrics["agreement_of_piling_up"].value == pytest.approx(-0.5)
    assert result.metrics["bases_with_a_trend_by_piling_up"].value == 1
