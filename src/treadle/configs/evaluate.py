"""The TOML of `treadle eval`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pydantic import Field, field_validator

from treadle.data.tasks import Condition
from treadle.routing.routed import Granularity
from treadle.routing.scorers import SCORERS
from treadle.toml import TomlTable

ARMS = ("base", "alone", "mean", "arrow", "token", "sequence", "oracle")
"""The ways of answering that are compared unless the run says otherwise."""

UNROUTED = ("base", "alone", "oracle")
"""The ways of answering in which nobody chooses."""

ROUTER = "linear"
"""The scorer that has to be trained."""


@dataclass(frozen=True)
class RoutedArm:
    """A way of answering in which a scorer chooses.

    Attributes:
        scorer: by name, `ROUTER` included.
        granularity: how often it chooses.
    """

    scorer: str
    granularity: Granularity


_SHORT: Mapping[str, RoutedArm] = {
    "token": RoutedArm("seqr", "token"),
    "sequence": RoutedArm("seqr", "sequence"),
}


def routed_arm(arm: str) -> RoutedArm:
    """What SCORER, SCORER:GRANULARITY, or one of the short names means: `token`, the article's, and `sequence`, ours.

    Without a granularity, scorers of prompts choose by `sequence`, the others by `token`, as their articles do.

    Raises:
        ValueError: there is no such arm.
    """
    if arm in _SHORT:
        return _SHORT[arm]
    scorer, _, granularity = arm.partition(":")
    if scorer != ROUTER and scorer not in SCORERS:
        known = (*UNROUTED, *_SHORT, *SCORERS, ROUTER)
        raise ValueError(f"no such arm {arm!r}; choose among {', '.join(known)}, with :GRANULARITY for scorers")
    whole = scorer == ROUTER or SCORERS[scorer].prompt is not None
    granularity = granularity if ":" in arm else "sequence" if whole else "token"
    if granularity not in get_args(Granularity) or (whole and granularity != "sequence"):
        raise ValueError(f"arm {arm!r}: {scorer!r} does not choose by {granularity!r}")
    return RoutedArm(scorer, granularity)  # type: ignore[arg-type]


class EvaluateRun(TomlTable):
    """Which bank is asked which tasks, and how.

    Attributes:
        bank: the bank's folder.
        base: the base model, where the name that the family records does not lead to it.
        tasks: names of shipped tasks or paths of task files; a task's own adapter is the one of its name.
        data: the folder that the tasks' relative data paths start from.
        conditions: forms of the prompts.
        limit: test prompts a task.
        seed: which of them.
        few_shot: whether the base also answers with solved examples before the prompt.
        arms: which ways of answering: "base"; "alone", every adapter by itself; "oracle"; a scorer, or
            SCORER:GRANULARITY; "token" is the article's, "sequence" what a routed model does by default.
        live: whether `sequence` runs the routed model, rather than injecting the adapter that was chosen (equal by
            law, and tested).
        router: where the router of the arm "linear" is kept: read if it is there, else fitted and written.
        router_examples: training examples a task that it is fitted on, each with and without its instruction; a fifth
            as many more choose its penalty.
        allow_code_execution: whether generated code may run.
        device: "auto", "cpu", "cuda", …
        out: where the JSON goes.
    """

    bank: Path
    base: str | None = None
    tasks: tuple[str, ...] = Field(min_length=1)
    data: Path | None = None
    conditions: tuple[Condition, ...] = ("trained", "bare")
    limit: int = Field(default=200, ge=1)
    seed: int = 0
    few_shot: bool = True
    arms: tuple[str, ...] = Field(default=ARMS, min_length=1)
    live: bool = False
    router: Path | None = None
    router_examples: int = Field(default=200, ge=5)
    allow_code_execution: bool = False
    device: str = "auto"
    out: Path | None = None

    @field_validator("arms")
    @classmethod
    def _known(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            if arm not in UNROUTED:
                routed_arm(arm)
        if len(set(arms)) < len(arms):
            raise ValueError("an arm is named twice")
        return arms
