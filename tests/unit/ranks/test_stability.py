from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from treadle.errors import InputError, MismatchError
from treadle.family.plan import LayerShape
from treadle.ranks.scores import ModuleScore, ProbeScores
from treadle.ranks.stability import TrialsRule, spearman, split_half, unchanged_share, until_settled

LEVELS = np.linspace(1.0, 4.0, 12)


def made(trials: int, *, noise: float = 0.0, by_text: float = 0.0, texts: int = 6) -> ProbeScores:
    """Twelve modules whose values scatter about LEVELS with every trial, and with every text."""
    generator = np.random.default_rng(0)
    over_texts = by_text * generator.normal(size=(12, 1, texts))
    over_trials = noise * generator.normal(size=(200, 12, 1))[:trials].swapaxes(0, 1)
    values = np.maximum(LEVELS[:, None, None] + over_texts + over_trials, 0.0)
    rows = {f"m{place}": ModuleScore(LayerShape(4, 4), tuple(map(tuple, table))) for place, table in enumerate(values)}
    return ProbeScores(rows, "x", {}, 0, None)


def rounded(scores: Mapping[str, float]) -> dict[str, int]:
    return {name: round(2 * score) for name, score in scores.items()}


def test_spearman_is_scipys() -> None:
    generator = np.random.default_rng(1)
    first, second = (generator.integers(0, 5, 30).astype(float) for _ in range(2))  # with ties
    ours = spearman({f"{i}": x for i, x in enumerate(first)}, {f"{i}": x for i, x in reversed(list(enumerate(second)))})
    assert ours == pytest.approx(spearmanr(first, second).statistic)
    with pytest.raises(MismatchError):
        spearman({"a": 1.0}, {"b": 1.0})
    for flat in ({"a": 1.0}, {"a": 1.0, "b": 1.0}):
        with pytest.raises(InputError, match="no order"):
            spearman(flat, flat)


def test_halves_agree_as_far_as_what_is_halved_is_quiet() -> None:
    assert split_half(made(6), over="trials") == split_half(made(6), over="texts") == 1.0
    noisy_trials = made(6, noise=3.0)
    assert split_half(noisy_trials, over="texts") == 1.0
    assert split_half(noisy_trials, over="trials") < 0.9
    noisy_texts = made(6, by_text=3.0)
    assert split_half(noisy_texts, over="trials") == 1.0
    assert split_half(noisy_texts, over="texts") < 0.9
    for over in ("trials", "texts"):
        with pytest.raises(InputError, match="no halves"):
            split_half(made(1, texts=1), over=over)  # type: ignore[arg-type]


def test_ranks_that_no_trial_moves_are_unchanged() -> None:
    assert unchanged_share(made(5), rounded) == 1.0
    assert unchanged_share(made(5, by_text=2.0), rounded) == 1.0  # texts are not drawn anew
    noisy = unchanged_share(made(5, noise=0.5), rounded)
    assert noisy < 0.5
    assert noisy < unchanged_share(made(5, noise=0.5), rounded, moving=0.5) <= 1.0
    with pytest.raises(InputError, match="one trial"):
        unchanged_share(made(1), rounded)


def test_the_bootstrap_finds_the_chance_of_another_rank() -> None:
    values = tuple((value,) for value in [0.0] * 5 + [1.0] * 5)
    scores = ProbeScores({"a": ModuleScore(LayerShape(4, 4), values)}, "x", {}, 0, None)
    # The mean of ten draws from five 0 and five 1; its rank is that of the whole unless it falls below one half.
    share = unchanged_share(scores, lambda means: {"a": int(means["a"] >= 0.5)}, draws=2000)
    assert share == pytest.approx(0.623, abs=0.04)  # P(Binomial(10, ½) ≥ 5); 2000 draws: standard error 1.1%


def test_draws_of_few_trials_scatter_as_students_t() -> None:
    # The mean of n normal trials, less the true one and over its standard error s/√n, has Student's t; so have draws.
    values = [-1.9, -0.6, 0.0, 0.6, 1.9]
    scores = ProbeScores(
        {"a": ModuleScore(LayerShape(4, 4), tuple((10 + value,) for value in values))}, "x", {}, 0, None
    )
    error = float(np.std(values, ddof=1)) / 5**0.5
    share = unchanged_share(scores, lambda means: {"a": int(abs(means["a"] - 10) < 2 * error)}, draws=4000)
    # P(|t₄| < 2) = .884; of plain draws 97% are that near, of draws with the right variance alone .95
    assert share == pytest.approx(0.884, abs=0.03)  # standard error .5%, and five trials are not quite normal


