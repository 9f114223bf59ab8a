"""Rules by name: what a module's rank is in proportion to, and how the shares become whole ranks.

largest-remainder    the score; the default
floor                the score, cut off: the paper's, which leaves part of the budget unspent
ranking              the place in the order of the scores, whatever their sizes
sqrt                 the square root of the score
per-parameter        the score of each parameter of a rank, so that parameters, not ranks, are as the scores
sqrt-per-parameter   the square root of that

To choose ranks that make Σ score·f(rank) largest within a budget of parameters is "per-parameter" for f = log and
"sqrt-per-parameter" for f = −1/rank, without the minimum and the maximum. Which f is true, nobody knows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from treadle.errors import InputError

RuleName = Literal["largest-remainder", "floor", "ranking", "sqrt", "per-parameter", "sqrt-per-parameter"]

Weigh = Callable[[Mapping[str, Fraction], Mapping[str, int]], dict[str, Fraction]]
"""Maps scores, and the parameters of one rank, of every module to what its rank is in proportion to."""


@dataclass(frozen=True)
class Rule:
    """How scores become ranks.

    Attributes:
        weigh: what ranks are in proportion to.
        spends_rest: whether what rounding down leaves is spent.
        minimum: least rank where the caller does not say.
    """

    weigh: Weigh
    spends_rest: bool = True
    minimum: int = 1


def _as_scored(scores: Mapping[str, Fraction], _sizes: Mapping[str, int]) -> dict[str, Fraction]:
    return dict(scores)


def _by_order(scores: Mapping[str, Fraction], _sizes: Mapping[str, int]) -> dict[str, Fraction]:
    """1 for the lowest score, M for the highest of M; equal scores share the mean of their places."""
    ordered = sorted(scores.values())
    first = {score: place for place, score in reversed(list(enumerate(ordered, start=1)))}
    last = {score: place for place, score in enumerate(ordered, start=1)}
    return {name: Fraction(first[score] + last[score], 2) for name, score in scores.items()}


def _roots(scores: Mapping[str, Fraction], _sizes: Mapping[str, int]) -> dict[str, Fraction]:
    """The root of each score's share of the largest, correctly rounded to float64: the same on every machine."""
    top = max(scores.values())
    return {name: Fraction(math.sqrt(score / top)) if score else Fraction(0) for name, score in scores.items()}


def _for_each_parameter(scores: Mapping[str, Fraction], sizes: Mapping[str, int]) -> dict[str, Fraction]:
    return {name: score / sizes[name] for name, score in scores.items()}


def _roots_for_each_parameter(scores: Mapping[str, Fraction], sizes: Mapping[str, int]) -> dict[str, Fraction]:
    return _roots(_for_each_parameter(scores, sizes), sizes)


RULES: Mapping[RuleName, Rule] = MappingProxyType(
    {
        "largest-remainder": Rule(_as_scored),
        # The paper's rule knows no minimum, and spends nothing that it has cut off.
        "floor": Rule(_as_scored, spends_rest=False, minimum=0),
        "ranking": Rule(_by_order),
        "sqrt": Rule(_roots),
        "per-parameter": Rule(_for_each_parameter),
        "sqrt-per-parameter": Rule(_roots_for_each_parameter),
    }
)


def rule_of(name: str) -> Rule:
    """The rule of this name.

    Raises:
        InputError: there is none.

    Reference: arXiv 2408.09015 for "floor". Deviations: the paper names no rule by order; "ranking" is ours, with
        places 1 to M.
    """
    found = {str(known): rule for known, rule in RULES.items()}
    if name not in found:
        raise InputError(f"no such rule {name!r}", remedy=f"choose among {', '.join(found)}")
    return found[name]
