"""The benchmark of probes: every arm really runs, the naive loop agrees, and ratios are those of the recorded arms."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.bench.ranks import RankProbeCostRun
from treadle.recipes.bench.rank_probe_cost import quick_rank_probe_cost, rank_probe_cost, spread, summary
from treadle.recipes.bench.result import finished_runs, record_run


@pytest.fixture
def config(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> RankProbeCostRun:
    tiny_llama.save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    base = str(tmp_path / "llama")
    return RankProbeCostRun(
        bases=(base,), judged=base, quick_base=base, sequences=4, tokens=8, batch=2, trials=1, projections=1,
        eva_rank=2, naive_modules=3, training_steps=1,
    )  # fmt: skip


def test_every_arm_is_measured_once_and_the_naive_loop_agrees(config: RankProbeCostRun, tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    result = rank_probe_cost(config, runs=runs, work=tmp_path)
    (row,) = result.rows
    assert (row["modules"], row["naive_modules"]) == (14, 3)
    assert all(float(row[f"{arm}_seconds"]) > 0 for arm in ("naive", "prefix", "jacobian", "eva", "training"))
    assert result.metrics["prefix_difference"].holds
    recorded = list(finished_runs(runs))
    turn = ["naive", "prefix", "jacobian", "training"]
    assert [(run["arm"], run["batch"]) for run in recorded] == [
        *((arm, 0) for arm in turn),
        *((arm, 1) for arm in turn),
        ("eva", None),
    ]
    again = rank_probe_cost(config, runs=runs, work=tmp_path)
    assert list(finished_runs(runs)) == recorded
    assert again.metrics == result.metrics == summary(config, recorded).metrics


def test_an_interrupted_benchmark_runs_what_is_missing(config: RankProbeCostRun, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    rank_probe_cost(config, runs=first, work=tmp_path)
    kept = list(finished_runs(first))
    for run in kept[:2]:
        record_run(second, run)
    rank_probe_cost(config, runs=second, work=tmp_path)
    assert list(finished_runs(second))[:2] == kept[:2]
    assert len(list(finished_runs(second))) == len(kept) == 9


def test_a_quick_run_decides_nothing(config: RankProbeCostRun, tmp_path: Path) -> None:
    result = quick_rank_probe_cost(config, work=tmp_path)
    assert all(metric.holds is None for metric in result.metrics.values())


def test_figures_are_those_of_the_arms(config: RankProbeCostRun) -> None:
    base = config.judged

    def run(arm: str, seconds: float, **means: float) -> dict[str, object]:
        return {"base": base, "arm": arm, "seconds": seconds, "peak_bytes": 1, "means": means, "text_sha256": "0"}

    runs = [
        run("naive", 10.0, a=0.0, c=3.0),
        run("naive", 20.0, a=2.0, c=5.0),
        run("prefix", 12.0, a=0.0, b=2.0, c=3.000008, d=3.0),
        run("prefix", 8.0, a=2.0, b=2.0, c=5.0, d=3.0),
        run("jacobian", 0.5, a=1.0, b=3.0, c=5.0, d=4.0),
        run("eva", 3.0, a=4.0, b=3.0, c=1.0, d=2.0),
        run("training", 0.1),
    ]
    metrics = summary(config, runs).metrics
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {
            "prefix_speedup": 30 * 4 / 2 / 20,
            "prefix_difference": 4e-6,
            "jacobian_speedup": 30 * 4 / 2 / 0.5,
            "jacobian_spearman": 1.0,
            "jacobian_of_training": 0.5 / (0.1 * 500),
        },
        rel=1e-3,
    )


def test_modules_are_spread_evenly() -> None:
    names = [str(place) for place in range(210)]
    assert spread(names, 21) == [str(place) for place in range(5, 210, 10)]
    assert spread(names, 300) == names
    assert spread(names, 1) == ["105"]


def test_the_judged_base_must_be_measured(config: RankProbeCostRun) -> None:
    with pytest.raises(ValueError, match="judged is none of the bases"):
        RankProbeCostRun(**{**config.model_dump(), "judged": "another"})
