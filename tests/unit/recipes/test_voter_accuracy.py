"""How often voters and panels of voters are right, against counting by hand and Condorcet's formula."""

from itertools import product

import pytest

from treadle.recipes.voter_accuracy import Panels, voter_accuracy

AB = ("a", "b")


def test_voters_labels_and_panels_are_counted_over_all_rows() -> None:
    truth = ["a", "a", "b", "b"]
    votes = {"right": ["a", "a", "b", "b"], "always": ["a", "a", "a", "a"], "silent": [None, "a", None, None]}
    found = voter_accuracy(["a", None, "b", "a"], votes, truth, AB)
    assert found.labels.estimate == 0.5
    assert {name: interval.estimate for name, interval in found.voters.items()} == {
        "right": 1.0,
        "always": 0.5,
        "silent": 0.25,
    }
    assert found.panels[1] == Panels(0.25, 1.75 / 3, 1.0, 3)
    # together: a; a; a tie of one against one; likewise
    assert found.panels[3] == Panels(0.5, 0.5, 0.5, 1)


def test_independent_voters_gain_as_condorcet_says() -> None:
    """Five voters who are right on 2 of 3 rows, independently: all combinations of right and wrong, once each."""
    cells = list(product([True, True, False], repeat=5))
    truth = ["a"] * len(cells)
    votes = {str(voter): ["a" if cell[voter] else "b" for cell in cells] for voter in range(5)}
    found = voter_accuracy(votes["0"], votes, truth, AB)
    p = 2 / 3
    assert found.panels[1].mean == pytest.approx(p)
    assert found.panels[3].mean == pytest.approx(p**3 + 3 * p**2 * (1 - p))
    assert found.panels[5].mean == pytest.approx(p**5 + 5 * p**4 * (1 - p) + 10 * p**3 * (1 - p) ** 2)
    assert (found.panels[3].count, found.panels[5].count) == (10, 1)


def test_as_json_it_is_plain_data() -> None:
    content = voter_accuracy(["a"], {"v": ["a"]}, ["a"], AB).to_json()
    assert content["panels"] == {1: {"worst": 1.0, "mean": 1.0, "best": 1.0, "count": 1}}
