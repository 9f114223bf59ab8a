"""What completions are worth."""

import time

import pytest

from treadle.data.metrics import Code, ExactMatch
from treadle.data.prompts import Example
from treadle.errors import ConfigError, UnavailableError, UnsupportedError
from treadle.train.stages import mathematics
from treadle.train.stages.mathematics import Comparing
from treadle.train.stages.rewards import REWARDS, Judging, Rollout, reward_of

EXACT = ExactMatch("exact-match", max_new_tokens=9, extract=r"#### (-?[\d,]+)", first_line=False, ignore=",")
CODE = Code("code", max_new_tokens=9)
STRICT = "<reasoning>\nsix and one\n</reasoning>\n<answer>\n7\n</answer>\n"


def worth(name: str, text: str, *, label: str = "7", tokens: int = 5, judging: Judging | None = None) -> float:
    rollout = Rollout(Example("how many?", "", label=label), text, tokens, 20)
    return reward_of(name, judging or Judging(EXACT))(rollout)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("exact", "so 3 + 4\n#### 7", 1.0),
        ("exact", "so 3 + 4\n#### 8", 0.0),
        ("exact", "7", 0.0),
        ("exact", "#### 8 no #### 7", 1.0),
        ("math-verify", "the answer is $\\frac{14}{2}$", 1.0),
        ("math-verify", "<reasoning>8</reasoning><answer>7.0</answer>", 1.0),
        ("math-verify", "the answer is 8", 0.0),
        ("math-verify", "no idea", 0.0),
        ("integer", "-1,200", 1.0),
        ("integer", "<answer> 12 </answer>", 1.0),
        ("integer", "12 apples", 0.0),
        ("integer", "1.5", 0.0),
        ("strict-format", STRICT, 1.0),
        ("strict-format", STRICT.replace("\n", ""), 0.0),
        ("strict-format", STRICT + "more", 0.0),
        ("soft-format", STRICT.replace("\n", " ") + "more", 1.0),
        ("soft-format", "<answer>7</answer><reasoning>6</reasoning>", 0.0),
        ("xml-count", STRICT, 1.0),
        ("xml-count", "<answer>7</answer>", 0.5),
        ("xml-count", "<answer>7<answer></answer>", 0.25),
        ("length", "a", 0.75),
    ],
)
def test_worth(name: str, text: str, value: float) -> None:
    assert worth(name, text) == value


def test_answers_that_take_for_ever_are_worth_nothing_and_the_next_is_judged() -> None:
    comparing = Comparing(seconds=3)
    begin = time.monotonic()
    assert not any(comparing.equal("$7$", tower) for tower in ("$9^{9^{9}}$", "$1000000!$", "$7^{999999999}$"))
    assert comparing.equal("$7$", "$\\frac{14}{2}$")
    assert time.monotonic() - begin < 60


def test_a_comparison_that_cannot_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "_DRIVER", "import no_such_library")
    with pytest.raises(UnavailableError, match="math-verify does not start"):
        Comparing().equal("$7$", "$7$")


def test_length_is_never_below_nothing() -> None:
    assert worth("length", "a", tokens=20) == 0.0
    assert worth("length", "a", tokens=30) == 0.0


def test_code_runs_only_where_it_may() -> None:
    with pytest.raises(UnsupportedError, match="--allow-code-execution"):
        reward_of("code", Judging(CODE))


def test_code_is_worth_what_its_tests_say() -> None:
    example = Example("def double(x):\n", "", program=("def double(x):\n", "\nassert double(4) == 8\n"))
    try:
        reward = reward_of("code", Judging(CODE, allow_code_execution=True))
    except UnsupportedError:
        pytest.skip("this kernel refuses the jail")
    assert reward(Rollout(example, "    return 2 * x\n", 6, 20)) == 1.0
    assert reward(Rollout(example, "    return x\n", 6, 20)) == 0.0


@pytest.mark.parametrize(
    ("name", "judging", "told"),
    [
        ("accuracy", Judging(EXACT), f"no reward is called 'accuracy'; choose among {', '.join(REWARDS)}"),
        ("exact", Judging(None), "reward 'exact' needs a metric of kind 'exact-match'"),
        ("math-verify", Judging(None), "reward 'math-verify' needs a metric of kind 'exact-match'"),
        ("exact", Judging(CODE), "reward 'exact' needs a metric of kind 'exact-match'"),
        ("code", Judging(EXACT, allow_code_execution=True), "reward 'code' needs a metric of kind 'code'"),
    ],
)
def test_a_reward_that_cannot_be_is_refused(name: str, judging: Judging, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        reward_of(name, judging)
