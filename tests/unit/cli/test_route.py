"""`treadle route`: what its options say without asking the library."""

import inspect

from treadle.cli.route import route_command
from treadle.routing.abstention import LEVEL


def test_the_default_of_abstain_is_the_librarys() -> None:
    """Naming it would import torch for `--help`, so it is written twice."""
    assert inspect.signature(route_command).parameters["abstain"].default == LEVEL
