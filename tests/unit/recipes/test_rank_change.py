"""`rank-change`: what changes is what was trained, and correlations are those of scores and changes."""

from pathlib import Path

import pytest

from treadle.configs.bench.ranks import RankArm, RankCell, RankChangeRun, RankWorthRun
from treadle.recipes.bench.rank_change import rank_change, summary
from treadle.recipes.bench.result import finished_runs
from treadle.train.settings import SftSettings

CONFIG = RankChangeRun(
    tasks=("sst2",),
    probes=("perturbation", "gradient"),
    seeds=(0, 1),
    mean_rank=2,
    learning_rates={"full": 1e-3, "LoRA": 1e-3, "B alone": 1e-2},
)


def test_every_way_of_training_moves_its_modules_once(tmp_path: Path, tiny_encoder: Path, tiny_sst2: Path) -> None:
    arms = tuple(RankArm(name=name) for name in ("uniform", "shuffled", "adarank"))
    worth = RankWorthRun(
        base=str(tiny_encoder), train_limit=12, sft=SftSettings(batch_size=4), sequences=2, tokens=8, tuning_seed=9,
        learning_rates=(1e-3,), seeds=(0, 1, 2), test_seeds=(5, 6, 7), arms=arms,
        cells=(RankCell(task="sst2", mean_rank=2),),
    )  # fmt: skip
    runs = tmp_path / "runs.jsonl"
    result = rank_change(CONFIG, worth, runs=runs, work=tmp_path / "work", data=tiny_sst2)
    found = list(finished_runs(runs))
    changes = {(run["trained"], run["seed"]): run for run in found if "trained" in run}
    assert set(changes) == {(way, seed) for way in CONFIG.learning_rates for seed in (0, 1)}
    modules = {name for run in found if "probe" in run for name in run["scores"]}
    for run in changes.values():
        assert run["norm"].keys() == modules
        assert all(norm > 0 for norm in run["norm"].values())
    # A adds what the frozen one cannot reach: one and the same A and rate would else give one and the same change.
    assert changes["LoRA", 0]["norm"] != changes["B alone", 0]["norm"]
    # The base is what it was: later changes are again measured from it.
    again = rank_change(CONFIG, worth, runs=tmp_path / "again.jsonl", work=tmp_path / "work", data=tiny_sst2)
    assert again.metrics == result.metrics
    rank_change(CONFIG, worth, runs=runs, work=tmp_path / "gone", data=tiny_sst2)
    assert list(finished_runs(runs)) == found


def test_correlations_average_tasks_and_want_all_of_them() -> None:
    config = CONFIG.model_copy(update={"tasks": ("sst2", "subj"), "probes": ("perturbation",)})
    runs: list[dict[str, object]] = [
        {"task": task, "probe": "perturbation", "scores": {"a": 1.0, "b": 2.0, "c": 3.0}} for task in config.tasks
    ]
    norms = {"sst2": {"a": 1.0, "b": 2.0, "c": 3.0}, "subj": {"a": 2.0, "b": 1.0, "c": 3.0}}
    size = {"a": 3.0, "b": 2.0, "c": 1.0}
    for task, seeds in (("sst2", (0, 1)), ("subj", (0,))):
        for seed in seeds:
            changed = {"norm": norms[task], "relative": norms[task], "size": size, "accuracy": 0.5}
            runs.append({"task": task, "trained": "full", "seed": seed, **changed})
    rows = {(row["measure"], row["probe"]): row for row in summary(config, runs).rows}
    assert rows["norm", "perturbation"]["correlation"] == pytest.approx((1.0 + 0.5) / 2)
    assert rows["norm", "perturbation"]["seeds"] == 1  # the other seed lacks a task
    assert rows["relative", "size"]["correlation"] == pytest.approx((-1.0 - 0.5) / 2)
