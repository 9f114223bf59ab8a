"""The fit is the minimum, and the penalty is the one that held-out rows prefer."""

import pytest
import torch

from treadle.logistic import PENALTIES, cross_validated_penalty, fitted


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_the_fit_is_a_minimum(penalty: float) -> None:
    torch.manual_seed(3)
    features, labels = torch.randn(60, 12).double(), torch.arange(60) % 3
    weight, bias = fitted(features, labels, penalty)
    residual = (features @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(labels, 3)
    # The loss is convex, so a vanishing gradient, written out by hand, is the minimum.
    assert float((residual.T @ features / 60 + penalty * weight).abs().max()) < 1e-6
    assert float((residual.sum(0) / 60).abs().max()) < 1e-6
    assert float(weight.abs().max()) > 1e-3


def test_without_an_intercept_the_bias_is_zero_and_the_weight_still_the_minimum() -> None:
    torch.manual_seed(3)
    features, labels = torch.randn(60, 12).double() + 1, torch.arange(60) % 3
    weight, bias = fitted(features, labels, 0.1, intercept=False)
    residual = (features @ weight.T).softmax(1) - torch.nn.functional.one_hot(labels, 3)
    assert torch.equal(bias, torch.zeros(3, dtype=torch.float64))
    assert float((residual.T @ features / 60 + 0.1 * weight).abs().max()) < 1e-6


def test_noise_wants_the_strongest_penalty_and_a_plain_rule_a_weak_one() -> None:
    torch.manual_seed(5)
    features = torch.randn(200, 60)
    assert cross_validated_penalty(features, torch.randint(2, (200,))) == max(PENALTIES)
    assert cross_validated_penalty(features, (features[:, 0] > 0).long()) < max(PENALTIES)


def test_the_choice_is_the_least_loss_of_rows_that_no_fit_has_seen() -> None:
    torch.manual_seed(6)
    features = torch.randn(50, 8).double()
    labels = (features[:, 0] + torch.randn(50) > 0).long()
    place = torch.zeros(50, dtype=torch.long)
    for label in (0, 1):
        rows = labels == label
        place[rows] = torch.arange(int(rows.sum())) % 5

    def loss(penalty: float) -> float:
        total = 0.0
        for held in range(5):
            weight, bias = fitted(features[place != held], labels[place != held], penalty)
            scores = features[place == held] @ weight.T + bias
            total -= float(scores.log_softmax(1).gather(1, labels[place == held, None]).sum())
        return total

    assert cross_validated_penalty(features, labels) == min(PENALTIES, key=loss)


def test_a_class_of_one_row_is_never_held_out() -> None:
    torch.manual_seed(7)
    features, labels = torch.randn(21, 4), torch.tensor([0, 1] * 10 + [2])
    assert cross_validated_penalty(features, labels) in PENALTIES
    assert cross_validated_penalty(features[-3:], torch.tensor([0, 1, 2])) == max(PENALTIES)
