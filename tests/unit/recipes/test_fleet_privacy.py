"""What a fleet has cost: the largest, sums over adapters and silos, and "none" as soon as one part is unaccounted."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.plan import RankPlan
from treadle.privacy.joint import Cost, facts_of_silos
from treadle.recipes.fleet_privacy import fleet_privacy
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import Statistics

Make = Callable[[str, Provenance], Adapter]
CENTRAL = Provenance("dp-sgd", epsilon=3.0, delta=1e-5)


def federated(**silos: float | None) -> Provenance:
    costs = {name: Cost(epsilon, 1e-6 if epsilon else 0.0) for name, epsilon in silos.items()}
    known = [epsilon for epsilon in silos.values() if epsilon is not None]
    epsilon = max(known) if len(known) == len(silos) else None
    return Provenance("ffa", epsilon=epsilon, delta=1e-6 if epsilon else None, settings=facts_of_silos(costs))


@pytest.fixture
def family(make: SimpleNamespace, tiny_llama: LlamaForCausalLM) -> AdapterFamily:
    return make.family(tiny_llama, rank=2, kinds=["q_proj"])


@pytest.fixture
def bank_of(family: AdapterFamily) -> Callable[..., AdapterBank]:
    def bank(**members: Provenance) -> AdapterBank:
        B = {module: torch.ones(row.out_features, row.rank) for module, row in family.plan.modules.items()}
        return AdapterBank.build(family, [Adapter.of_family(family, n, B, provenance=p) for n, p in members.items()])

    return bank


def test_three_federations_over_three_silos(bank_of: Callable[..., AdapterBank]) -> None:
    three = {task: federated(north=8.0, south=4.0, east=2.0) for task in ("a", "b", "c")}
    found = fleet_privacy(bank_of(**three))
    assert (found.epsilon_disjoint, found.epsilon_shared, found.epsilon_everywhere) == (8.0, 24.0, 42.0)
    deltas = (found.delta_disjoint, found.delta_shared, found.delta_everywhere)
    assert deltas == pytest.approx((1e-6, 3e-6, 9e-6))
    assert found.statement == (
        "8 at δ = 1e-06 if no person is behind two adapters or in two silos; "
        "24 at δ = 3e-06 for one behind all of them, in one silo each; 42 at δ = 9e-06 for one in every silo"
    )


def test_adapters_of_one_place_have_no_silos(bank_of: Callable[..., AdapterBank]) -> None:
    found = fleet_privacy(bank_of(a=CENTRAL, b=replace(CENTRAL, epsilon=1.0)))
    assert (found.epsilon_disjoint, found.epsilon_shared, found.epsilon_everywhere) == (3.0, 4.0, 4.0)
    assert found.statement == (
        "3 at δ = 1e-05 if no person is behind two adapters; 4 at δ = 2e-05 for one behind all of them"
    )


@pytest.mark.parametrize(
    "unaccounted",
    [Provenance("sft"), federated(north=8.0, south=None), replace(federated(north=8.0, south=None), epsilon=8.0)],
)
def test_one_unaccounted_adapter_makes_it_none(bank_of: Callable[..., AdapterBank], unaccounted: Provenance) -> None:
    found = fleet_privacy(bank_of(a=CENTRAL, b=unaccounted))
    assert (found.epsilon_disjoint, found.epsilon_shared, found.epsilon_everywhere) == (None, None, None)
    assert found.statement == "none (b states no ε)"


def test_a_plan_probed_on_private_text_makes_it_none(
    family: AdapterFamily, bank_of: Callable[..., AdapterBank]
) -> None:
    probed = RankPlan(family.plan.modules, {"probe_text": "private: the wards' reports"})
    found = fleet_privacy(replace(bank_of(a=CENTRAL), family=replace(family, plan=probed)))
    assert found.statement == "none (the rank plan was probed on private text)"


@pytest.mark.parametrize(("epsilon", "statement"), [(2.0, "5 at δ"), (None, "none (the calibration read")])
def test_released_statistics_are_paid_for_or_make_it_none(
    bank_of: Callable[..., AdapterBank], epsilon: float | None, statement: str
) -> None:
    bank = bank_of(a=CENTRAL)
    numbers = {module: torch.ones(1, dtype=torch.float64) for module in bank.layers}
    delta = 1e-4 if epsilon else 0.0
    released = Statistics(
        numbers, numbers, "private", "", "", 0, (), (bank.adapters[0].digest,), epsilon=epsilon, delta=delta
    )
    found = fleet_privacy(bank.with_statistics(released))
    assert found.statement.startswith(statement)
    assert found.delta_disjoint == pytest.approx(1.1e-4 if epsilon else 0.0)  # 1e-5 of training beside it