def test_draws_that_cannot_be_shared_out_have_other_ranks() -> None:
    values = tuple((value,) for value in (0.0, 0.0, 3.0))
    scores = ProbeScores({"a": ModuleScore(LayerShape(4, 4), values)}, "x", {}, 0, None)

    def ranks(means: Mapping[str, float]) -> dict[str, int]:
        if not means["a"]:
            raise InputError("every score is 0", remedy="probe again")
        return {"a": 1}

    # (2/3)³ of the draws take no 3, and where χ² < 3, which with two degrees of freedom is likely by 1 - e^-1.5, their
    # score is cut off at 0
    assert unchanged_share(scores, ranks) == pytest.approx(0.770, abs=0.04)  # three standard errors


def test_what_cannot_be_enough_any_more_ends_the_draws() -> None:
    asked = 0

    def ranks(means: Mapping[str, float]) -> dict[str, int]:
        nonlocal asked
        asked += 1
        return dict.fromkeys(means, asked)

    assert unchanged_share(made(5, noise=0.5), ranks, enough=0.99) == 0.0
    assert asked == 1 + 11  # 10 of 1000 may differ


@pytest.mark.parametrize(("gap", "runs", "settling"), [(0.02, 300, 0.02), (1.0, 30, 0.95)])
def test_ranks_are_called_settled_wrongly_no_more_often_than_the_confidence_permits(
    gap: float, runs: int, settling: float
) -> None:
    """One score, whose rank changes at 1, `gap` deviations of a trial away; the nearer, the more often the wrong side
    wins. Asking each of the eight looks for 95% of plain draws errs in 22% of the runs with a gap of .02; asking it for
    the eighth part of the error, but of plain draws, in 8%.
    """
    wrong = settled = 0
    for number in range(runs):
        trials = 1 + 0.3 * (gap + np.random.default_rng(number).normal(size=40))

        def probe(count: int, trials: NDArray[np.float64] = trials) -> ProbeScores:
            values = tuple((float(value),) for value in trials[:count].clip(0))
            return ProbeScores({"a": ModuleScore(LayerShape(4, 4), values)}, "x", {}, 0, None)

        found = until_settled(probe, lambda means: {"a": int(means["a"] > 1)}, seed=number)
        settled += found.settled
        wrong += found.settled and found.scores.means()["a"] <= 1
    assert wrong <= 0.05 * runs  # with a gap of .02, 2.4% are expected, with a standard error of .9%
    assert settled >= settling * runs


def test_the_error_is_divided_among_the_looks() -> None:
    assert TrialsRule().enough == pytest.approx(1 - 0.05 / 8)  # at 5, 10, …, 40 trials
    assert TrialsRule(first=4, step=5, maximum=11, confidence=0.9).enough == pytest.approx(1 - 0.1 / 3)
    assert TrialsRule(first=5, maximum=5).enough == pytest.approx(0.95)


def test_trials_are_added_until_ranks_stand_still() -> None:
    asked: list[int] = []

    def probe(trials: int) -> ProbeScores:
        asked.append(trials)
        return made(trials, noise=0.1)

    rule = TrialsRule(first=4, step=6, maximum=60, confidence=0.9)
    settled = until_settled(probe, lambda means: {name: int(score > 2.5) for name, score in means.items()}, rule=rule)
    assert settled.settled
    assert settled.unchanged >= 0.9
    assert asked == [*range(4, settled.trials + 1, 6)]
    assert settled.trials < 60
    assert len(next(iter(settled.scores.modules.values())).values) == settled.trials


def test_the_maximum_ends_what_does_not_settle() -> None:
    rule = TrialsRule(first=4, step=5, maximum=11)
    asked: list[int] = []

    def probe(trials: int) -> ProbeScores:
        asked.append(trials)
        return made(trials, noise=2.0)

    settled = until_settled(probe, rounded, rule=rule)
    assert (asked, settled.trials, settled.settled) == ([4, 9, 11], 11, False)
    assert settled.unchanged < 0.95


@pytest.mark.parametrize(
    "values",
    [{"first": 1}, {"first": 9, "maximum": 8}, {"step": 0}, {"confidence": 0.0}, {"confidence": 1.1}, {"moving": 1.0}],
)
def test_rules_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(InputError):
        TrialsRule(**values)  # type: ignore[arg-type]
