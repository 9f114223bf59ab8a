"""`federated-quality`: how rows are split, whose point of the grid is taken, and a small study from end to end."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from treadle.configs.bench.federated import FederatedCell, FederatedQualityRun, GridPoint
from treadle.errors import ConfigError, InputError
from treadle.recipes.bench.federated_quality import best_point, federated_quality, split, summary
from treadle.recipes.bench.result import finished_runs
from treadle.toml import checked

GRID = (GridPoint(learning_rate=1.0, max_grad_norm=1.0), GridPoint(learning_rate=5.0, max_grad_norm=1.0))


def configured(**changes: object) -> FederatedQualityRun:
    cell = FederatedCell(
        task="sst2", clients=3, skew="severe", epsilons=(math.inf, 8.0, 1.0), arms=("ffa", "fedit", "central")
    )
    run = FederatedQualityRun(
        rank=2, rounds=1, local_steps=1, expected_batch=4, delta=1e-5, seeds=(0, 1, 2), tuning_seed=9, grid=GRID,
        skews={"severe": 0.5}, cells=(cell,),
    )  # fmt: skip
    return run.model_copy(update=changes)


def test_every_row_goes_to_one_client() -> None:
    labels = [place % 2 for place in range(300)]
    parts = split(labels, 3, 0.5, seed=1)
    assert sorted(place for part in parts for place in part) == list(range(300))
    assert min(map(len, parts)) >= 10  # a tenth of an equal share
    assert parts == split(labels, 3, 0.5, seed=1) != split(labels, 3, 0.5, seed=2)


def test_the_smaller_the_concentration_the_more_unlike_the_labels() -> None:
    labels = [place % 2 for place in range(600)]

    def unlikeness(concentration: float) -> float:
        shares = [
            np.mean([labels[place] for place in part])
            for seed in range(20)
            for part in split(labels, 3, concentration, seed=seed)
        ]
        return float(np.std(shares))

    assert unlikeness(math.inf) < 0.01
    assert unlikeness(0.1) > 2 * unlikeness(10.0) > 0.0


def run_of(
    stage: str, arm: str, seed: int, accuracy: float, epsilon: float | str, rate: float = 1.0
) -> dict[str, object]:
    return {
        "task": "sst2", "clients": 3, "skew": "severe", "epsilon": epsilon, "arm": arm, "stage": stage, "seed": seed,
        "learning_rate": rate, "max_grad_norm": 1.0, "accuracy": accuracy,
    }  # fmt: skip


def test_the_grid_is_searched_on_the_tuning_seed_alone() -> None:
    config = configured()
    runs = [
        run_of("tune", "ffa", 9, 0.6, 8.0, 1.0),
        run_of("tune", "ffa", 9, 0.7, 8.0, 5.0),
        run_of("test", "ffa", 0, 0.9, 8.0, 1.0),
    ]
    assert best_point(config, runs, config.cells[0], "ffa", 8.0) == GRID[1]


def test_differences_pair_the_seeds_and_goals_ask_for_their_intervals() -> None:
    runs: list[dict[str, object]] = []
    for seed, base in enumerate((0.66, 0.70, 0.68)):  # seeds differ by more than arms do
        runs += [run_of("test", "ffa", seed, base + 0.02, 1.0), run_of("test", "fedit", seed, base + 0.001 * seed, 1.0)]
        runs += [run_of("test", "ffa", seed, base, "inf"), run_of("test", "central", seed, base + 0.05, "inf")]
    result = summary(configured(), runs)
    metrics = result.metrics
    gain = metrics["ffa_minus_fedit_severe_eps1"]
    assert gain.value == pytest.approx(0.019)
    assert gain.holds is True
    assert metrics["ffa_minus_central_epsinf"].value == pytest.approx(-0.05)
    assert metrics["ffa_minus_central_epsinf"].holds is False
    assert metrics["ffa_minus_fedit_severe_eps8"].holds is None  # not run
    less = next(row for row in result.rows if row["arm"] == "ffa - fedit")
    assert (less["epsilon"], less["seeds"], less["accuracy"]) == ("1.0", 3, pytest.approx(0.019))
    # t(2, .975) = 4.303 times the standard error of .020, .019, .018: sqrt(1e-6 / 3)
    assert (less["low"], less["high"]) == (pytest.approx(0.01652, abs=1e-5), pytest.approx(0.02148, abs=1e-5))
    missing = summary(configured(), runs[:4]).metrics["ffa_minus_fedit_severe_eps1"]
    assert (missing.value, missing.holds) == (pytest.approx(0.02), None)  # one seed of three


def test_nothing_is_said_of_a_goal_where_neither_arm_has_learnt_anything() -> None:
    runs = [run_of("test", arm, seed, 0.5 + 0.01 * seed, 8.0) for arm in ("ffa", "fedit") for seed in range(3)]
    found = summary(configured(), runs).metrics["ffa_minus_fedit_severe_eps8"]
    assert (found.value, found.holds) == (0.0, None)
    learnt = [{**run, "accuracy": 0.9} if run["arm"] == "ffa" else run for run in runs]
    assert summary(configured(), learnt).metrics["ffa_minus_fedit_severe_eps8"].holds is True


def test_a_tuning_seed_is_none_of_those_that_are_reported() -> None:
    content = json.loads(configured().model_dump_json()) | {"tuning_seed": 1, "skews": {"severe": 0.5}}
    content["cells"][0]["epsilons"] = [8.0]
    with pytest.raises(ConfigError, match="tuning_seed is one of the seeds"):
        checked(content, FederatedQualityRun, where="run")


@pytest.fixture
def encoder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    config = BertConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_a_study_from_end_to_end_and_resumed(encoder: str, tmp_path: Path) -> None:
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    for name, count in (("train", 60), ("validation", 8), ("test", 8)):
        rows = [{"text": f"{name} film {i}", "label": ("negative", "positive")[i % 2]} for i in range(count)]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cell = FederatedCell(
        task="sst2", clients=2, skew="severe", epsilons=(8.0,), arms=("ffa", "fedit", "local", "central")
    )
    config = configured(base=encoder, cells=(cell,), train_limit=40, delta=1e-3)
    runs, work = tmp_path / "runs.jsonl", tmp_path / "work"
    result = federated_quality(config, runs=runs, work=work, data=tmp_path / "data")
    rows = list(finished_runs(runs))
    assert len(rows) == 4 * (len(GRID) + 3)
    arms = {"ffa", "fedit", "local", "central"}
    assert {row["arm"] for row in result.rows} == arms | {f"ffa - {arm}" for arm in arms - {"ffa"}}
    assert all(row["seeds"] == 3 for row in result.rows)
    assert all(0.0 <= float(str(row["accuracy"])) <= 1.0 for row in rows)
    again = federated_quality(config, runs=runs, work=tmp_path / "gone", data=tmp_path / "data")
    assert again.rows == result.rows
    with pytest.raises(InputError, match="pass --data DIR"):
        federated_quality(config, runs=runs, work=work, data=None)
