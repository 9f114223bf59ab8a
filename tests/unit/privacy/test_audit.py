"""Lower bounds on ε: published values, closed forms, a loop as oracle; wrong as seldom as permitted, and tight."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from treadle.errors import ConfigError, InputError
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.audit import (
    Guesses,
    epsilon_lower_bound,
    gaussian_lower_bound,
    guessed,
    p_value,
    sampled_gaussian_loss,
)


@pytest.mark.parametrize(
    ("guesses", "delta", "expected"),
    [  # arXiv 2305.08846, appendix D and §7; the article rounds the one and cuts the other: a unit of the last digit
        (Guesses(1000, 100, 75), 1e-4, 0.673),
        (Guesses(100_000, 1510, 1439), 1e-5, 2.675),
    ],
)
def test_the_articles_own_examples(guesses: Guesses, delta: float, expected: float) -> None:
    assert epsilon_lower_bound(guesses, delta=delta) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("made", [5, 40, 1000])
def test_flawless_guesses_at_delta_0_have_a_closed_form(made: int) -> None:
    success = 0.05 ** (1 / made)  # at which `made` right guesses are as improbable as permitted
    expected = math.log(success / (1 - success))
    assert epsilon_lower_bound(Guesses(2 * made, made, made), delta=0.0) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("right", [0, 1, 13, 20])
def test_the_p_value_is_that_of_a_loop_over_the_definition(right: int) -> None:
    canaries, made, epsilon, delta = 50, 20, 0.7, 1e-3
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    chance = [math.comb(made, k) * q**k * (1 - q) ** (made - k) for k in range(made + 1)]
    slack = max((sum(chance[right - j] for j in range(1, i + 1)) / i for i in range(1, right + 1)), default=0.0)
    expected = min(1.0, sum(chance[right:]) + 2 * canaries * delta * slack)
    found = p_value(Guesses(canaries, made, right), epsilon=epsilon, delta=delta)
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_randomised_response_of_known_epsilon_is_rarely_overstated_and_nearly_reached() -> None:
    """Nothing under (ε, 0) is easier to guess than a coin that is told rightly with e^ε / (1 + e^ε): the limit."""
    epsilon, repeats = 2.0, 400
    generator = np.random.default_rng(0)
    told = generator.binomial(4000, 1 / (1 + math.exp(-epsilon)), size=repeats)
    bound = {right: epsilon_lower_bound(Guesses(4000, 4000, int(right)), delta=0.0) for right in set(told.tolist())}
    bounds = np.array([bound[right] for right in told.tolist()])
    # 5% may be wrong; three standard deviations of a binomial of 400 are 3.3% more. Half the failures would be too few.
    assert 0.015 <= np.mean(bounds > epsilon) <= 0.083
    assert 1.85 < np.median(bounds) < 2.0


def _of_a_gaussian(separation: float, canaries: int, made: int, repeats: int) -> list[Guesses]:
    """Canaries whose scores are unit normals, higher by `separation` where the coin is in."""
    generator = np.random.default_rng(1)
    found: list[Guesses] = []
    for _ in range(repeats):
        members = generator.random(canaries) < 0.5
        scores = separation * members + generator.normal(size=canaries)
        found.append(guessed(scores, members, included=made, excluded=0))
    return found


def test_a_gaussian_of_known_epsilon_is_never_overstated_and_more_canaries_tell_more() -> None:
    true = epsilon_of([MechanismEvent(1 / 1.5, 1.0, 1)], delta=1e-6)
    medians: list[tuple[float, float]] = []
    for canaries, made in ((1000, 20), (30_000, 300)):
        runs = _of_a_gaussian(1.5, canaries, made, repeats=20)
        any_ = [epsilon_lower_bound(guesses, delta=1e-6) for guesses in runs]
        gaussian = [gaussian_lower_bound(guesses, delta=1e-6) for guesses in runs]
        # The bounds are far from tight here, so that one in twenty beyond would already be a fault.
        assert max(any_ + gaussian) < true
        assert all(more >= less for more, less in zip(gaussian, any_, strict=True))
        medians.append((float(np.median(any_)), float(np.median(gaussian))))
    assert medians[1][0] > 1.5 * medians[0][0]
    assert medians[1][1] > 0.6 * true


def test_the_gaussian_bound_refutes_at_its_confidence_and_no_more_often() -> None:
    """Where every canary is guessed about, the bound is close to the separation; a tenth more than 5% would show."""
    runs = _of_a_gaussian(0.5, 600, 300, repeats=100)
    true = epsilon_of([MechanismEvent(1 / 0.5, 1.0, 1)], delta=1e-6)
    assert np.mean([gaussian_lower_bound(guesses, delta=1e-6) > true for guesses in runs]) <= 0.05


def test_nothing_is_refuted_by_chance_hits() -> None:
    for guesses in (Guesses(100, 0, 0), Guesses(100, 100, 50), Guesses(100, 40, 0)):
        assert epsilon_lower_bound(guesses, delta=1e-6) == 0.0
        assert gaussian_lower_bound(guesses, delta=1e-6) == 0.0


def test_delta_and_confidence_cost_what_they_must() -> None:
    guesses = Guesses(1000, 200, 180)
    plain = epsilon_lower_bound(guesses, delta=0.0)
    assert epsilon_lower_bound(guesses, delta=1e-4) < plain
    assert epsilon_lower_bound(guesses, delta=0.0, failure=0.01) < plain
    assert gaussian_lower_bound(guesses, delta=1e-3) < gaussian_lower_bound(guesses, delta=1e-6)


def test_the_highest_scores_are_guessed_in_and_the_lowest_out() -> None:
    scores = np.array([3.0, -1.0, 2.0, 0.0, -2.0])
    members = np.array([True, True, False, True, False])
    assert guessed(scores, members, included=1, excluded=1) == Guesses(5, 2, 2)
    assert guessed(scores, members, included=2, excluded=2) == Guesses(5, 4, 2)
    assert guessed(scores, members, included=0, excluded=1) == Guesses(5, 1, 1)
    assert Guesses.pooled([Guesses(5, 2, 2), Guesses(5, 4, 2)]) == Guesses(10, 6, 4)


def test_the_score_is_the_likelihood_ratio_of_all_steps() -> None:
    out, within = NormalDist(0, 0.8), NormalDist(1, 0.8)
    released = np.array([[0.3, -1.0, 40.0], [1.2, 0.0, -40.0]])

    def ratio(x: float, rate: float) -> float:
        return math.log((1 - rate) + rate * within.pdf(x) / out.pdf(x))

    for rate in (0.1, 1.0):
        found = sampled_gaussian_loss(released[:, :2], noise_multiplier=0.8, sample_rate=rate)
        np.testing.assert_allclose(found, [sum(ratio(x, rate) for x in released[:, i]) for i in (0, 1)], rtol=1e-9)
    assert np.isfinite(sampled_gaussian_loss(released, noise_multiplier=0.01, sample_rate=0.1)).all()


def test_what_cannot_be_guessed_about_is_refused() -> None:
    scores, members = np.zeros(4), np.zeros(4, dtype=bool)
    with pytest.raises(ConfigError, match=r"3 \+ 2 guesses about 4 canaries; guess less often"):
        guessed(scores, members, included=3, excluded=2)
    with pytest.raises(InputError, match="score is not a number; check that the training did not diverge"):
        guessed(np.array([0.0, math.nan, 0.0, 0.0]), members, included=1, excluded=0)
    with pytest.raises(ConfigError, match="5 right of 4 guesses"):
        Guesses(10, 4, 5)
    with pytest.raises(ConfigError, match="delta is 1"):
        epsilon_lower_bound(Guesses(1, 1, 1), delta=1.0)
    with pytest.raises(ConfigError, match="failure is 0"):
        gaussian_lower_bound(Guesses(1, 1, 1), delta=0.1, failure=0.0)
