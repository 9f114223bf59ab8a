"""What a rank plan is held against, at the same budget.

uniform                       every module the same
a rule's name                 the same scores, shared out by another rule
a probe's name                the same rule, for another probe's scores
shuffled, reversed            the same scores on other modules
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from treadle.errors import InputError
from treadle.family.plan import RankPlan
from treadle.ranks.allocation import AllocationSettings, Budget, allocate
from treadle.ranks.correlation import spearman
from treadle.ranks.eva import EvaSettings
from treadle.ranks.probes import PROBES, ProbeSettings
from treadle.ranks.rules import RULES, RuleName
from treadle.ranks.scores import ProbeScores

CONTROLS: Mapping[str, Callable[[ProbeScores], dict[str, float]]] = {
    "uniform": lambda scores: dict.fromkeys(scores.modules, 1.0),
}
"""Scores that no probe measures: what they are made of the plan's own."""


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


def check_names(names: Sequence[str], *, rule: RuleName, probe: str) -> None:
    """Nothing, where every name is a peer's.

    Raises:
        InputError: one is none, stands there twice, or is the plan's own.
    """
    known = [*CONTROLS, *PROBES, *RULES]
    for place, name in enumerate(names):
        if name not in known:
            raise InputError(f"no such peer {name!r}", remedy=f"choose among {', '.join(known)}")
        if name in (rule, probe) or name in names[:place]:
            raise InputError(f"{name!r} is in the comparison already", remedy="name each peer once")


def name_of(settings: ProbeSettings) -> str:
    """The name of the probe whose settings these are."""
    return next(name for name, default in PROBES.items() if type(default()) is type(settings))


def is_probe(name: str) -> bool:
    """Whether the peer has scores of its own, which the model must give."""
    return name in PROBES


def settings_of(name: str, *, mean_rank: int) -> ProbeSettings:
    """The settings with which the probe of this name is a peer: its defaults; of EVA, at the plan's mean rank."""
    default = PROBES[name]()
    return replace(default, rank=max(1, mean_rank)) if isinstance(default, EvaSettings) else default


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
    own = CONTROLS[name](scores) if name in CONTROLS else (measured or scores).means()
    rule = next((rule for rule in RULES if rule == name), settings.rule)
    shared = allocate(own, scores.shapes(), budget=budget, settings=replace(settings, rule=rule))
    ranks, planned = ranks_of(shared, scores), ranks_of(plan, scores)
    sizes = {module: shape.in_features + shape.out_features for module, shape in scores.shapes().items()}
    return Peer(
        name,
        measured,
        ranks,
        shared.count().total,
        sum(max(0, planned[module] - ranks[module]) * size for module, size in sizes.items()),
        spearman(list(planned.values()), list(ranks.values())),
        None if measured is None else spearman(list(scores.means().values()), list(own.values())),
    )


def ranks_of(plan: RankPlan, scores: ProbeScores) -> dict[str, int]:
    """The rank of every scored module, 0 where the plan drops it."""
    return {name: plan.modules[name].rank if name in plan.modules else 0 for name in scores.modules}
