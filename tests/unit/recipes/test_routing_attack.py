"""Malicious adapters: they are what they claim to be, inflating gains nothing from who measures, a leak is counted."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import torch

from treadle.configs.bench.routing_quality import RoutingAttackRun
from treadle.configs.fleet import FleetSettings
from treadle.recipes.bench import routing_attack as bench
from treadle.recipes.bench.attacks import ATTACKS, malicious_B, self_declared, standing_out
from treadle.recipes.bench.result import finished_runs, record_run
from treadle.recipes.bench.routing_attack import DEFAULT, ROUTINGS, quick_routing_attack, routing_attack, summary
from treadle.recipes.fleet import grow_fleet
from treadle.routing import routed
from treadle.routing.calibration import LatentMoments


@pytest.fixture
def config(tiny_fleet: FleetSettings) -> RoutingAttackRun:
    """Two generated tasks of a few hundred tokens on a tiny base."""
    return RoutingAttackRun(
        seeds=(0,), tasks=("chain_sum", "syllogism"), limit=2, barred=1, known=4, inflation=1e3, fleet=tiny_fleet
    )


def moments(seed: int, scale: torch.Tensor) -> LatentMoments:
    generator = torch.Generator().manual_seed(seed)
    return LatentMoments.of(torch.randn(500, scale.shape[0], generator=generator).double() * scale + 0.1)


def run_of(seed: int, captured: int, unpermitted: int = 0) -> dict[str, object]:
    """A recorded run of one attack on one victim under one routing, ten decisions."""
    counts = {
        "decisions": 10,
        "barred": 5,
        "captured": captured,
        "kept": 10 - captured,
        "captured_unpermitted": unpermitted,
    }
    return {"seed": seed, "rows": [{"victim": "a", "attack": "aimed", "routing": DEFAULT, **counts}]}


def test_the_aim_is_the_direction_where_the_victim_stands_out_most() -> None:
    # Public text has a large fifth direction, so that the victim's largest is not the one that stands out.
    victim, public = moments(0, torch.tensor([1.0, 3.0, 1.0, 1.0, 9.0])), moments(1, torch.tensor([1.0] * 4 + [9.0]))
    w = standing_out(victim, public)

    def ratio(v: torch.Tensor) -> torch.Tensor:
        one, two = (((m.covariance @ v) * v).sum(0) + (m.mean @ v).square() for m in (victim, public))
        return one / two

    others = torch.randn(5, 5000, generator=torch.Generator().manual_seed(2)).double()
    assert float(ratio(w[:, None])) >= float(ratio(others).max())
    assert w.abs().argmax() == 1
    assert float(w.norm()) == pytest.approx(1.0)


def test_malicious_adapters_have_the_norms_that_they_claim(config: RoutingAttackRun, tmp_path: Path) -> None:
    honest = grow_fleet(config.fleet.run(config.tasks, out=tmp_path / "fleet")).bank.adapters[0]
    one, two = (dict.fromkeys(honest.lora_B, moments(seed, torch.ones(2))) for seed in (0, 1))
    made = malicious_B(honest, one, two, 10.0, seed=0)
    again = malicious_B(honest, one, two, 10.0, seed=0)
    for module, B in honest.lora_B.items():
        torch.testing.assert_close(made["inflated"][module], 10.0 * B)
        assert torch.linalg.matrix_rank(made["aimed"][module]) == 1
        for attack in ("aimed", "control"):
            assert float(made[attack][module].norm()) == pytest.approx(float(B.norm()), rel=1e-5)
            assert torch.equal(made[attack][module], again[attack][module])


def test_a_liar_is_eligible_everywhere_and_changes_nobody_elses_statistics(
    config: RoutingAttackRun, tmp_path: Path
) -> None:
    bank = grow_fleet(config.fleet.run(config.tasks, out=tmp_path / "fleet")).bank
    lying = self_declared(bank, "syllogism")
    for module, factors in lying.layers.items():
        assert factors.eligible.all()
        assert factors.mean[1] == pytest.approx(1e-3 * float(bank.layers[module].mean[1]))
        assert factors.std[1] == factors.mean[1]
        assert factors.mean[0] == bank.layers[module].mean[0]
        assert factors.std[0] == bank.layers[module].std[0]


def shares(rows: object) -> dict[tuple[str, str], Mapping[str, float]]:
    return {(str(row["attack"]), str(row["routing"])): row for row in cast("list[dict[str, float]]", rows)}


def test_attacks_capture_what_they_should_and_nothing_where_they_are_not_permitted(
    config: RoutingAttackRun, tmp_path: Path
) -> None:
    result = routing_attack(config, runs=tmp_path / "runs.jsonl", work=tmp_path / "work")
    found = shares(result.rows)
    own = {routing.name for routing in ROUTINGS if routing.calibration == "own"}
    assert found.keys() == {
        (attack, routing.name)
        for attack in ATTACKS
        for routing in ROUTINGS
        if attack != "self-declared" or routing.name in own
    }
    for by in ("sequence", "token"):
        assert found["inflated", f"norm:{by}"]["share"] == 1.0  # a thousand times the norm of its honest B
        assert found["self-declared", f"seqr:{by}, own"]["share"] == 1.0
    assert found["inflated", "norm:sequence"]["decisions"] == 2 * config.limit
    assert found["inflated", "norm:token"]["decisions"] > 100 * config.limit  # 14 layers, more than ten tokens
    assert found["inflated", "norm:sequence"]["barred"] == 2
    assert all(row["kept"] + row["captured"] <= row["decisions"] for row in found.values())
    assert result.metrics["captured_when_not_permitted"].value == 0
    assert result.metrics["captured_when_not_permitted"].holds is True
    assert str(tmp_path / "work") not in str(result.to_json())


def test_inflating_gains_nothing_where_the_server_measures(
    config: RoutingAttackRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = tuple(r for r in ROUTINGS if r.name in {"seqr:sequence, own", "seqr:sequence, analytic", DEFAULT})
    monkeypatch.setattr(bench, "ROUTINGS", calibrated)
    found = [
        shares(
            routing_attack(
                # Powers of two keep every significand, so that no rounding moves a decision.
                config.model_copy(update={"inflation": inflation}),
                runs=tmp_path / f"{inflation}.jsonl",
                work=tmp_path / "work",
            ).rows
        )
        for inflation in (1.0, 1024.0)
    ]
    for routing in calibrated:
        assert found[0]["inflated", routing.name] == found[1]["inflated", routing.name]


def test_a_leak_past_the_permitted_set_is_counted(
    config: RoutingAttackRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROUTINGS", ROUTINGS[:2])
    monkeypatch.setattr(routed, "permitted_mask", lambda *_, **__: None)  # type: ignore[misc]
    result = routing_attack(config, runs=tmp_path / "runs.jsonl", work=tmp_path / "work")
    assert result.metrics["captured_when_not_permitted"].value > 100
    assert result.metrics["captured_when_not_permitted"].holds is False


def test_a_study_runs_only_the_seeds_that_are_missing(
    config: RoutingAttackRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROUTINGS", ROUTINGS[:1])
    runs = tmp_path / "runs.jsonl"
    record_run(runs, run_of(0, captured=4))
    routing_attack(config.model_copy(update={"seeds": (0, 1)}), runs=runs, work=tmp_path / "work")
    assert [run["seed"] for run in finished_runs(runs)] == [0, 1]
    assert not (tmp_path / "work" / "attack-0").exists()


def test_the_figures_are_over_all_cells_and_a_part_of_the_seeds_decides_nothing(config: RoutingAttackRun) -> None:
    study = config.model_copy(update={"seeds": (0, 1)})
    result = summary(study, [run_of(0, captured=2), run_of(1, captured=7)])
    assert result.rows[0]["share"] == pytest.approx(0.45)
    assert (result.rows[0]["least"], result.rows[0]["most"]) == (0.2, 0.7)
    assert result.metrics["default_largest_capture_aimed"].value == 0.7
    assert result.metrics["captured_when_not_permitted"].holds is True
    assert (
        summary(study, [run_of(0, 2, unpermitted=1), run_of(1, 7)]).metrics["captured_when_not_permitted"].holds
        is False
    )
    assert summary(study, [run_of(0, captured=2)]).metrics["captured_when_not_permitted"].holds is None


def test_a_quick_study_decides_nothing(
    config: RoutingAttackRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ROUTINGS", ROUTINGS[-2:])
    result = quick_routing_attack(config, work=tmp_path / "work")
    assert all(metric.holds is None for metric in result.metrics.values())
    assert result.metrics["captured_when_not_permitted"].value == 0
