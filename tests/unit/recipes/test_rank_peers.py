"""Peers: what a plan is held against shares out the same budget, and costs the plan nothing."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest

from treadle.configs.plan import PlanRun, ProbeText, Replan
from treadle.errors import InputError, MismatchError
from treadle.family.plan import RankPlan
from treadle.ranks.allocation import Budget
from treadle.ranks.controls import CONTROLS, Control, controls
from treadle.ranks.jacobian import JacobianSettings
from treadle.ranks.lowrank import LowRankSettings
from treadle.ranks.perturbation import PerturbationSettings
from treadle.recipes.plan import plan, replan


def test_the_uniform_peer_is_uniform_whatever_rule_the_plan_goes_by(plan_run: PlanRun) -> None:
    (peer,) = plan(plan_run.model_copy(update={"compare": ("uniform",), "rule": "sqrt-per-parameter"})).peers
    assert max(peer.ranks.values()) - min(peer.ranks.values()) <= 1  # the rest of a budget raises some by one


def test_a_control_is_planned_as_it_was_shown_beside_the_plan(plan_run: PlanRun, tmp_path: Path) -> None:
    plan_run = plan_run.model_copy(update={"rule": "sqrt-per-parameter"})
    peers = plan(plan_run.model_copy(update={"compare": CONTROLS})).peers
    saved = plan_run.out / "scores.json"
    for peer in peers:
        control = cast("Control", peer.name)
        again = replan(Replan(scores=saved, out=tmp_path / control, mean_rank=3, rule=plan_run.rule, control=control))
        assert {name: row.rank for name, row in again.plan.modules.items()} == peer.ranks
        assert again.plan.provenance["control"] == peer.name
        assert again.plan.provenance["probe_text"] == "public: pydoc"
    with pytest.raises(InputError, match="'reversed' is in the comparison already"):
        replan(Replan(scores=saved, out=tmp_path / "more", mean_rank=3, control="reversed", compare=("reversed",)))


def test_peers_share_out_the_same_budget(plan_run: PlanRun) -> None:
    names = ("uniform", "shuffled", "shuffled-in-shape", "reversed", "floor", "sqrt", "jacobian", "eva")
    text = ProbeText(sequences=8, tokens=16)  # of which EVA has rows enough for twice the mean rank
    made = plan(plan_run.model_copy(update={"compare": names, "text": text}))
    peers = {peer.name: peer for peer in made.peers}
    assert tuple(peers) == names
    assert tuple(controls(made.scores, seed=0)) == CONTROLS
    spent = {name: peer.parameters for name, peer in peers.items()}
    total = made.plan.count().total
    cheapest = min(shape.in_features + shape.out_features for shape in made.scores.shapes().values())
    limit = int(made.plan.provenance["budget"].split()[0])
    assert all(limit - cheapest < spent[name] <= limit for name in names if name != "floor")
    assert spent["floor"] <= limit
    assert peers["uniform"].rank_correlation is None or abs(peers["uniform"].rank_correlation) < 1
    assert peers["uniform"].scores is peers["floor"].scores is peers["floor"].score_correlation is None
    assert 0 < peers["sqrt"].moved < peers["uniform"].moved  # roots lie between the scores and all the same
    assert peers["reversed"].rank_correlation is not None
    assert peers["reversed"].rank_correlation < 0
    assert peers["jacobian"].scores is not None
    assert peers["jacobian"].score_correlation is not None
    sizes = {name: shape.in_features + shape.out_features for name, shape in made.scores.shapes().items()}
    for peer in made.peers:
        own = {name: row.rank for name, row in made.plan.modules.items()}
        gained = sum(sizes[n] * max(0, rank - own.get(n, 0)) for n, rank in peer.ranks.items())
        assert gained - peer.moved == peer.parameters - total  # what one side lacks, the other has
    assert sorted(path.name for path in plan_run.out.iterdir()) == [
        "plan.json",
        "scores-eva.json",
        "scores-jacobian.json",
        "scores.json",
    ]


def test_peers_compare_what_the_plan_compares(plan_run: PlanRun, tmp_path: Path) -> None:
    own = PerturbationSettings(trials=1, output="all", metric="l2")
    made = plan(plan_run.model_copy(update={"probe": own, "compare": ("jacobian", "perturbation-lowrank")}))
    settings = {peer.name: dict(peer.scores.settings) for peer in made.peers if peer.scores is not None}
    assert settings == {
        "jacobian": asdict(JacobianSettings(output="all")),
        "perturbation-lowrank": asdict(LowRankSettings(output="all", metric="l2")),
    }
    saved = plan_run.out / "scores.json"
    assert replan(Replan(scores=saved, out=tmp_path / "again", mean_rank=3, compare=("jacobian",))).peers
    last = plan_run.model_copy(update={"out": tmp_path / "last", "probe": JacobianSettings(), "compare": ()})
    plan(last)
    shutil.copy(last.out / "scores.json", plan_run.out / "scores-jacobian.json")
    with pytest.raises(MismatchError, match=r"scores-jacobian.json: measured with other settings \(output\)"):
        replan(Replan(scores=saved, out=tmp_path / "other", mean_rank=3, compare=("jacobian",)))


def test_a_peer_that_cannot_be_made_costs_the_plan_nothing(plan_run: PlanRun) -> None:
    names = ("gradient", "uniform", "eva", "jacobian")  # without answers, and with too few rows
    text = ProbeText(sequences=3, tokens=5, batch=1)
    made = plan(plan_run.model_copy(update={"compare": names, "text": text}))
    assert [peer.name for peer in made.peers] == ["uniform", "jacobian"]
    assert set(made.cannot) == {"gradient", "eva"}
    assert made.cannot["gradient"].startswith("the gradient probe needs labels; ")
    assert "use larger batches (text.batch)" in made.cannot["eva"]
    assert RankPlan.load(plan_run.out / "plan.json") == made.plan
    assert not list(plan_run.out.parent.glob(".plan.*"))


def test_rules_that_buy_nothing_cost_the_plan_nothing(plan_run: PlanRun) -> None:
    shares = {"mean_rank": None, "budget": Budget("ranks", 1), "minimum": 0, "multiple": 1}
    made = plan(plan_run.model_copy(update={**shares, "compare": ("floor", "ranking")}))
    assert [peer.name for peer in made.peers] == ["ranking"]
    assert "buys not one rank" in made.cannot["floor"]


def test_scores_of_other_text_are_no_peers(plan_run: PlanRun, tmp_path: Path) -> None:
    plan(plan_run.model_copy(update={"compare": ("jacobian",)}))
    other = {"out": tmp_path / "other", "probe": JacobianSettings(), "text": ProbeText(sequences=3, tokens=5)}
    plan(plan_run.model_copy(update=other))
    shutil.copy(tmp_path / "other" / "scores.json", plan_run.out / "scores-jacobian.json")
    with pytest.raises(MismatchError, match=r"scores-jacobian.json: measured with other settings \(seed or text\)"):
        replan(Replan(scores=plan_run.out / "scores.json", out=tmp_path / "again", mean_rank=3, compare=("jacobian",)))


def test_a_peers_scores_are_held_against_the_plans_own(plan_run: PlanRun, tmp_path: Path) -> None:
    first = plan(plan_run.model_copy(update={"compare": ("jacobian",), "probe": PerturbationSettings()}))
    saved = plan_run.out / "scores-jacobian.json"
    (peer,) = replan(Replan(scores=saved, out=tmp_path / "again", mean_rank=3, compare=("perturbation",))).peers
    assert peer.scores == first.scores


def test_what_an_interrupted_peer_has_left_goes_with_the_next_plan(plan_run: PlanRun, tmp_path: Path) -> None:
    left, foreign = tmp_path / ".plan.jacobian.probe", tmp_path / ".plan.b.jacobian.probe"
    for path in (left, foreign):
        path.write_bytes(b"{}\n")
    plan(plan_run)
    assert (left.exists(), foreign.exists()) == (False, True)  # the second is a probe's of a plan "plan.b"


def test_scores_at_another_mean_rank_are_no_peers(plan_run: PlanRun, tmp_path: Path) -> None:
    text = ProbeText(sequences=8, tokens=16)  # of which EVA has rows enough
    plan(plan_run.model_copy(update={"text": text, "compare": ("eva",)}))
    saved, out = plan_run.out / "scores.json", tmp_path / "again"
    with pytest.raises(
        MismatchError, match=r"scores-eva.json: measured with other settings \(rank\); run treadle plan"
    ):
        replan(Replan(scores=saved, out=out, mean_rank=4, compare=("eva",)))
    assert not out.exists()
    assert replan(Replan(scores=saved, out=out, mean_rank=3, compare=("eva",))).peers[0].name == "eva"


def test_fewer_ranks_than_modules_are_held_against_uniform_ones(plan_run: PlanRun) -> None:
    changes = {"mean_rank": None, "budget": Budget("ranks", 10), "rule": "floor", "compare": ("uniform",)}
    made = plan(plan_run.model_copy(update=changes))
    (peer,) = made.peers
    assert len(peer.ranks) == len(made.scores.modules) == 14
    assert sorted(peer.ranks.values()) == [0] * 4 + [1] * 10
