"""From scores to ranks: a budget of parameters shared out in proportion to the scores, exactly.

Everything is computed in rational numbers: the same scores give the same ranks whatever the order of the modules
or the machine.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from treadle.errors import InputError, MismatchError
from treadle.family.plan import LayerShape, RankPlan

Rule = Literal["largest-remainder", "floor"]

_COSTS: Mapping[str, Callable[[LayerShape], int]] = {
    "total": lambda shape: shape.in_features + shape.out_features,
    "trainable": lambda shape: shape.out_features,
    "ranks": lambda _: 1,
}
# What a module gets at least where the caller does not say: the paper's rule knows no minimum.
_MINIMUM: Mapping[Rule, int] = {"largest-remainder": 1, "floor": 0}


@dataclass(frozen=True)
class Budget:
    """How much a plan may spend: parameters of A and B ("total"), of B alone ("trainable"), or a sum of ranks.

    Raises:
        InputError: an unknown unit, or a value below 1.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    unit: Literal["total", "trainable", "ranks"]
    value: int

    def __post_init__(self) -> None:
        if self.unit not in _COSTS:
            raise InputError(f"no such budget unit {self.unit!r}", remedy=f"choose among {', '.join(_COSTS)}")
        if self.value < 1:
            raise InputError(f"a budget of {self.value} buys nothing", remedy="give a positive budget")

    def cost(self, shape: LayerShape) -> int:
        """What one rank of a layer of this shape costs, in the budget's unit."""
        return _COSTS[self.unit](shape)


def mean_rank_budget(shapes: Mapping[str, LayerShape], rank: int) -> Budget:
    """The parameters, A and B together, of the plan that gives every module this rank."""
    return Budget("total", rank * sum(shape.in_features + shape.out_features for shape in shapes.values()))


@dataclass(frozen=True)
class _Bounds:
    """A module on its way to a rank: its score, the price of a rank, and the ranks that it may have."""

    score: Fraction
    cost: int
    least: int
    most: int

    def at(self, level: Fraction) -> Fraction:
        """The rank, not yet whole, where one unit of score earns `level` ranks."""
        return min(max(level * self.score, Fraction(self.least)), Fraction(self.most))


def allocate(
    scores: Mapping[str, float],
    shapes: Mapping[str, LayerShape],
    *,
    budget: Budget,
    rule: Rule = "largest-remainder",
    minimum: int | None = None,
    maximum: int | None = None,
    scaling: float = 1.0,
) -> RankPlan:
    """The plan whose ranks are proportional to the scores, as far as whole numbers within the budget can be.

    The ideal ranks r_m = λ·score_m, held between the minimum and the maximum, spend the budget exactly. "floor" cuts
    them off. "largest-remainder" then raises, one rank at a time, the module that is furthest below its ideal among
    those that the rest can pay for, until no permitted step is affordable. The budget is never exceeded.

    Args:
        scores: finite and not negative, a module.
        shapes: the modules that take part, in the model's order.
        budget: what may be spent.
        rule: "largest-remainder", or "floor", the paper's.
        minimum: least rank of a module; 0 drops modules from the plan; None is the rule's own: 1, for "floor" 0.
        maximum: largest rank of a module; its layer's smaller side is always a limit.
        scaling: alpha/r, the same for every module, so that a rank changes no update's size.

    Raises:
        MismatchError: scores and shapes name different modules.
        InputError: a score is negative or not finite, all are 0, bounds contradict each other, or the budget is
            below what the minimum costs.

    Reference: arXiv 2408.09015, r_m = floor(d_m · r̄·M / Σd), which is "floor" with a budget of r̄·M ranks.
    Deviations: the default budget counts parameters, so layers of different shapes compare; a remainder is spent.
    """
    lowest = _MINIMUM[rule] if minimum is None else minimum
    modules = _bounded(scores, shapes, budget, least=lowest, most=maximum)
    ideal = _ideal_ranks(modules, budget)
    ranks = {name: math.floor(rank) for name, rank in ideal.items()}
    if rule == "largest-remainder":
        _spend_rest(ranks, ideal, modules, budget)
    if not any(ranks.values()):
        raise InputError(f"a budget of {budget.value} ({budget.unit}) buys not one rank", remedy="raise the budget")
    spent = _spent(ranks, modules)
    provenance = {
        "allocator": rule,
        "budget": f"{budget.value} {budget.unit}",
        "spent": str(spent),
        "lost": str(budget.value - spent),
        "dropped": " ".join(name for name, rank in ranks.items() if rank == 0),
    }
    return RankPlan.of_ranks(shapes, ranks, scaling=scaling, provenance=provenance)


