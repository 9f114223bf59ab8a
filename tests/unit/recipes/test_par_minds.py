"""The study of routed minds: who answers what in which way, and what is held against what."""

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from treadle.configs.bench.partition import ParMindsRun
from treadle.recipes.bench.par_minds import DEFAULT, WAYS, par_minds, summary
from treadle.recipes.bench.par_world import RECALL, SUMS, WorldSize, public_text
from treadle.recipes.bench.result import finished_runs
from treadle.toml import load_toml

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"

pytestmark = pytest.mark.usefixtures("quiet_trl")


@pytest.fixture
def config() -> ParMindsRun:
    return load_toml(BENCHMARKS / "par-minds.toml", ParMindsRun)


def run(arm: str, seed: int, *, summed: float, routed: float) -> dict:
    """A finished run of which half the sums' prompts go to the other mind."""
    answered = dict.fromkeys(WAYS, summed) | {DEFAULT: routed}
    by_system = {f"{way} {name}": value for way, value in answered.items() for name in (RECALL, SUMS)}
    sent = {RECALL: {RECALL: 1.0, SUMS: 0.0, "base": 0.0}, SUMS: {RECALL: 0.3, SUMS: 0.5, "base": 0.2}}
    measures = dict.fromkeys(("accuracy", RECALL, SUMS, f"{RECALL}_first", f"{SUMS}_first"), summed)
    key = {"arm": arm, "stage": "test", "seed": seed, "factor": 1.0, "active": [0.3, 0.1]}
    return {**key, **measures, **answered, **by_system, "sent": {"public": sent, "own": sent}}


def test_every_way_is_held_against_the_sum_of_the_first_arm(config: ParMindsRun) -> None:
    first, second = (arm.name for arm in config.arms)
    runs = [run(first, seed, summed=0.5, routed=0.52 + 0.01 * (seed % 2)) for seed in config.seeds]
    runs += [run(second, seed, summed=0.4, routed=0.45) for seed in config.seeds[1:]]
    runs += [{"arm": second, "stage": "test", "seed": config.seeds[0], "factor": 1.0, "refused": "no rank is left"}]
    found = summary(config, runs)
    rows = {(row["arm"], row["way"]): row for row in found.rows if "way" in row}
    assert rows[first, "summed"]["minus_first_sum"] == 0.0
    assert rows[first, DEFAULT]["minus_first_sum"] == pytest.approx(0.025)
    # t(.975, 7) = 2.3646 standard errors of eight values that are .005 off their mean, on either side
    assert rows[first, DEFAULT]["low"] == pytest.approx(0.025 - 2.3646 * 0.005 / math.sqrt(7), abs=1e-6)
    assert rows[second, "summed"]["minus_first_sum"] == pytest.approx(-0.1)
    assert rows[second, DEFAULT]["minus_first_sum"] == pytest.approx(-0.05)
    assert [rows[arm, DEFAULT]["seeds"] for arm in (first, second)] == [8, 7]
    assert rows[first, DEFAULT]["reached"] == pytest.approx(0.75)
    assert rows[first, DEFAULT]["left_to_base"] == pytest.approx(0.1)
    assert "reached" not in rows[first, "public token"]  # it chooses anew at every token and layer
    assert found.metrics["routed_minus_summed_lower95"].holds is True
    assert found.metrics["routed_minus_summed"].value == pytest.approx(0.025)


def test_a_study_without_all_worlds_judges_nothing(config: ParMindsRun) -> None:
    assert math.isnan(summary(config, []).metrics["routed_minus_summed"].value)
    few = summary(config, [run(config.arms[0].name, seed, summed=0.5, routed=0.6) for seed in config.seeds[:3]])
    assert few.metrics["routed_minus_summed_lower95"].value == pytest.approx(0.1)
    assert few.metrics["routed_minus_summed_lower95"].holds is None


def test_minds_need_ranks_and_a_frozen_a(config: ParMindsRun) -> None:
    arm = config.arms[0]
    for changed in (arm.model_copy(update={"granularity": "element"}), arm.model_copy(update={"moves_A": True})):
        with pytest.raises(ValidationError, match="has no minds"):
            ParMindsRun.model_validate(config.model_dump() | {"arms": [changed.model_dump(), arm.model_dump()]})


def test_public_text_is_all_that_the_base_knows_and_as_many_sums() -> None:
    size = WorldSize(base_facts=8, terms=3)
    text = public_text(size, seed=0)
    keys = [int("".join(one.split()[2:4])) for one in text if one.startswith("look")]
    assert sorted(keys) == list(range(92, 100))
    assert [one.index("=") for one in text if one.startswith("sum")] == [10] * 8


def test_a_small_study_answers_in_every_way_and_resumes(config: ParMindsRun, smallest_world, tmp_path: Path) -> None:
    small = smallest_world(config, (config.arms[0].name,), 2)
    runs = tmp_path / "runs.jsonl"
    par_minds(small, runs=runs, work=tmp_path)
    recorded = list(finished_runs(runs))
    for one in recorded:
        assert one["summed"] == one["accuracy"]
        for way in WAYS:
            assert one[way] == pytest.approx((one[f"{way} {RECALL}"] + one[f"{way} {SUMS}"]) / 2)
        for sent in one["sent"].values():
            assert all(sum(of_system.values()) == pytest.approx(1.0) for of_system in sent.values())
    par_minds(small, runs=runs, work=tmp_path)
    assert list(finished_runs(runs)) == recorded
