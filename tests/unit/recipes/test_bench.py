"""The benchmarks' bookkeeping: figures from runs, goals that can be missed, runs that survive a crash."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.bench.routing_cost import RandomBanks, RoutingExactnessRun
from treadle.configs.bench.routing_quality import DemoQualityRun, Suite
from treadle.configs.demo import DemoRun
from treadle.configs.fleet import FleetRun, FleetSettings
from treadle.data.tasks import load_task
from treadle.errors import InputError
from treadle.recipes.bench import BENCHMARKS, run_benchmark
from treadle.recipes.bench.demo_quality import demo_quality, quick_demo_quality, summary
from treadle.recipes.bench.result import BenchmarkResult, Metric, finished_runs, record_run
from treadle.recipes.bench.routing_exactness import brute_force, routing_exactness
from treadle.recipes.demo import demo
from treadle.recipes.fleet import grow_fleet
from treadle.routing.bank_files import load_bank
from treadle.routing.trace import Trace
from treadle.toml import load_toml
from treadle.train.settings import SftSettings

RANDOM = RandomBanks(inner=8, outer=6, ranks=(1, 4), adapters=(9, 20), conditions=(1.0, 1e3), decisions=64)
CONFIGURATIONS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def base(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    """A tiny base in a folder."""
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def settings(base: str) -> FleetSettings:
    """A few hundred tokens a task."""
    return FleetSettings(
        base=base,
        mean_rank=2,
        probe_texts=1,
        probe_words=4,
        calibration_texts=3,
        calibration_words=10,
        sft=SftSettings(max_tokens=400, learning_rate=1e-2),
    )


@pytest.fixture
def fleet_run(settings: FleetSettings, tmp_path: Path) -> FleetRun:
    """Two generated tasks."""
    return settings.run(("chain_sum", "syllogism"), out=tmp_path / "unused")


@pytest.fixture
def study(settings: FleetSettings) -> DemoQualityRun:
    """Three seeds of one suite."""
    suite = Suite(name="demo", tasks=("chain_sum", "syllogism"), files=False, max_tokens=300)
    return DemoQualityRun(seeds=(0, 1, 2), limit=4, fleet=settings, suites=(suite,))


def run_of(seed: int, oracle: float, sequence: float, base: float) -> dict[str, object]:
    """A recorded run with these means in the trained form."""
    means = {"oracle": oracle, "sequence": sequence, "base": base}
    rows = [{"task": "(mean)", "condition": "trained", "arm": arm, "value": v} for arm, v in means.items()]
    return {"suite": "demo", "seed": seed, "rows": rows, "routing": []}


def test_the_figures_are_means_over_seeds_held_against_the_goals(study: DemoQualityRun) -> None:
    runs = [run_of(0, 0.5, 0.5, 0.1), run_of(1, 0.6, 0.54, 0.2), run_of(2, 0.4, 0.4, 0.0)]
    metrics = summary(study, runs).metrics
    assert metrics["oracle_minus_routed"].value == pytest.approx(0.02)
    assert metrics["oracle_minus_routed"].holds is True
    assert metrics["routed_minus_base"].value == pytest.approx((0.4 + 0.34 + 0.4) / 3)
    assert metrics["routed_minus_base"].holds is True


def test_a_missed_goal_stays_missed_and_a_partial_study_decides_nothing(study: DemoQualityRun) -> None:
    missed = summary(study, [run_of(seed, 0.5, 0.4, 0.3) for seed in range(3)]).metrics
    assert missed["oracle_minus_routed"].holds is False
    assert missed["routed_minus_base"].holds is False
    partial = summary(study, [run_of(0, 0.5, 0.5, 0.1)]).metrics
    assert partial["oracle_minus_routed"].holds is None
    assert partial["oracle_minus_routed"].goal == "<= 0.03"


def test_metrics_know_both_directions() -> None:
    assert Metric.against(2.0, "s", at_least=2.0).holds is True
    assert Metric.against(1.9, "s", at_least=2.0).holds is False
    assert Metric.against(2.1, "s", at_most=2.0).holds is False
    assert Metric.against(2.1, "s").goal is None


def test_recorded_runs_survive_a_line_cut_off_by_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    record_run(path, {"seed": 0})
    record_run(path, {"seed": 1})
    path.write_text(path.read_text() + '{"seed": 2')
    assert [run["seed"] for run in finished_runs(path)] == [0, 1]
    record_run(path, {"seed": 3})
    assert [run["seed"] for run in finished_runs(path)] == [0, 1, 3]


def test_a_study_runs_only_what_is_missing(study: DemoQualityRun, tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    for seed in (0, 1):
        record_run(runs, run_of(seed, 0.5, 0.5, 0.1))
    result = demo_quality(study, runs=runs, work=tmp_path / "work")
    assert [run["seed"] for run in finished_runs(runs)] == [0, 1, 2]
    assert not (tmp_path / "work" / "demo-0").exists()
    arms = {row["arm"] for row in result.rows if row.get("condition") == "bare" and "arm" in row}
    assert arms == {"base", "token", "sequence", "oracle"}
    assert str(tmp_path) not in json.dumps(result.to_json()).replace(str(study.fleet.base), "")


def test_a_quick_study_judges_no_goal(study: DemoQualityRun, tmp_path: Path) -> None:
    result = quick_demo_quality(study, work=tmp_path / "work")
    assert result.metrics["routed_minus_base"].goal == ">= 0.15"
    assert all(metric.holds is None for metric in result.metrics.values())


def test_a_suite_of_files_needs_the_folder(study: DemoQualityRun, tmp_path: Path) -> None:
    suite = study.suites[0].model_copy(update={"files": True})
    with pytest.raises(InputError, match="needs data files; pass --data DIR"):
        demo_quality(
            study.model_copy(update={"suites": (suite,)}), runs=tmp_path / "runs.jsonl", work=tmp_path / "work"
        )


def test_exactness_finds_no_wrong_decision_in_fp32_and_bf16(fleet_run: FleetRun, tmp_path: Path) -> None:
    config = RoutingExactnessRun(fleet=fleet_run, decisions=2_000, quick_decisions=1_000, random=RANDOM)
    result = routing_exactness(config, quick=True, work=tmp_path)
    grid = [row for row in result.rows if "condition" in row]
    assert [(row["rank"], row["adapters"], row["condition"]) for row in grid[::2]] == [
        (1, 9, 1),
        (1, 9, 1e3),
        (4, 9, 1),
        (4, 9, 1e3),
    ]
    assert all(row["decisions"] == 8 and row["wrong"] == 0 for row in grid)
    assert {(row["scorer"], row["dtype"]) for row in result.rows} == {
        (scorer, dtype) for scorer in ("seqr", "norm") for dtype in ("float32", "bfloat16")
    }
    assert result.metrics["wrong_decisions"].value == 0
    assert result.metrics["wrong_decisions"].holds is True
    assert result.metrics["decisions"].value >= 4_000


def test_exactness_counts_a_decision_that_is_wrong(
    fleet_run: FleetRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Trace.record

    def lying(self: Trace, module: str, decision: object, *rest: object) -> None:
        honest(self, module, decision, *rest)  # type: ignore[arg-type]
        last = self.layers[module][-1].winner
        last[:] = 1 - last.clamp_min(0)

    monkeypatch.setattr(Trace, "record", lying)
    result = routing_exactness(
        RoutingExactnessRun(fleet=fleet_run, decisions=500, quick_decisions=500, random=RANDOM), work=tmp_path
    )
    assert result.metrics["wrong_decisions"].value > 400
    assert result.metrics["wrong_decisions"].holds is False


def test_the_reference_is_the_norm_of_the_whole_update(fleet_run: FleetRun) -> None:
    bank = grow_fleet(fleet_run).bank
    factors = next(iter(load_bank(fleet_run.out / "bank").layers.values()))
    x = torch.randn(3, factors.groups[0].A.shape[1])
    adapter = bank.adapters[1]
    module = factors.module
    expected = (x.double() @ (adapter.folded_B(module).double() @ adapter.lora_A[module].double()).T).norm(dim=1)
    torch.testing.assert_close(brute_force(factors, x, calibrated=False)[:, 1], expected)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_committed_configurations_are_sound(name: str) -> None:
    load_toml(CONFIGURATIONS / f"{name}.toml", BENCHMARKS[name].settings)


def test_showing_recomputes_from_the_committed_runs(study: DemoQualityRun, tmp_path: Path) -> None:
    (tmp_path / "demo-quality.toml").write_text((CONFIGURATIONS / "demo-quality.toml").read_text())
    with pytest.raises(InputError, match="no finished runs; run the benchmark first"):
        run_benchmark("demo-quality", folder=tmp_path, show=True)
    for seed in range(3):
        record_run(tmp_path / "results" / "demo-quality.runs.jsonl", run_of(seed, 0.5, 0.4, 0.3))
    shown = run_benchmark("demo-quality", folder=tmp_path, show=True)
    assert shown["metrics"]["oracle_minus_routed"] == {  # type: ignore[index]
        "value": pytest.approx(0.1),
        "unit": "accuracy",
        "goal": "<= 0.03",
        "holds": False,
    }
    with pytest.raises(InputError, match="no committed result"):
        run_benchmark("routing-exactness", folder=tmp_path, show=True)


def test_the_demo_goes_from_plan_to_table_and_a_second_run_keeps_it(base: str, tmp_path: Path) -> None:
    config = DemoRun(base=base, out=tmp_path / "demo", quick=True)
    first = demo(config)
    assert first.evaluation.settings["adapters"] == ["syllogism", "family_relationships"]
    assert {"base", "token", "sequence", "oracle"} <= {row.arm for row in first.evaluation.rows}
    stored = json.loads((tmp_path / "demo" / "evaluation.json").read_text())
    assert stored["rows"]
    assert stored["public_text_overlap"] == first.overlap == 0.0  # CPython's manual asks no syllogisms
    kept = next((tmp_path / "demo" / "bank").glob("public-text-*.json"))
    asked = next(iter(load_task("syllogism").examples("test", condition="trained", limit=20, seed=0))).prompt
    kept.write_text(json.dumps({"source": "pydoc", "passages": [asked]}))
    second = demo(config)
    assert second.overlap > 0
    assert second.fingerprint == first.fingerprint
    assert second.losses == first.losses
    assert second.evaluation.rows == first.evaluation.rows


def test_what_was_not_measured_is_null() -> None:
    found = BenchmarkResult(
        "some", "a CPU", "", {}, {"gain": Metric(math.nan, "1", ">= 0")}, [{"low": math.nan, "n": 0}]
    )
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["metrics"]["gain"]["value"] is None
    assert told["rows"] == [{"low": None, "n": 0}]
