"""What a completion is worth, by name: numbers in [0, 1], which a stage weighs and adds up.

exact          its answer is the row's label, by the task's own metric
math-verify    its answer equals the label as mathematics (library math-verify), found so within seconds
integer        its answer is a whole number
strict-format  it is <reasoning>, lines, </reasoning>, <answer>, lines, </answer> and nothing else
soft-format    these four tags stand in it in this order
xml-count      a quarter for each of the four tags that stands in it exactly once
length         the share of the permitted tokens that it did not use
code           its program passes its unit tests, in a jail; only where the caller allows generated code to run

Reference: arXiv 2507.20999 §4 names a reward for correctness and four for form.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from treadle.data.metrics import Code, ExactMatch, Metric
from treadle.data.prompts import Example
from treadle.errors import ConfigError, TreadleError, UnavailableError
from treadle.evaluation.execution import check_completion, prove_jail
from treadle.train.stages.mathematics import Comparing

_TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_STRICT = re.compile(r"\s*<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\s*", re.DOTALL)
_SOFT = re.compile(r"<reasoning>.*?</reasoning>.*?<answer>.*?</answer>", re.DOTALL)
_INTEGER = re.compile(r"[-+]?\d[\d,]*")


@dataclass(frozen=True)
class Rollout:
    """One sampled completion: of which example, its text, its tokens, and how many it might have had."""

    example: Example
    text: str
    tokens: int
    permitted: int


Reward = Callable[[Rollout], object]
"""Gives a finite number; a user's own may give anything, which is then an error."""


@dataclass(frozen=True)
class Judging:
    """What rewards are judged by.

    Attributes:
        metric: of the task; `exact` and `code` need one that judges generated text.
        allow_code_execution: whether generated code may run, in a restricted subprocess.
    """

    metric: Metric | None = None
    allow_code_execution: bool = False


def reward_of(name: str, judging: Judging) -> Reward:
    """The reward of that name.

    Raises:
        ConfigError: there is none, or the task's metric does not go with it.
        UnsupportedError: generated code would have to run and may not.
        UnavailableError: the library behind it is not installed.
    """
    if name not in REWARDS:
        raise ConfigError(f"no reward is called {name!r}", remedy=f"choose among {', '.join(REWARDS)}")
    return REWARDS[name](judging)


def worth(rewards: Mapping[str, Reward], rollout: Rollout) -> dict[str, float]:
    """Name → what the rollout is worth by each reward.

    Raises:
        TreadleError: a reward fails, or gives no finite number; names it and the prompt's beginning.
    """
    return {name: _one(name, reward, rollout) for name, reward in rewards.items()}


def _one(name: str, reward: Reward, rollout: Rollout) -> float:
    begins = f"reward {name!r} of the prompt {rollout.example.prompt[:40]!r}"
    try:
        value = reward(rollout)
    except TreadleError:
        raise
    except Exception as error:
        raise TreadleError(
            f"it raises {type(error).__name__}: {error}", where=begins, remedy="mend the reward; the run can be resumed"
        ) from error
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise TreadleError(f"it gives {value!r}, not a finite number", where=begins, remedy="return a number for every row")


def _exact(judging: Judging) -> Reward:
    metric = judging.metric
    if not isinstance(metric, ExactMatch):
        raise ConfigError("reward 'exact' needs a metric of kind 'exact-match'", remedy="add it to the data")

    def reward(rollout: Rollout) -> float:
        return float(metric.agrees(rollout.text, rollout.example.label or ""))

    return reward


def _math_verify(judging: Judging) -> Reward:
    if importlib.util.find_spec("math_verify") is None:
        raise UnavailableError("math-verify is not installed", remedy="pip install 'treadle[rl]'")
    if not isinstance(judging.metric, ExactMatch):
        raise ConfigError("reward 'math-verify' needs a metric of kind 'exact-match'", remedy="add it to the data")
    comparing = Comparing()

    def reward(rollout: Rollout) -> float:
        return float(comparing.equal(f"${rollout.example.label}$", _answer(rollout.text)))

    return reward


def _answer(text: str) -> str:
    """What stands between the last answer tags, or all of it where there are none."""
    found: Sequence[str] = _ANSWER.findall(text)
    return (found[-1] if found else text).strip()


def _code(judging: Judging) -> Reward:
    metric = judging.metric
    if not isinstance(metric, Code):
        raise ConfigError("reward 'code' needs a metric of kind 'code'", remedy="add it to the data")
    prove_jail(allow_code_execution=judging.allow_code_execution)

    def reward(rollout: Rollout) -> float:
        run = check_completion(rollout.example, metric.cut(rollout.text), allow_code_execution=True)
        return float(run.status == "passed")

    return reward


def _of_form(score: Callable[[Rollout], float]) -> Callable[[Judging], Reward]:
    """A reward that needs no label."""

    def made(judging: Judging) -> Reward:
        del judging
        return score

    return made


REWARDS: Mapping[str, Callable[[Judging], Reward]] = {
    "exact": _exact,
    "math-verify": _math_verify,
    "integer": _of_form(lambda rollout: float(_INTEGER.fullmatch(_answer(rollout.text)) is not None)),
    "strict-format": _of_form(lambda rollout: float(_STRICT.fullmatch(rollout.text) is not None)),
    "soft-format": _of_form(lambda rollout: float(_SOFT.search(rollout.text) is not None)),
    "xml-count": _of_form(lambda rollout: sum(rollout.text.count(tag) == 1 for tag in _TAGS) / len(_TAGS)),
    "length": _of_form(lambda rollout: 1 - min(rollout.tokens / rollout.permitted, 1.0)),
    "code": _code,
}
