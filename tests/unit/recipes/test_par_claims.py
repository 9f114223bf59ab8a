"""The study of LoRA-PAR's claims: its world, its trials, and how verdicts are reached."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from treadle.configs.bench.partition import ParClaimsRun
from treadle.errors import MismatchError
from treadle.recipes.bench.par_claims import CLAIMS, par_claims, summary, world_of
from treadle.recipes.bench.par_trials import Trial, best_factor, paired
from treadle.recipes.bench.par_world import RECALL, SUMS, WorldSize, base_of, facts_of, sums_of, tokenizer_of
from treadle.recipes.bench.result import finished_runs
from treadle.toml import load_toml

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


pytestmark = pytest.mark.usefixtures("quiet_trl")


@pytest.fixture
def config() -> ParClaimsRun:
    return load_toml(BENCHMARKS / "par-claims.toml", ParClaimsRun)


def run(arm: str, stage: str, seed: int, accuracy: float, *, factor: float = 1.0, active: float = 0.3) -> dict:
    measures = dict.fromkeys(("accuracy", "recall", "sums", "recall_first", "sums_first"), accuracy)
    return {"arm": arm, "stage": stage, "seed": seed, "factor": factor, **measures, "active": [active, active]}


def test_sums_are_right_and_facts_are_a_table() -> None:
    for example in sums_of(40, terms=5, seed=3, name="test"):
        digits = [int(word) for word in example.prompt.removeprefix("sum ").removesuffix(" =").split()]
        steps, answer = example.completion.split(" # ")
        totals = [int(word) for word in steps.split()]
        assert totals == [sum(digits[: end + 1]) % 10 for end in range(1, 5)]
        assert int(answer) == totals[-1]
        assert example.label == example.completion.strip()
    facts = facts_of(24, seed=3, name="facts")
    assert len({fact.prompt for fact in facts}) == 24
    assert facts != facts_of(24, seed=4, name="facts")
    tokenizer = tokenizer_of()
    for example in facts:
        tokens = tokenizer(example.prompt + example.completion)["input_ids"]
        assert tokenizer.pad_token_id not in tokens  # every word is known


def test_every_claim_names_arms_of_the_study(config: ParClaimsRun) -> None:
    names = {arm.name for arm in config.arms}
    assert {claim.arm for claim in CLAIMS} | {claim.other for claim in CLAIMS} <= names
    assert len(names) == len(config.arms)
    assert len(config.seeds) >= 8
    assert not set(config.seeds) & set(config.tuning_seeds)


def test_random_labels_mix_both_kinds_and_keep_what_is_asked(config: ParClaimsRun, tmp_path: Path) -> None:
    world = world_of(config.model_copy(update={"base_steps": 2}), tmp_path)
    arms = {arm.name: arm for arm in config.arms}
    true = world.systems(Trial(arms["element .9"], "test", 5, 1.0))
    dealt = world.systems(Trial(arms["random labels"], "test", 5, 1.0))
    for name in (RECALL, SUMS):
        assert dealt[name].held_out == true[name].held_out
        facts = sum(example.prompt.startswith("look") for example in dealt[name].examples)
        # half of 600, with a standard deviation of 12
        assert 240 < facts < 360
        assert len(dealt[name].examples) == config.sums


def test_a_base_ends_where_it_does_its_share_of_the_sums(tmp_path: Path) -> None:
    size = WorldSize(width=16, layers=1, base_facts=2, base_steps=30)
    steps: list[int] = []
    base_of(replace(size, base_sums=1.0), tmp_path / "all", seed=0, progress=lambda _, step, __: steps.append(step))
    assert steps[-1] == 30  # so small a model never learns to add
    steps.clear()
    base_of(replace(size, base_sums=0.0), tmp_path / "none", seed=0, progress=lambda _, step, __: steps.append(step))
    assert steps == []  # what is asked of it is had before the first step


def test_runs_of_a_seed_have_one_base(config: ParClaimsRun, smallest_world, tmp_path: Path) -> None:
    small = smallest_world(config, ("full",), 1)
    runs = tmp_path / "runs.jsonl"
    par_claims(small, runs=runs, work=tmp_path / "here")
    recorded = list(finished_runs(runs))
    assert {run["seed"]: run["base_sha256"] for run in recorded}.keys() == {100, 0}
    assert recorded[0]["base_sha256"] != recorded[1]["base_sha256"]  # worlds have bases of their own
    elsewhere = small.model_copy(update={"base_steps": 3, "factors": (1.0, 2.0)})  # as another machine would train it
    with pytest.raises(MismatchError, match=r"seed 100 began on base .* delete that seed's lines"):
        par_claims(elsewhere, runs=runs, work=tmp_path / "there")
    assert list(finished_runs(runs)) == recorded


def test_the_rate_is_the_one_with_the_best_mean(config: ParClaimsRun) -> None:
    arm = config.arms[0]
    runs = [
        run(arm.name, "tune", seed, value + 0.1 * (seed == 101), factor=factor)
        for factor, value in ((0.5, 0.3), (1.0, 0.5), (2.0, 0.5), (4.0, 0.1))
        for seed in config.tuning_seeds
    ]
    assert best_factor(config, runs, arm) == 1.0


def test_verdicts_follow_the_intervals(config: ParClaimsRun) -> None:
    tests = []
    for seed in config.seeds:
        wobble = 0.01 * (seed % 3)
        tests += [
            run("element .9", "test", seed, 0.6 + wobble),
            run("random element .9", "test", seed, 0.5 - wobble),
            run("dense", "test", seed, 0.7 + wobble),
            run("full", "test", seed, 0.6 + 0.1 * (-1) ** seed),
            run("rank .8", "test", seed, 0.59 + wobble),
        ]
    tunes = [
        run(arm.name, "tune", seed, 0.9 if arm.name == "rank .8" else 0.5, factor=factor)
        for arm in config.arms
        for seed in config.tuning_seeds
        for factor in config.factors
    ]
    found = summary(config, tests + tunes)
    verdicts = {(row["arm"], row["other"], row["measure"]): row["verdict"] for row in found.rows if "claim" in row}
    assert verdicts["element .9", "random element .9", "accuracy"] == "reproduced"
    assert verdicts["element .9", "dense", "accuracy"] == "not reproduced"
    assert verdicts["element .9", "full", "accuracy"] == "unclear"
    assert verdicts["element .95", "full", "accuracy"] == "not run"
    assert found.settings["ours"] == "rank .8"
    assert found.metrics["ours_minus_dense_lowrank_lower95"].holds is False
    assert found.metrics["claims_reproduced"].value == sum(v == "reproduced" for v in verdicts.values())


def test_a_study_without_all_seeds_judges_nothing(config: ParClaimsRun) -> None:
    found = summary(config, [run("full", "test", 0, 0.5), run("dense", "test", 0, 0.4)])
    assert all(metric.holds is None for metric in found.metrics.values())
    assert math.isnan(found.metrics["ours_minus_full_lower95"].value)
    assert paired([run("full", "test", 0, 0.5)], "full", "dense", "accuracy") == []


def test_a_small_study_runs_and_resumes(config: ParClaimsRun, smallest_world, tmp_path: Path) -> None:
    small = smallest_world(config, ("rank .8", "full"), 1)
    runs = tmp_path / "runs.jsonl"
    found = par_claims(small, runs=runs, work=tmp_path)
    recorded = list(finished_runs(runs))
    assert [(r["arm"], r["stage"]) for r in recorded[:2]] == [("full", "tune"), ("rank .8", "tune")]
    assert len(recorded) == 4
    assert recorded[0]["active"] == [1.0, 1.0]
    assert max(recorded[1]["active"]) < 1.0
    assert found.rows[0]["seeds"] == 1
    par_claims(small, runs=runs, work=tmp_path)
    assert list(finished_runs(runs)) == recorded
