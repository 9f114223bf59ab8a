"""What a rank plan is held against, at the same budget.

uniform                                   every module the same
shuffled, shuffled-in-shape, reversed     the same scores on other modules
a rule's name                             the same scores, shared out by another rule
a probe's name                            the same rule, for another probe's scores
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from treadle.errors import InputError
from treadle.family.plan import RankPlan
from treadle.ranks.allocation import AllocationSettings, Budget, plan_of_scores
from treadle.ranks.controls import CONTROLS, Control
from treadle.ranks.eva import EvaSettings
from treadle.ranks.probes import PROBES, ProbeSettings
from treadle.ranks.rules import RULES, RuleName
from treadle.ranks.scores import ProbeScores, Value
from treadle.ranks.stability import spearman

COMPARED = ("output", "metric")
"""What the settings of probes call what they look at, and how far apart it lies."""


@dataclass(frozen=True)
class Peer:
    """Another way to share out the same budget, beside the plan.

    Attributes:
        name: as it was asked for.
        scores: what another probe measured; None where the peer has none of its own.
        ranks: every scored module's; 0 where it is dropped.
        parameters: of A and B.
        moved: parameters that the plan gives to other modules than the peer does.
        rank_correlation: Spearman's, of its ranks with the plan's; None where either are all the same.
        score_correlation: Spearman's, of its scores with the plan's; None where it has none of its own.
    """

    name: str
    scores: ProbeScores | None
    ranks: Mapping[str, int]
    parameters: int
    moved: int
    rank_correlation: float | None
    score_correlation: float | None


def check_names(names: Sequence[str], *, rule: RuleName, probe: str, control: Control | None = None) -> None:
    """Nothing, where every name is a peer's.

    Raises:
        InputError: one is none, stands there twice, or is the plan's own.
    """
    known = [*CONTROLS, *PROBES, *RULES]
    for place, name in enumerate(names):
        if name not in known:
            raise InputError(f"no such peer {name!r}", remedy=f"choose among {', '.join(known)}")
        if name in (rule, probe, control) or name in names[:place]:
            raise InputError(f"{name!r} is in the comparison already", remedy="name each peer once")


def name_of(settings: ProbeSettings) -> str:
    """The name of the probe whose settings these are."""
    return next(name for name, default in PROBES.items() if type(default()) is type(settings))


def is_probe(name: str) -> bool:
    """Whether the peer has scores of its own, which the model must give."""
    return name in PROBES


def settings_of(name: str, *, mean_rank: int, own: Mapping[str, Value] = MappingProxyType({})) -> ProbeSettings:
    """The settings with which the probe of this name is a peer: its defaults; of EVA, at the plan's mean rank.

    What is compared, `COMPARED`, is as in `own`, the settings of the plan's probe, where both have it.
    """
    default = PROBES[name]()
    if isinstance(default, EvaSettings):
        return replace(default, rank=max(1, mean_rank))
    return replace(default, **{key: own[key] for key in COMPARED if key in own and hasattr(default, key)})


def peer_of(
    name: str,
    scores: ProbeScores,
    plan: RankPlan,
    *,
    budget: Budget,
    settings: AllocationSettings,
    measured: ProbeScores | None = None,
) -> Peer:
    """The peer of this name, at the plan's budget and within its limits.

    Args:
        name: as `check_names` knows it.
        scores: the plan's own.
        plan: what it is held against.
        budget: the plan's.
        settings: the plan's.
        measured: the scores of the probe of this name, where it is a probe's.

    Raises:
        InputError: the scores leave nothing to share out.
    """
    rule = next((rule for rule in RULES if rule == name), settings.rule)
    limits = replace(settings, rule=rule, minimum=settings.least)  # the plan's own, not the rule's
    control: Control | None = next((known for known in CONTROLS if known == name), None)
    shared = plan_of_scores(measured or scores, budget=budget, settings=limits, control=control)
    ranks, planned = ranks_of(shared, scores), ranks_of(plan, scores)
    sizes = {module: shape.in_features + shape.out_features for module, shape in scores.shapes().items()}
    return Peer(
        name,
        measured,
        ranks,
        shared.count().total,
        sum(max(0, planned[module] - ranks[module]) * size for module, size in sizes.items()),
        _correlation(planned, ranks),
        None if measured is None else _correlation(scores.means(), measured.means()),
    )


def _correlation(first: Mapping[str, float | int], second: Mapping[str, float | int]) -> float | None:
    """Spearman's; None where one side has no order."""
    sides = [{name: float(value) for name, value in side.items()} for side in (first, second)]
    return spearman(*sides) if all(len(set(side.values())) > 1 for side in sides) else None


def ranks_of(plan: RankPlan, scores: ProbeScores) -> dict[str, int]:
    """The rank of every scored module, 0 where the plan drops it."""
    return {name: plan.modules[name].rank if name in plan.modules else 0 for name in scores.modules}
