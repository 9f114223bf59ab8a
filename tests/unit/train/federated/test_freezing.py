"""Which modules keep their A, by share and round."""

import itertools

import pytest

from treadle.errors import InputError
from treadle.train.federated.freezing import Freezing

MODULES = tuple(f"layers.{i}.{kind}" for i in range(6) for kind in ("q", "v"))


def sizes(first: float, last: float, rounds: int) -> list[int]:
    freezing = Freezing(MODULES, first, last, rounds)
    return [len(freezing.frozen(server_round)) for server_round in range(1, rounds + 1)]


def test_the_share_moves_linearly_from_the_first_round_to_the_last() -> None:
    assert sizes(1.0, 0.0, 5) == [12, 9, 6, 3, 0]
    assert sizes(0.5, 0.5, 3) == [6, 6, 6]
    assert sizes(0.0, 1.0, 3) == [0, 6, 12]
    assert sizes(0.25, 1.0, 1) == [3]


def test_rounds_beyond_the_last_keep_its_share() -> None:
    assert len(Freezing(MODULES, 0.0, 1.0, 3).frozen(9)) == 12


def test_a_larger_share_holds_the_smaller_one() -> None:
    freezing = Freezing(MODULES, 1.0, 0.0, 13)
    sets = [freezing.frozen(server_round) for server_round in range(1, 14)]
    assert all(after < before for before, after in itertools.pairwise(sets))


def test_the_choice_hangs_on_names_alone() -> None:
    chosen = Freezing(MODULES, 0.5, 0.5, 1).frozen(1)
    assert Freezing(tuple(reversed(MODULES)), 0.5, 0.5, 1).frozen(1) == chosen
    assert {name.rsplit(".", 1)[1] for name in chosen} == {"q", "v"}
    assert chosen != set(MODULES[:6])


def test_always_means_that_no_A_ever_moves() -> None:
    assert Freezing(MODULES, 1.0, 1.0, 4).always
    assert not Freezing(MODULES, 1.0, 0.9, 4).always


@pytest.mark.parametrize(
    ("first", "last", "rounds"), [(1.1, 1.0, 2), (0.0, -0.1, 2), (float("nan"), 0.0, 2), (1.0, 1.0, 0)]
)
def test_impossible_shares_are_refused(first: float, last: float, rounds: int) -> None:
    with pytest.raises(InputError):
        Freezing(MODULES, first, last, rounds)
