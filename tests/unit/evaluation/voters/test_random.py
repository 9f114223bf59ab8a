"""Chance."""

from collections import Counter
from collections.abc import Callable

import pytest

from treadle.errors import ConfigError
from treadle.evaluation.voters import Poll, prepared
from treadle.evaluation.voters.random import RandomVoter
from treadle.progress import silent


def votes(poll: Poll, **settings: object) -> list[str | None]:
    return [vote.system for vote in prepared(RandomVoter("random", "lots", **settings), poll)(silent).votes]


def test_shares_are_exact_and_the_seed_says_who(poll: Callable[[int], Poll]) -> None:
    assert Counter(votes(poll(40))) == {"system1": 20, "system2": 20}
    assert Counter(votes(poll(40), shares=(0.3, 0.7))) == {"system1": 12, "system2": 28}
    assert Counter(votes(poll(5), shares=(0.0, 1.0))) == {"system2": 5}
    assert votes(poll(40), seed=3) == votes(poll(40), seed=3)
    assert votes(poll(40), seed=3) != votes(poll(40), seed=4)


def test_the_order_of_rows_does_not_tell_the_label(poll: Callable[[int], Poll]) -> None:
    drawn = [votes(poll(10), seed=seed) for seed in range(400)]
    shares = [sum(row[i] == "system1" for row in drawn) / 400 for i in range(10)]
    assert all(abs(share - 0.5) < 0.1 for share in shares)  # four standard deviations of a share of 400 coins


def test_what_are_no_shares_is_refused(poll: Callable[[int], Poll]) -> None:
    for wrong in ((0.5, 0.6), (-0.5, 1.5), (float("nan"), 0.5), ()):
        with pytest.raises(ValueError, match="add up to 1"):
            RandomVoter("random", "lots", shares=wrong)
    with pytest.raises(ConfigError, match="voter 'lots': 3 shares for 2 systems"):
        votes(poll(3), shares=(0.5, 0.25, 0.25))
