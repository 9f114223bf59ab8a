"""The study of training in stages on a real model: its tasks, its arms, its figures."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from treadle.configs.bench.partition import ParSmollm2Run
from treadle.recipes.bench import par_smollm2
from treadle.recipes.bench.par_smollm2 import summary, world_of
from treadle.recipes.bench.par_trials import Trial
from treadle.toml import load_toml

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def config() -> ParSmollm2Run:
    return load_toml(BENCHMARKS / "par-smollm2.toml", ParSmollm2Run)


def run(arm: str, seed: int, accuracy: float, **more: float | None) -> dict[str, object]:
    found = {"accuracy": accuracy, "first": accuracy, "second": accuracy, "reward_first": 0.1, "reward_last": 0.4}
    return {"arm": arm, "stage": "test", "seed": seed, "factor": 1.0, "active": [1.0], **found, **more}


def test_examples_hang_on_the_seed_and_questions_on_the_stage(
    config: ParSmollm2Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trec").mkdir()
    for split in ("train", "test"):
        rows = [f'{{"text": "{split} question {i}", "label": "number"}}\n' for i in range(600)]
        (tmp_path / "trec" / f"{split}.jsonl").write_text("".join(rows))
    monkeypatch.setattr(par_smollm2, "model_folder", lambda name: tmp_path)
    world = world_of(config, BENCHMARKS, tmp_path)
    arm = config.arms[0]
    one, other = (world.systems(Trial(arm, "test", seed, 1.0)) for seed in (0, 1))
    tuned = world.systems(Trial(arm, "tune", 0, 1.0))
    for name in ("first", "second"):
        assert one[name].held_out == other[name].held_out
        assert one[name].examples != other[name].examples
        asked = {example.prompt for example in one[name].held_out}
        assert not asked & {example.prompt for example in tuned[name].held_out}
        assert not asked & {example.prompt for example in one[name].examples}


def test_the_arms_are_those_of_the_table(config: ParSmollm2Run) -> None:
    arms = {arm.name: arm for arm in config.arms}
    assert {config.ours, config.peer, "LoRA", "OLoRA", "PiSSA"} <= set(arms)
    assert all(len(arm.parts) == 2 for arm in config.arms)
    # as many examples are read where nothing is rolled out
    assert config.long_sft.steps * config.long_sft.batch_size == config.grpo.steps * config.grpo.prompts * 8


def test_figures_are_paired_by_seed(config: ParSmollm2Run) -> None:
    runs = [run(config.ours, seed, 0.6 + 0.01 * seed) for seed in (0, 1, 2)]
    runs += [run(config.peer, seed, 0.5 + 0.01 * seed) for seed in (0, 1, 2)]
    runs += [run("LoRA", 0, 0.4, reward_first=None, reward_last=None)]
    found = summary(config, runs)
    figures = SimpleNamespace(**{name: metric.value for name, metric in found.metrics.items()})
    assert figures.accuracy_minus_pissa_rl == pytest.approx(0.1)
    assert (figures.reward_first, figures.reward_last) == pytest.approx((0.1, 0.4))
    ours = next(row for row in found.rows if row["arm"] == config.ours)
    assert ours["low"] == pytest.approx(0.1)  # the same difference at every seed
    assert ours["p"] == 0.25  # three seeds can show no less
