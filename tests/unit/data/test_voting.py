"""Majorities, ties, and Fleiss' κ against Fleiss' own table and a definition by pairs of voters."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.data.voting import Tie, VotingRule, decide, fleiss_kappa
from treadle.errors import ConfigError

AB = ("a", "b")

# Fleiss 1971, table 1: 30 patients, 6 psychiatrists; how many of them chose each of
# depression, personality disorder, schizophrenia, neurosis, other.
PATIENTS = """
0 0 0 6 0 | 0 3 0 0 3 | 0 1 4 0 1 | 0 0 0 0 6 | 0 3 0 3 0 | 2 0 4 0 0 | 0 0 4 0 2 | 2 0 3 1 0 | 2 0 0 4 0 | 0 0 0 0 6
1 0 0 5 0 | 1 1 0 4 0 | 0 3 3 0 0 | 1 0 0 5 0 | 0 2 0 3 1 | 0 0 5 0 1 | 3 0 0 1 2 | 5 1 0 0 0 | 0 2 0 4 0 | 1 0 2 0 3
0 0 0 0 6 | 0 1 0 5 0 | 0 2 0 1 3 | 2 0 0 4 0 | 1 0 0 4 1 | 0 5 0 1 0 | 4 0 0 0 2 | 0 2 0 4 0 | 1 0 5 0 0 | 0 0 0 0 6
"""
DIAGNOSES = ("depression", "personality", "schizophrenia", "neurosis", "other")


def ballots(table: str, names: Sequence[str]) -> list[list[str]]:
    """One list of votes a row of counts."""
    rows = [[int(cell) for cell in row.split()] for line in table.strip().splitlines() for row in line.split("|")]
    return [[name for name, count in zip(names, row, strict=True) for _ in range(count)] for row in rows]


def test_kappa_is_that_of_fleiss_own_example() -> None:
    # 0.4302445: kappam.fleiss of R's irr on these data, as statsmodels' test_inter_rater.py records it; Fleiss: .430
    found = fleiss_kappa(ballots(PATIENTS, DIAGNOSES), DIAGNOSES)
    assert (found.rows, found.voters) == (30, 6)
    assert found.overall == pytest.approx(0.4302445, abs=5e-8)


def by_pairs(rows: Sequence[Sequence[str]], same: dict[str, str]) -> float | None:
    """(agreement − chance)/(1 − chance): agreement by counting pairs of voters, chance by drawing two of all votes."""
    mapped = [[same[vote] for vote in row] for row in rows]
    pairs = [a == b for row in mapped for a, b in itertools.combinations(row, 2)]
    votes = [vote for row in mapped for vote in row]
    chance = sum((votes.count(name) / len(votes)) ** 2 for name in set(votes))
    return None if len(set(votes)) == 1 else (sum(pairs) / len(pairs) - chance) / (1 - chance)


@given(
    st.integers(2, 5).flatmap(
        lambda voters: st.lists(st.lists(st.sampled_from("abc"), min_size=voters, max_size=voters), min_size=1)
    )
)
def test_kappa_is_what_pairs_of_voters_say(rows: list[list[str]]) -> None:
    found = fleiss_kappa(rows, "abc")
    expected = {name: by_pairs(rows, {other: str(other == name) for other in "abc"}) for name in "abc"}
    assert found.overall == pytest.approx(by_pairs(rows, {name: name for name in "abc"}), abs=1e-9)
    assert {**found.by_system} == pytest.approx(expected, abs=1e-9)
    assert found.overall is None or found.overall <= 1.0


def test_full_agreement_is_exactly_one_and_one_system_alone_is_undefined() -> None:
    assert fleiss_kappa([["a"] * 3, ["b"] * 3, ["a"] * 3], AB).overall == 1.0
    assert fleiss_kappa([["a"] * 3] * 4, AB).overall is None
    assert fleiss_kappa([], AB).overall is None
    assert fleiss_kappa([["a"], ["b"]], AB).overall is None


def test_rows_with_a_missing_vote_do_not_count() -> None:
    whole = [["a", "a", "b"], ["b", "b", "b"], ["a", "b", "a"]]
    assert fleiss_kappa([*whole, ["a", None, "b"]], AB) == fleiss_kappa(whole, AB)
    with pytest.raises(ConfigError, match="different numbers of voters"):
        fleiss_kappa([["a"], ["a", "b"]], AB)


@given(st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=7).filter(lambda votes: len(votes) % 2 == 1))
def test_odd_votes_on_two_systems_always_have_a_majority(votes: list[str]) -> None:
    found = decide(votes, VotingRule(AB, len(votes)))
    assert found.system is not None
    assert not found.tied
    assert found.agreement == votes.count(found.system) / len(votes) > 0.5


@pytest.mark.parametrize(
    ("tie", "winner"),
    [("undecided", None), ("first-system", "a"), ("last-system", "c"), ("first-voter", "c"), (None, None)],
)
def test_a_tie_is_settled_by_the_declared_rule(tie: Tie | None, winner: str | None) -> None:
    rule = VotingRule(("a", "b", "c"), 5, tie or "undecided")
    found = decide(["b", "c", "a", "c", "a"], rule)
    assert (found.system, found.tied, found.agreement) == (winner, True, 0.4)


def test_a_missing_vote_can_tie_an_odd_poll() -> None:
    assert decide(["a", None, "b"], VotingRule(AB, 3)).system is None
    assert decide(["b", None, "a"], VotingRule(AB, 3, "first-voter")).system == "b"


def test_a_label_needs_its_quorum() -> None:
    votes = ["a", None, None]
    assert decide(votes, VotingRule(AB, 3)).system is None
    assert decide(votes, VotingRule(AB, 3, quorum=1)).system == "a"
    assert decide([None] * 3, VotingRule(AB, 3, quorum=1)).system is None


@pytest.mark.parametrize(
    ("systems", "voters", "quorum", "said"),
    [
        (AB, 4, None, "key 'tie': 4 voters on 2 systems can be split evenly; declare tie"),
        (("a", "b", "c"), 3, None, "key 'tie': 3 voters on 3 systems"),
        (("a",), 3, None, "key 'systems': two or more"),
        (("a", "a"), 3, None, "key 'systems': two or more"),
        (AB, 0, None, "key 'voters': nobody votes"),
        (AB, 3, 4, "key 'quorum': 4 votes of 3 voters"),
        (AB, 3, 0, "key 'quorum': 0 votes of 3 voters"),
    ],
)
def test_votes_that_cannot_be_counted_are_refused(
    systems: tuple[str, ...], voters: int, quorum: int | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said.replace("'", ".")):
        VotingRule(systems, voters, quorum=quorum)
    VotingRule(("a", "b", "c"), 1)  # one voter never ties
