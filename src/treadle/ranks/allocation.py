"""From scores to ranks: a budget of parameters shared out in proportion to the scores, exactly.

Everything is computed in whole and in rational numbers: the same scores give the same ranks whatever the order of the
modules or the machine.
"""

import heapq
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Literal

from treadle.errors import InputError, MismatchError
from treadle.family.plan import LayerShape, RankPlan
from treadle.ranks.controls import Control, shared_scores
from treadle.ranks.rules import RuleName, rule_of
from treadle.ranks.scores import ProbeScores
from treadle.ranks.ties import Ties, groups_of

_COSTS: Mapping[str, Callable[[LayerShape], int]] = {
    "total": lambda shape: shape.in_features + shape.out_features,
    "trainable": lambda shape: shape.out_features,
    "ranks": lambda _: 1,
}


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
class AllocationSettings:
    """How a budget is shared out.

    Attributes:
        rule: by name, see `treadle.ranks.rules`.
        minimum: least rank of a module; 0 drops modules from the plan; None is the rule's own: 1, for "floor" 0.
        maximum: largest rank of a module; its layer's smaller side is always a limit.
        multiple: every rank is a multiple of this.
        ties: which modules share a rank, see `treadle.ranks.ties`.
        scaling: alpha/r, the same for every module, so that a rank changes no update's size.

    Raises:
        InputError: no such rule, or limits that contradict each other.
    """

    rule: RuleName = "largest-remainder"
    minimum: int | None = None
    maximum: int | None = None
    multiple: int = 1
    ties: Ties = "none"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        least, most = self.least, self.maximum
        if least < 0 or (most is not None and most < max(least, 1)):
            raise InputError(f"no rank is from {least} to {most}", remedy="use 0 ≤ minimum ≤ maximum and 1 ≤ maximum")
        if self.multiple < 1:
            raise InputError(f"no rank is a multiple of {self.multiple}", remedy="use multiple = 1, 2, 4 or 8")
        if most is not None and self.rounded_up > most:
            raise InputError(
                f"no multiple of {self.multiple} is from {max(least, 1)} to {most}",
                remedy="raise the maximum or use a smaller multiple",
            )

    @property
    def least(self) -> int:
        """The minimum, or the rule's own where none is set."""
        return rule_of(self.rule).minimum if self.minimum is None else self.minimum

    @property
    def rounded_up(self) -> int:
        """The least rank that a module of the plan may have: a multiple, at least 1."""
        return -(-max(self.least, 1) // self.multiple) * self.multiple


@dataclass(frozen=True, eq=False)
class _Group:
    """Modules on their way to one rank: their weight, the price of a rank of all, and the ranks that they may have.

    Weights of all groups are whole numbers of one small unit: sums and comparisons of them need no common denominator.
    """

    name: str
    members: tuple[str, ...]
    weight: int
    cost: int
    least: int
    most: int

    def parts(self, level: Fraction) -> int:
        """The rank, not yet whole, where one of weight earns `level` ranks, times the level's denominator."""
        whole = level.denominator
        return min(max(level.numerator * self.weight, self.least * whole), self.most * whole)


def allocate(
    scores: Mapping[str, float],
    shapes: Mapping[str, LayerShape],
    *,
    budget: Budget,
    settings: AllocationSettings | None = None,
) -> RankPlan:
    """The plan whose ranks are in proportion to the scores, as far as whole numbers within the budget can be.

    The ideal ranks r = λ·weight, held between the minimum and the maximum, spend the budget exactly; the weight is
    the score or what the rule makes of it. They are cut off to multiples. Then, except under "floor", the group that
    is furthest below its ideal among those that the rest can pay for is raised by one multiple, again and again,
    until no permitted step is affordable. The budget is never exceeded. Tied modules have the mean of their weights,
    by cost, so that together they earn what they would have earned apart.

    The plan's `probe_text` is "not stated": what the scores were made of is the caller's to say (`plan_of_scores`).

    Args:
        scores: finite and not negative, a module.
        shapes: the modules that take part, in the model's order.
        budget: what may be spent.
        settings: by default the largest remainder, ranks from 1 to the layer's smaller side, nothing tied.

    Raises:
        MismatchError: scores and shapes name different modules, or a tied module is not planned.
        InputError: a score is negative or not finite, all are 0, a layer is too small for the multiple, or the budget
            is below what the minimum costs.

    Reference: arXiv 2408.09015, r_m = floor(d_m · r̄·M / Σd), which is "floor" with a budget of r̄·M ranks.
    Deviations: the default budget counts parameters, so layers of different shapes compare; a remainder is spent.
    """
    chosen = settings or AllocationSettings()
    groups = _groups(_checked(scores, shapes), shapes, budget, chosen)
    level = _level(groups, budget)
    step = level.denominator * chosen.multiple
    ranks = {group: group.parts(level) // step * chosen.multiple for group in groups}
    if rule_of(chosen.rule).spends_rest:
        _spend_rest(ranks, level, budget, chosen.multiple)
    if not any(ranks.values()):
        raise InputError(f"a budget of {budget.value} ({budget.unit}) buys not one rank", remedy="raise the budget")
    own = {name: rank for group, rank in ranks.items() for name in group.members}
    spent = _spent(ranks)
    provenance = {
        "allocator": chosen.rule,
        "budget": f"{budget.value} {budget.unit}",
        "minimum": str(chosen.least),
        "maximum": str(chosen.maximum or "the layer's smaller side"),
        "multiple": str(chosen.multiple),
        "ties": chosen.ties if isinstance(chosen.ties, str) else json.dumps(chosen.ties),
        "spent": str(spent),
        "lost": str(budget.value - spent),
        "dropped": " ".join(name for name in shapes if own[name] == 0),
        "probe_text": "not stated",
    }
    return RankPlan.of_ranks(shapes, own, scaling=chosen.scaling, provenance=provenance)


def plan_of_scores(
    scores: ProbeScores,
    *,
    budget: Budget,
    settings: AllocationSettings | None = None,
    control: Control | None = None,
) -> RankPlan:
    """The plan that `allocate` makes of a probe's scores, which says what it comes from: probe, base, text.

    Args:
        scores: the probe's.
        budget: what may be spent.
        settings: as `allocate`.
        control: what is shared out instead of the scores; drawn by the scores' seed. "uniform" has no other rule than
            the largest remainder, since one that weighs by size would not give equal scores equal ranks.

    Raises:
        InputError, MismatchError: as `allocate`.
    """
    chosen = settings or AllocationSettings()
    if control == "uniform":
        chosen = replace(chosen, rule="largest-remainder", minimum=chosen.least)
    shared = shared_scores(scores, control, seed=scores.seed)
    plan = allocate(shared, scores.shapes(), budget=budget, settings=chosen)
    origin = {
        "probe": scores.probe,
        "probe_settings": json.dumps(dict(scores.settings)),
        "probe_seed": str(scores.seed),
        "probe_text": scores.text,
        "probe_text_sha256": scores.text_sha256 or "",
        **({} if control is None else {"control": control}),
    }
    base = {} if scores.base is None else {"base": scores.base.name, "base_sha256": scores.base.sha256}
    return replace(plan, provenance={**plan.provenance, **base, **origin})


def _checked(scores: Mapping[str, float], shapes: Mapping[str, LayerShape]) -> dict[str, Fraction]:
    """The scores as rational numbers, once nothing is wrong with them."""
    if scores.keys() != shapes.keys():
        stray = sorted(scores.keys() ^ shapes.keys())[0]
        raise MismatchError(f"{stray!r} has a score or a shape, but not both", remedy="score the modules you plan")
    for name, score in scores.items():
        if not (math.isfinite(score) and score >= 0):
            raise InputError(f"score {score} is not a finite number from 0", where=name, remedy="probe again")
    if not any(scores.values()):
        raise InputError("every score is 0", remedy="probe with more noise or another output")
    return {name: Fraction(score) for name, score in scores.items()}


def _groups(
    scores: Mapping[str, Fraction],
    shapes: Mapping[str, LayerShape],
    budget: Budget,
    settings: AllocationSettings,
) -> list[_Group]:
    """What gets ranks, with its limits, or the error that says what is wrong with them."""
    sizes = {name: shape.in_features + shape.out_features for name, shape in shapes.items()}
    weights = rule_of(settings.rule).weigh(scores, sizes)
    costs = {name: budget.cost(shape) for name, shape in shapes.items()}
    prices = {members: sum(costs[name] for name in members) for members in groups_of(shapes, settings.ties)}
    means = {
        members: sum((weights[name] * costs[name] for name in members), Fraction(0)) / price
        for members, price in prices.items()
    }
    unit = math.lcm(*(mean.denominator for mean in means.values()))
    found = [
        _Group(min(members), members, int(mean * unit), prices[members], *_limits(members, shapes, settings))
        for members, mean in means.items()
    ]
    needed = sum(group.cost * group.least for group in found)
    if needed > budget.value:
        raise InputError(
            f"a budget of {budget.value} ({budget.unit}) is below the {needed} that the minimum rank "
            f"{settings.least} costs",
            remedy="raise it, or let modules be dropped with minimum = 0",
        )
    return found


def _limits(members: Sequence[str], shapes: Mapping[str, LayerShape], settings: AllocationSettings) -> tuple[int, int]:
    """The least and the largest rank that these tied modules may have, both multiples."""
    side, narrow = min((min(shapes[name].in_features, shapes[name].out_features), name) for name in members)
    most = side if settings.maximum is None else min(side, settings.maximum)
    whole = most // settings.multiple * settings.multiple
    if whole == 0 and settings.least > 0:
        raise InputError(
            f"no multiple of {settings.multiple} is a rank of this layer, whose smaller side is {side}",
            where=narrow,
            remedy="use a smaller multiple, leave the module out, or let it be dropped with minimum = 0",
        )
    return min(settings.rounded_up if settings.least > 0 else 0, whole), whole


def _level(groups: Sequence[_Group], budget: Budget) -> Fraction:
    """How many ranks one of weight earns where ranks within limits cost the budget, or all they may if it is larger."""

    def cost_at(level: Fraction) -> Fraction:
        return Fraction(sum(group.cost * group.parts(level) for group in groups), level.denominator)

    # Between two neighbouring levels no group meets a limit, so the cost is linear there.
    limits = [(limit, group.weight) for group in groups if group.weight for limit in (group.least, group.most)]
    # Two that differ, differ by 1/weight² or more: whole numbers of a half of that are in the same order.
    bits = 1 + 2 * max(weight for _, weight in limits).bit_length()
    limits.sort(key=lambda pair: (pair[0] << bits) // pair[1])
    low, high = 0, len(limits) - 1
    if cost_at(Fraction(*limits[high])) <= budget.value:
        return Fraction(*limits[high])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost_at(Fraction(*limits[middle])) <= budget.value else (low, middle)
    below, above = Fraction(*limits[low]), Fraction(*limits[high])
    start, end = cost_at(below), cost_at(above)
    return below + (above - below) * (budget.value - start) / (end - start)


def _spend_rest(ranks: dict[_Group, int], level: Fraction, budget: Budget, multiple: int) -> None:
    """Raise ranks, the furthest below its ideal first, until the rest pays for no permitted step."""
    rest, whole = budget.value - _spent(ranks), level.denominator
    # Weight, then name, settle ties, so that neither order nor chance does.
    order = sorted(ranks, key=lambda group: (group.weight, group.name), reverse=True)
    waiting = [(ranks[group] * whole - group.parts(level), place) for place, group in enumerate(order)]
    heapq.heapify(waiting)
    while waiting:
        above, place = heapq.heappop(waiting)
        chosen = order[place]
        step = chosen.cost * multiple
        if step <= rest and ranks[chosen] + multiple <= chosen.most:  # else never again: the rest only shrinks
            ranks[chosen] += multiple
            rest -= step
            heapq.heappush(waiting, (above + multiple * whole, place))


def _spent(ranks: Mapping[_Group, int]) -> int:
    return sum(group.cost * rank for group, rank in ranks.items())
