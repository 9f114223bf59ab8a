"""Arms by name: a scorer and how often it chooses."""

import pytest

from treadle.configs.evaluate import ARMS, EvaluateRun, RoutedArm, routed_arm
from treadle.errors import ConfigError
from treadle.toml import checked

RUN: dict[str, object] = {"bank": "bank", "tasks": ["syllogism"]}


@pytest.mark.parametrize(
    ("arm", "scorer", "granularity"),
    [
        ("token", "seqr", "token"),
        ("sequence", "seqr", "sequence"),
        ("seqr:evidence", "seqr", "evidence"),
        ("arrow", "arrow", "token"),
        ("lag:layer", "lag", "layer"),
        ("perplexity", "perplexity", "sequence"),
        ("linear", "linear", "sequence"),
        ("linear:sequence", "linear", "sequence"),
    ],
)
def test_an_arm_is_a_scorer_and_a_granularity(arm: str, scorer: str, granularity: str) -> None:
    assert routed_arm(arm) == RoutedArm(scorer, granularity)
    assert checked({**RUN, "arms": [arm]}, EvaluateRun, where="run").arms == (arm,)


def test_the_arms_that_recorded_runs_name_are_still_the_default() -> None:
    recorded = ("base", "alone", "mean", "arrow", "token", "sequence", "oracle")
    assert checked(RUN, EvaluateRun, where="run").arms == ARMS == recorded


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (["zscore"], "no such arm 'zscore'"),
        (["seqr:word"], "'seqr' does not choose by 'word'"),
        (["seqr:"], "'seqr' does not choose by ''"),
        (["perplexity:token"], "'perplexity' does not choose by 'token'"),
        (["base:token"], "no such arm 'base:token'"),
        (["base", "base"], "an arm is named twice"),
    ],
)
def test_what_is_no_arm_is_refused(arms: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked({**RUN, "arms": arms}, EvaluateRun, where="run")
