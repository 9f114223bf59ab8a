"""Costs that stand side by side, and costs that add up."""

import pytest

from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.joint import Cost, facts_of_silos, largest, silos_of, together

NONE = Cost(None, 0.0)


def test_disjoint_people_pay_the_largest_and_one_person_pays_all() -> None:
    costs = [Cost(3.0, 1e-5), Cost(1.0, 1e-4)]
    assert largest(costs) == Cost(3.0, 1e-4)
    assert together(costs) == Cost(4.0, 1e-5 + 1e-4)


@pytest.mark.parametrize("join", [largest, together])
def test_one_that_nothing_accounts_for_makes_it_none(join) -> None:
    assert join([Cost(3.0, 1e-5), NONE, Cost(1.0, 1e-5)]) == NONE
    assert join([]) == NONE


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_together_bounds_what_the_accountant_composes(rate: float) -> None:
    """δ adds up as well, so the accountant is asked at the sum."""
    events = [MechanismEvent(noise, rate, steps) for noise, steps in ((1.1, 3), (2.0, 20), (0.8, 1))]
    apart = together([Cost(epsilon_of([event], delta=1e-5), 1e-5) for event in events])
    assert apart.epsilon is not None
    assert apart.delta == pytest.approx(3e-5)
    assert 0.4 * apart.epsilon < epsilon_of(events, delta=apart.delta) < apart.epsilon


def test_what_silos_spent_stands_among_other_settings() -> None:
    costs = {"north": Cost(8.0, 1e-6), "south": NONE}
    facts = facts_of_silos(costs)
    assert facts == {
        "epsilon of north": 8.0,
        "delta of north": 1e-6,
        "epsilon of south": "none",
        "delta of south": None,
    }
    assert silos_of({"rounds": 3, **facts, "rounds of north": 3}) == costs
    assert silos_of({"rounds": 3}) == {}


@pytest.mark.parametrize("damaged", [{"epsilon of x": 1.0}, {"epsilon of x": "8", "delta of x": 1e-6}])
def test_half_a_statement_is_none(damaged: dict[str, str | float]) -> None:
    assert silos_of(damaged) == {"x": NONE}
