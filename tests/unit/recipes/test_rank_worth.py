"""`rank-worth`: equal parameters, whose rate and which arm is chosen, and a small study from end to end."""

import json
from pathlib import Path

import pytest

from treadle.configs.bench.ranks import RankArm, RankCell, RankWorthRun
from treadle.errors import ConfigError, InputError
from treadle.family.plan import LayerShape
from treadle.ranks.scores import ModuleScore, ProbeScores
from treadle.recipes.bench.rank_worth import best_rate, plan_of, rank_worth, reported, summary
from treadle.recipes.bench.result import finished_runs
from treadle.toml import checked
from treadle.train.settings import SftSettings

ARMS = (
    RankArm(name="uniform", control="uniform"),
    RankArm(name="shuffled", control="shuffled"),
    RankArm(name="adarank"),
    RankArm(name="sqrt", rule="sqrt"),
)
CELLS = tuple(RankCell(task=task, mean_rank=rank) for rank in (2, 4) for task in ("sst2", "subj"))


def configured(**changes: object) -> RankWorthRun:
    run = RankWorthRun(
        train_limit=12, sft=SftSettings(batch_size=4), learning_rates=(1e-3, 1e-2), tuning_seed=9,
        seeds=(0, 1, 2), test_seeds=(5, 6, 7), arms=ARMS, cells=CELLS,
    )  # fmt: skip
    return run.model_copy(update=changes)


def run_of(stage: str, cell: RankCell, arm: str, seed: int, accuracy: float, rate: float = 1e-3) -> dict[str, object]:
    return {
        "task": cell.task, "mean_rank": cell.mean_rank, "arm": arm, "stage": stage, "seed": seed,
        "learning_rate": rate, "accuracy": accuracy,
    }  # fmt: skip


def validated(gains: dict[tuple[int, str], float]) -> list[dict[str, object]]:
    """Runs in which an arm at a budget gains so much on every seed and task; seeds differ by more than arms do."""
    return [
        run_of("validation", cell, arm.name, seed, 0.5 + 0.1 * seed + gains.get((cell.mean_rank, arm.name), 0.0))
        for cell in CELLS
        for arm in ARMS
        for seed in (0, 1, 2)
    ]


def test_every_arm_has_the_parameters_of_the_uniform_plan() -> None:
    shapes = {f"m{i}": LayerShape(8 + 4 * (i % 3), 8) for i in range(9)}
    scores = ProbeScores(
        {name: ModuleScore(shape, ((float(i + 1),),)) for i, (name, shape) in enumerate(shapes.items())},
        "perturbation", {}, 0, None,
    )  # fmt: skip
    plans = {arm.name: plan_of(arm, scores, mean_rank=2, seed=3) for arm in ARMS}
    assert {row.rank for row in plans["uniform"].modules.values()} == {2}
    budget = plans["uniform"].count().total
    cheapest = min(shape.in_features + shape.out_features for shape in shapes.values())
    assert all(budget - cheapest < plan.count().total <= budget for plan in plans.values())
    assert plans["shuffled"] != plans["adarank"]
    assert plans["shuffled"] != plan_of(ARMS[1], scores, mean_rank=2, seed=4)


def test_the_rate_is_chosen_on_the_tuning_seed_alone() -> None:
    runs = [
        run_of("tune", CELLS[0], "adarank", 9, 0.6, 1e-3),
        run_of("tune", CELLS[0], "adarank", 9, 0.7, 1e-2),
        run_of("validation", CELLS[0], "adarank", 0, 0.9, 1e-3),
    ]
    assert best_rate(configured(), runs, CELLS[0], ARMS[2]) == 1e-2


def test_the_arm_must_beat_both_uniform_and_shuffled_to_be_chosen() -> None:
    runs = validated({(2, "adarank"): 0.02, (4, "sqrt"): 0.05, (4, "shuffled"): 0.045})
    assert [(cell.mean_rank, arm.name) for cell, arm in reported(configured(), runs)] == [
        (2, "uniform"), (2, "shuffled"), (2, "adarank"),
    ] * 2  # fmt: skip


def test_differences_pair_the_seeds_and_the_goal_counts_tasks() -> None:
    config = configured()
    runs = validated({})
    for task, gain in (("sst2", 0.03), ("subj", 0.0)):
        cell = RankCell(task=task, mean_rank=2)
        for seed, noise in zip(config.test_seeds, (0.0, 0.002, 0.001), strict=True):
            runs += [run_of("test", cell, arm, seed, 0.1 * seed) for arm in ("uniform", "shuffled")]
            runs += [run_of("test", cell, "adarank", seed, 0.1 * seed + gain + noise * (gain > 0))]
    result = summary(config, runs)
    metric = result.metrics["tasks_beating_uniform_and_shuffled"]
    assert (metric.value, metric.holds) == (1.0, False)
    row = next(row for row in result.rows if (row["stage"], row["task"], row["arm"]) == ("test", "sst2", "adarank"))
    assert row["minus_uniform"] == pytest.approx(0.031)
    assert 0.02 < float(str(row["minus_uniform_low"])) < 0.031
    assert row["minus_shuffled_p"] == 0.25  # three differences of one sign
    assert summary(config, runs[:-1]).metrics["tasks_beating_uniform_and_shuffled"].holds is None
    alone = summary(config.model_copy(update={"cells": (RankCell(task="sst2", mean_rank=2),)}), runs)
    metric = alone.metrics["tasks_beating_uniform_and_shuffled"]
    assert (metric.goal, metric.holds) == (None, None)  # one task decides no goal of two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_seeds": [2, 5, 6]}, "share a seed"),
        ({"tuning_seed": 5}, "share a seed"),
        ({"arms": [{"name": "uniform"}, {"name": "a"}, {"name": "b"}]}, "among them uniform and shuffled"),
    ],
)
def test_a_study_that_would_judge_itself_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(json.loads(configured().model_dump_json()) | change, RankWorthRun, where="run")


def test_a_study_from_end_to_end_and_resumed(tmp_path: Path, tiny_encoder: Path, tiny_sst2: Path) -> None:
    config = configured(
        base=str(tiny_encoder), cells=CELLS[:1], sequences=2, tokens=8, learning_rates=(1e-2,),
        arms=(*ARMS[:2], RankArm(name="own text", text="sst2"), RankArm(name="gradient", probe="gradient")),
    )  # fmt: skip
    runs, work = tmp_path / "runs.jsonl", tmp_path / "work"
    result = rank_worth(config, runs=runs, work=work, data=tiny_sst2)
    rows = list(finished_runs(runs))
    assert len(rows) == 4 * (1 + 3) + 3 * 3
    assert {row["arm"] for row in rows if row["stage"] == "test"} > {"uniform", "shuffled"}
    assert len({row["parameters"] for row in rows if row["arm"] == "uniform"}) == 1
    public, own = (ProbeScores.load(work / f"scores-sst2-perturbation{text}.json") for text in ("", "-on-sst2"))
    assert public.means() != own.means()
    assert public.text_sha256 != own.text_sha256
    again = rank_worth(config, runs=runs, work=tmp_path / "gone", data=tiny_sst2)
    assert again.rows == result.rows
    with pytest.raises(InputError, match="pass --data DIR"):
        rank_worth(config, runs=runs, work=work, data=None)
