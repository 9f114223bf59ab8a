"""The audit has teeth: it sees training without noise, and a bug that leaves a tenth; and it clears what is sound."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from treadle.configs.audit import AuditedTraining, PrivacyAuditRun
from treadle.errors import ConfigError, InputError
from treadle.recipes.audit import EVERY_STEP, FINAL
from treadle.recipes.bench.privacy_audit import (
    AGAINST_BASE,
    AGAINST_SHADOWS,
    LOSS,
    arms,
    privacy_audit,
    quick_privacy_audit,
    summary,
)
from treadle.recipes.bench.result import finished_runs, record_run
from treadle.toml import checked
from treadle.train.canaries import coins
from treadle.train.settings import PrivateSettings

TRAINING = PrivateSettings(max_length=24)
CANARIES = 600


@pytest.fixture
def config(
    tmp_path: Path, tiny_bert: BertForSequenceClassification, tiny_tokenizer: PreTrainedTokenizerFast
) -> PrivacyAuditRun:
    """A tiny encoder, and few enough canaries that a claim of 8 cannot be refuted by them."""
    tiny_bert.bert.save_pretrained(tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(tmp_path / "encoder")
    gradients = AuditedTraining(
        rows=8, canaries=CANARIES, expected_batch=60, steps=20, guesses=((20, 0), (200, 0)), training=TRAINING
    )
    rows = AuditedTraining(rows=8, canaries=12, expected_batch=7, steps=2, guesses=((0, 4), (6, 6)), training=TRAINING)
    return PrivacyAuditRun(
        seeds=(0, 1),
        base=str(tmp_path / "encoder"),
        task="sst2",
        rank=8,
        head_rows=8,
        epsilons=("inf", 1.0),
        delta=1e-6,
        gradients=gradients,
        rows=rows,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with something like sst2."""
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for place, split in enumerate(("train", "validation", "test")):
        rows = [
            {"text": f"w{i} the film is w{i + place} w{i // 2}", "label": ("negative", "positive")[i % 2]}
            for i in range(30)
        ]
        (tmp_path / "data" / "sst2" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def found(rows: object) -> dict[tuple[str, str, float], float]:
    table: list[Mapping[str, float | str]] = list(rows)  # type: ignore[call-overload]
    return {
        (str(r["attack"]), str(r["epsilon_claimed"]), float(r["noise_left"])): float(r["epsilon_at_least"])
        for r in table
    }


def test_the_audit_sees_what_is_not_private_and_clears_what_is(
    config: PrivacyAuditRun, data: Path, tmp_path: Path
) -> None:
    result = privacy_audit(config, runs=tmp_path / "runs.jsonl", work=tmp_path / "work", data=data)
    bounds = found(result.rows)
    for attack in (EVERY_STEP, FINAL):
        assert bounds[attack, "inf", 1.0] > 4.0  # 400 sure guesses refute ln(400 / 3.7) = 4.7
        assert bounds[attack, "1", 1.0] < 1.0
        assert bounds[attack, "1", 0.1] > 2.0
    assert {key for key in bounds if key[0] in (LOSS, AGAINST_BASE, AGAINST_SHADOWS)} == {
        (attack, claim, 1.0) for attack in (LOSS, AGAINST_BASE, AGAINST_SHADOWS) for claim in ("inf", "1")
    }
    assert {name: metric.holds for name, metric in result.metrics.items()} == {
        "empirical_epsilon_at_inf": True,
        "empirical_epsilon_at_1": True,
        "empirical_epsilon_at_inf_by_loss": None,
        "planted_bug_caught": True,
    }
    assert result.metrics["planted_bug_caught"].value == 1.0
    assert str(tmp_path / "work") not in json.dumps(result.to_json())
    json.loads(json.dumps(result.to_json(), allow_nan=False))  # "inf" is a word in it


def run_of(kind: str, epsilon: str, seed: int, *, planted: bool = False, **facts: object) -> dict[str, object]:
    return {"kind": kind, "epsilon": epsilon, "planted": planted, "seed": seed, "data_sha256": "0", **facts}


def guesses_of(epsilon: str, seed: int, right: int, *, planted: bool = False) -> dict[str, object]:
    """A recorded run in which so many of 200 guesses are right, and half of 20."""
    return run_of("gradients", epsilon, seed, planted=planted, right={EVERY_STEP: [10, right], FINAL: [10, 100]})


def complete(change: Callable[[dict[str, object]], dict[str, object]] = lambda run: run) -> list[dict[str, object]]:
    """All runs of the configuration: sure guesses without noise, next to none with it, the bug plain to see."""
    losses = {"before": [1.0] * 12, "after": [0.5] * 12}
    runs = [
        run
        for seed in (0, 1)
        for run in (
            guesses_of("inf", seed, 200),
            guesses_of("1", seed, 110),
            guesses_of("1", seed, 200, planted=True),
            run_of("rows", "inf", seed, **losses),
            run_of("rows", "1", seed, **losses),
        )
    ]
    return [change(run) for run in runs]


def test_the_figures_follow_from_the_recorded_runs(config: PrivacyAuditRun) -> None:
    assert len(complete()) == len(arms(config)) * len(config.seeds)
    metrics = summary(config, complete()).metrics
    # 400 sure guesses of two seeds at half of 5%: e^ε / (1 + e^ε) = 0.025 ** (1 / 400); δ costs the last digits
    success = 0.025 ** (1 / 400)
    assert metrics["empirical_epsilon_at_inf"].value == pytest.approx(math.log(success / (1 - success)), rel=0.02)
    assert all(metric.holds is not False for metric in metrics.values())


def test_a_bug_that_is_missed_and_a_promise_that_is_broken_stay_so(config: PrivacyAuditRun) -> None:
    def without_teeth(run: dict[str, object]) -> dict[str, object]:
        return guesses_of("1", int(str(run["seed"])), 110, planted=True) if run["planted"] else run

    def broken(run: dict[str, object]) -> dict[str, object]:
        sound = (run["kind"], run["epsilon"], run["planted"]) != ("gradients", "1", False)
        return run if sound else guesses_of("1", int(str(run["seed"])), 190)

    assert summary(config, complete(without_teeth)).metrics["planted_bug_caught"].holds is False
    assert summary(config, complete(broken)).metrics["empirical_epsilon_at_1"].holds is False
    partial = summary(config, complete()[:-1])
    assert all(metric.holds is None for metric in partial.metrics.values())


def test_shadow_adapters_tell_hard_rows_from_unknown_ones(config: PrivacyAuditRun) -> None:
    """Losses hang on the row far more than on its coin, so that only who knows the rows can tell."""
    sized = config.rows.model_copy(update={"canaries": 200, "guesses": ((40, 40),)})
    study = config.model_copy(update={"rows": sized})
    hardness = np.arange(200) * 0.5
    runs = [
        run_of("rows", "inf", seed, before=[5.0] * 200, after=[float(x) for x in hardness + 0.3 * ~coins(seed, 200)])
        for seed in (0, 1)
    ]
    bounds = found(summary(study, runs).rows)
    assert bounds[LOSS, "inf", 1.0] < 0.5
    assert bounds[AGAINST_SHADOWS, "inf", 1.0] > bounds[LOSS, "inf", 1.0]


def test_a_study_runs_only_what_is_missing(config: PrivacyAuditRun, data: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs.jsonl"
    for run in complete()[:-1]:
        record_run(runs, run)
    privacy_audit(config, runs=runs, work=tmp_path / "work", data=data)
    last = list(finished_runs(runs))
    assert len(last) == 10
    assert [(run["kind"], run["epsilon"], run["seed"]) for run in last[9:]] == [("rows", "1", 1)]
    assert last[9]["noise_multiplier"] > 0  # type: ignore[operator]


def test_a_quick_study_needs_no_data_and_decides_nothing(config: PrivacyAuditRun, tmp_path: Path) -> None:
    result = quick_privacy_audit(config.model_copy(update={"epsilons": ("inf",)}), work=tmp_path / "work")
    assert result.metrics["empirical_epsilon_at_inf"].value > 4.0
    assert all(metric.holds is None for metric in result.metrics.values())


def test_what_cannot_be_audited_is_refused_in_a_line(config: PrivacyAuditRun, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the task 'sst2' needs data files; pass --data DIR"):
        privacy_audit(config, runs=tmp_path / "runs.jsonl", work=tmp_path / "work", data=None)
    with pytest.raises(InputError, match="30 rows, the audit needs 52; audit fewer rows"):
        privacy_audit(
            config.model_copy(update={"rows": config.rows.model_copy(update={"rows": 40})}),
            runs=tmp_path / "runs.jsonl",
            work=tmp_path / "work",
            data=data,
        )
    for guesses, wrong in (([[7, 6]], r"guesses \[7, 6\] about 12 canaries"), ([[-1, 3]], r"guesses \[-1, 3\]")):
        with pytest.raises(ConfigError, match=wrong):
            checked({**config.rows.model_dump(), "guesses": guesses}, AuditedTraining, where="RUN.toml")
