"""Names that the command line spells out are those that the library knows."""

from typing import get_args

from treadle.cli.options import GranularityName, ScorerName
from treadle.cli.plan import ControlOption, RuleOption, UnitOption
from treadle.configs.evaluate import ROUTER
from treadle.ranks.allocation import Budget
from treadle.ranks.controls import CONTROLS
from treadle.ranks.rules import RULES
from treadle.routing.routed import Granularity
from treadle.routing.scorers import SCORERS


def test_scorers_and_granularities_are_the_librarys() -> None:
    assert set(get_args(ScorerName)) == {*SCORERS, ROUTER}
    assert set(get_args(GranularityName)) == set(get_args(Granularity))


def test_rules_and_units_of_a_budget_are_the_librarys() -> None:
    assert set(get_args(RuleOption)) == set(RULES)
    assert get_args(ControlOption) == CONTROLS
    for unit in get_args(UnitOption):
        assert Budget(unit, 1).unit == unit