def _bounded(
    scores: Mapping[str, float], shapes: Mapping[str, LayerShape], budget: Budget, *, least: int, most: int | None
) -> dict[str, _Bounds]:
    """Every module with its limits, or the error that says what is wrong with them."""
    if scores.keys() != shapes.keys():
        stray = sorted(scores.keys() ^ shapes.keys())[0]
        raise MismatchError(f"{stray!r} has a score or a shape, but not both", remedy="score the modules you plan")
    for name, score in scores.items():
        if not (math.isfinite(score) and score >= 0):
            raise InputError(f"score {score} is not a finite number from 0", where=name, remedy="probe again")
    if not any(scores.values()):
        raise InputError("every score is 0", remedy="probe with more noise or another output")
    if least < 0 or (most is not None and most < max(least, 1)):
        raise InputError(f"no rank is from {least} to {most}", remedy="use 0 ≤ minimum ≤ maximum and 1 ≤ maximum")
    modules: dict[str, _Bounds] = {}
    for name, shape in shapes.items():
        side = min(shape.in_features, shape.out_features)
        top = side if most is None else min(side, most)
        modules[name] = _Bounds(Fraction(scores[name]), budget.cost(shape), min(least, top), top)
    needed = sum(module.cost * module.least for module in modules.values())
    if needed > budget.value:
        raise InputError(
            f"a budget of {budget.value} ({budget.unit}) is below the {needed} that the minimum rank {least} costs",
            remedy="raise it, or let modules be dropped with minimum = 0",
        )
    return modules


def _ideal_ranks(modules: Mapping[str, _Bounds], budget: Budget) -> dict[str, Fraction]:
    """Ranks in proportion to the scores, within their bounds, that cost the budget, or all they may if it is larger."""

    def cost_at(level: Fraction) -> Fraction:
        return sum((module.cost * module.at(level) for module in modules.values()), Fraction(0))

    scored = [module for module in modules.values() if module.score > 0]
    # Between two neighbouring levels no module meets a bound, so the cost is linear there.
    levels = sorted({Fraction(bound) / module.score for module in scored for bound in (module.least, module.most)})
    low, high = 0, len(levels) - 1
    if cost_at(levels[high]) <= budget.value:
        return {name: module.at(levels[high]) for name, module in modules.items()}
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost_at(levels[middle]) <= budget.value else (low, middle)
    start, end = cost_at(levels[low]), cost_at(levels[high])
    level = levels[low] + (levels[high] - levels[low]) * (budget.value - start) / (end - start)
    return {name: module.at(level) for name, module in modules.items()}


def _spend_rest(
    ranks: dict[str, int], ideal: Mapping[str, Fraction], modules: Mapping[str, _Bounds], budget: Budget
) -> None:
    """Raise ranks, the furthest below its ideal first, until the rest pays for no permitted step."""
    rest = budget.value - _spent(ranks, modules)
    while steps := [n for n, module in modules.items() if module.cost <= rest and ranks[n] < module.most]:
        # Score, then name, settle ties, so that neither order nor chance does.
        chosen = max(steps, key=lambda name: (ideal[name] - ranks[name], modules[name].score, name))
        ranks[chosen] += 1
        rest -= modules[chosen].cost


def _spent(ranks: Mapping[str, int], modules: Mapping[str, _Bounds]) -> int:
    return sum(modules[name].cost * rank for name, rank in ranks.items())
