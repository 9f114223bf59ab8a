"""Abstention: a conformal p-value over the permitted adapters, and what becomes of a choice above the level."""

import torch

from treadle.routing.abstention import abstained, chances
from treadle.routing.decision import BASE, Decision, Mixture

PUBLIC = torch.tensor([[0.0, 3.0], [1.0, -1.0], [2.0, 0.0], [torch.nan, torch.nan]], dtype=torch.float64)


def test_a_chance_counts_the_public_prompts_that_reach_the_score() -> None:
    value = torch.tensor([[2.0, -9.0], [4.0, 0.0], [-5.0, -6.0]]).double()
    # The best public scores are 3, 1, 2 and nobody's: of the last nothing is known, so it reaches no score.
    assert chances(value, PUBLIC, None).tolist() == [3 / 5, 1 / 5, 4 / 5]


def test_the_scores_of_the_forbidden_are_not_asked() -> None:
    value = torch.tensor([[2.5, -torch.inf], [2.5, -torch.inf]]).double()
    permitted = torch.tensor([[True, False], [True, True]])
    assert chances(value, PUBLIC, permitted).tolist() == [1 / 5, 2 / 5]
    other = PUBLIC.clone()
    other[:, 1] = 1e30
    assert chances(value, other, permitted)[0] == chances(value, PUBLIC, permitted)[0]


def test_nobody_permitted_is_as_good_as_anything() -> None:
    value = torch.full((1, 2), -torch.inf).double()
    assert chances(value, PUBLIC, torch.zeros(1, 2, dtype=torch.bool)).tolist() == [1.0]


def test_of_prompts_like_the_public_ones_a_share_of_the_level_is_routed() -> None:
    """The guarantee: under exchangeability P(chance ≤ level) ≤ level, and nearly as much."""
    draw = torch.Generator().manual_seed(0)
    public, asked = torch.randn(400, 5, generator=draw).double(), torch.randn(4000, 5, generator=draw).double()
    found = chances(asked, public, None)
    for level in (0.05, 0.2, 0.5):
        # 400 public prompts know their own quantiles to sqrt(level(1 - level)/400) ≤ .025; three of these.
        assert abs(float((found <= level).double().mean()) - level) < 0.075


def test_the_base_takes_the_winners_place_above_the_level() -> None:
    winner, runner_up = torch.tensor([1, 0]), torch.tensor([0, 1])
    together = Mixture(torch.tensor([[1, 0], [0, 1]]), torch.full((2, 2), 0.5))
    decision = Decision(winner, runner_up, torch.tensor([0.5, 0.25]), torch.tensor([False, True]), together)
    found = abstained(decision, torch.tensor([0.3, 0.1]).double(), 0.2)
    assert found.winner.tolist() == [BASE, 0]
    assert found.runner_up.tolist() == [1, 1]
    assert found.margin.tolist() == [0.0, 0.25]
    assert found.mixture.adapter.tolist() == [[BASE, BASE], [0, 1]]
    assert found.chance is not None
    assert found.repeated(2).chance is not None
    assert abstained(decision, torch.tensor([1.0, 1.0]).double(), 1.0).winner.tolist() == [1, 0]
