"""Who is connected: a name belongs to one node."""

from pathlib import Path

import pytest

from treadle.errors import InputError
from treadle.family.family import AdapterFamily
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity
from treadle.train.federated.client import LocalResult, Silo, client_app
from treadle.train.federated.grid import InProcessGrid
from treadle.train.federated.roster import Roster, enrolled


@pytest.fixture
def family() -> AdapterFamily:
    plan = RankPlan.uniform({"one": LayerShape(6, 5)}, rank=2)
    return AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=0)


def grid_of(root: Path, *names: str) -> InProcessGrid:
    """A node for each name, whoever else has it."""

    def train(*_: object) -> LocalResult:
        raise AssertionError("nobody is asked to train")

    silos = {100 + place: Silo(name, root / str(place), train) for place, name in enumerate(names)}
    app = client_app(lambda context: silos[context.node_id])
    return InProcessGrid(app, {node: {} for node in silos})


def test_two_nodes_of_one_name_end_the_run(tmp_path: Path, family: AdapterFamily) -> None:
    with pytest.raises(InputError, match="two nodes call themselves 'north'; give every silo a name and a key"):
        enrolled(Roster(), grid_of(tmp_path, "north", "north"), family, ["north"], timeout=1.0)


def test_a_node_that_is_no_client_is_left_alone(
    tmp_path: Path, family: AdapterFamily, caplog: pytest.LogCaptureFixture
) -> None:
    found = enrolled(Roster(), grid_of(tmp_path, "north", "west"), family, ["north", "south"], timeout=1.0)
    assert (list(found.seats), set(found.strangers)) == (["north"], {101})
    assert "calls itself 'west', which is no client of this run" in caplog.text
    assert found.family_bytes > 0  # north had to be sent the family
    again = enrolled(found, grid_of(tmp_path, "north", "west"), family, ["north", "south"], timeout=1.0)
    assert again == found  # nobody is asked twice
