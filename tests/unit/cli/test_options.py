"""Names that the command line spells out are those that the library knows."""

from typing import get_args

from treadle.cli.options import GranularityName, ScorerName
from treadle.configs.evaluate import ROUTER
from treadle.routing.routed import Granularity
from treadle.routing.scorers import SCORERS


def test_scorers_and_granularities_are_the_librarys() -> None:
    assert set(get_args(ScorerName)) == {*SCORERS, ROUTER}
    assert set(get_args(GranularityName)) == set(get_args(Granularity))
