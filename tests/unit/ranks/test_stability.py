from collections.abc import Mapping

import numpy as np
import pytest
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
