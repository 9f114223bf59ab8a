"""The benchmark of importance: every arm passes over the samples, and ratios are within a round."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.bench.partition import ParImportanceCostRun
from treadle.configs.toml import load_toml
from treadle.recipes.bench.par_importance_cost import metrics_of, par_importance_cost

CONFIGURATION = Path(__file__).parents[3] / "benchmarks" / "par-importance-cost.toml"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("moves_A", [False, True])
def test_every_arm_of_every_round_is_timed(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, quick: bool, moves_A: bool
) -> None:
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    changes = {"base": str(tmp_path), "rank": 2, "samples": 5, "batch": 2, "rounds": 2, "moves_A": moves_A}
    sizes = {"prompt_tokens": 3, "answer_tokens": 2}
    config = load_toml(CONFIGURATION, ParImportanceCostRun).model_copy(update=changes | sizes)
    result = par_importance_cost(config, quick=quick)
    assert [row["round"] for row in result.rows] == ([1, 2, 3] if quick else [1, 2])
    assert all(float(str(row[arm])) > 0 for row in result.rows for arm in ("plain", "element", "rank"))
    assert (result.metrics["importance_over_fwdbwd"].holds is None) is quick


def test_metrics_are_medians_of_ratios_within_a_round() -> None:
    rows = [
        {"round": 1, "plain": 1.0, "element": 1.2, "rank": 1.1},
        {"round": 2, "plain": 10.0, "element": 16.0, "rank": 9.0},
        {"round": 3, "plain": 2.0, "element": 2.2, "rank": 2.0},
    ]
    metrics = metrics_of(rows)
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {"importance_over_fwdbwd": 1.2, "rank_importance_over_fwdbwd": 1.0}
    )
    assert metrics["importance_over_fwdbwd"].holds is True
    assert metrics["rank_importance_over_fwdbwd"].holds is None
