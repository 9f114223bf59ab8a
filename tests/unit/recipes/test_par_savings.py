"""The benchmark of savings: bytes are those that the arithmetic says, ratios are within a round."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.bench.partition import ParSavingsRun
from treadle.recipes.bench.par_savings import ARMS, metrics_of, par_savings
from treadle.toml import load_toml

# PEFT asks a model for a property that transformers 5 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIGURATION = Path(__file__).parents[3] / "benchmarks" / "par-savings.toml"


def test_bytes_are_those_of_the_active_share(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    changes = {"base": str(tmp_path), "kinds": ("q_proj",), "rank": 5, "batch": 2, "rounds": 2, "steps": 1}
    sizes = {"prompt_tokens": 3, "answer_tokens": 2}
    config = load_toml(CONFIGURATION, ParSavingsRun).model_copy(update=changes | sizes)
    result = par_savings(config)
    assert [row["arm"] for row in result.rows] == ["full", "masks", "ranks", "masks", "ranks", "full"]
    rows = {str(row["arm"]): row for row in result.rows}
    whole = 2 * 5 * (32 + 32)  # two layers, A and B
    assert [rows[arm]["trainable_parameters"] for arm in ("full", "ranks")] == [whole, 0.4 * whole]
    masked = int(str(rows["masks"]["trainable_parameters"]))
    assert masked == pytest.approx(0.4 * whole, rel=0.15)  # 640 draws: three standard errors are 0.15 of the mean
    assert {arm: rows[arm]["gradient_bytes"] for arm in ARMS} == {
        "full": 4 * whole,
        "masks": 4 * whole,
        "ranks": 0.4 * 4 * whole,
    }
    steps = 4 * 4  # of two A and two B
    assert {arm: rows[arm]["optimizer_bytes"] for arm in ARMS} == {
        "full": 8 * whole + steps,
        "masks": 8 * masked + whole + steps,  # a byte of mask an element
        "ranks": 0.4 * 8 * whole + steps,
    }
    assert result.metrics["memory_ratio_at_40"].holds is True
    assert all(metric.holds is None for metric in par_savings(config, quick=True).metrics.values())


def test_metrics_are_medians_of_ratios_within_a_round() -> None:
    def rows(turn: int, *seconds: float) -> list[dict[str, object]]:
        sizes = zip(ARMS, seconds, (10, 10, 4), (20, 11, 8), strict=True)
        return [
            {"round": turn, "arm": arm, "seconds": taken, "gradient_bytes": gradient, "optimizer_bytes": state}
            for arm, taken, gradient, state in sizes
        ]

    metrics = metrics_of([*rows(1, 1.0, 1.2, 0.9), *rows(2, 10.0, 9.0, 12.0), *rows(3, 2.0, 2.2, 1.9)])
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {
            "memory_ratio_at_40": 0.4,
            "step_time_ratio_at_40": 0.95,
            "masks_memory_ratio_at_40": 0.7,
            "masks_step_time_ratio_at_40": 1.1,
        }
    )
    assert [metric.holds for metric in metrics.values()] == [True, True, None, None]
