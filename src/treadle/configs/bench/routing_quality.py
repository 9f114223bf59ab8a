"""What routing gets right: of trained fleets, under growth, other texts and attack."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from treadle.configs.evaluate import EvaluateRun
from treadle.configs.fleet import FleetRun, FleetSettings
from treadle.data.tasks import Condition
from treadle.toml import TomlTable


class Suite(TomlTable):
    """Tasks whose adapters share a bank.

    Attributes:
        name: of the suite.
        tasks: shipped task names.
        files: whether they need the data folder.
        examples: training examples a task.
        max_tokens: training tokens an adapter.
        epochs: passes over the examples.
        bare_share: share of the training examples shown without their instruction.
    """

    name: str
    tasks: tuple[str, ...] = Field(min_length=2)
    files: bool
    examples: int | None = None
    max_tokens: int | None = None
    epochs: int = 1
    bare_share: float = Field(default=0.5, ge=0.0, le=1.0)


class DemoQualityRun(TomlTable):
    """`demo-quality`.

    Attributes:
        seeds: one fleet each, per suite.
        limit: test prompts a task.
        fleet: what suites do not say themselves.
        suites: the banks.
    """

    seeds: tuple[int, ...] = Field(min_length=3)
    limit: int = Field(ge=1)
    fleet: FleetSettings
    suites: tuple[Suite, ...]


class ArmGroup(TomlTable):
    """Ways of answering that are run together and recorded as one run.

    Attributes:
        name: of the group.
        arms: as `treadle eval` spells them.
        calibration: of the bank that they route with: the fleet's public text, or the adapters' own training prompts.
        absent: whether each task is asked of a bank without its own adapter.
    """

    name: str
    arms: tuple[str, ...] = Field(min_length=1)
    calibration: Literal["public", "own"] = "public"
    absent: bool = False


class RoutingQualityRun(TomlTable):
    """`routing-quality`.

    Attributes:
        seeds: one fleet each: A, training and the order of examples.
        tasks: that have an adapter in the bank.
        asked: those of them that are evaluated.
        limit: test prompts a task and condition.
        conditions: forms of the prompts.
        least_gain: the reference must beat the base by so much in the trained form, else the task does not count.
        resamples: of the paired bootstrap over prompts and seeds.
        groups: the arms.
        fleet: how fleets are grown.
    """

    seeds: tuple[int, ...] = Field(min_length=3)
    tasks: tuple[str, ...] = Field(min_length=2)
    asked: tuple[str, ...] = Field(min_length=2)
    limit: int = Field(ge=1)
    conditions: tuple[Condition, ...] = Field(min_length=1)
    least_gain: float
    resamples: int = Field(ge=100)
    groups: tuple[ArmGroup, ...] = Field(min_length=1)
    fleet: FleetSettings

    def fleet_run(self, seed: int, *, work: Path, data: Path | None) -> FleetRun:
        """How the fleet of a seed is grown, in a folder of its own within `work`."""
        return self.fleet.model_copy(update={"seed": seed}).run(self.tasks, out=work / f"quality-{seed}", data=data)

    def questions(self, group: ArmGroup, seed: int, *, data: Path | None, router: Path | None) -> EvaluateRun:
        """What is asked of one group."""
        return EvaluateRun(
            bank=Path(),
            tasks=self.asked,
            data=data,
            conditions=self.conditions,
            limit=self.limit,
            seed=seed,
            few_shot=False,
            arms=group.arms,
            router=router,
        )


class RoutingRanksRun(TomlTable):
    """`routing-ranks`; tasks, forms and training are those of `routing-quality`.

    Attributes:
        ranks: of every module, a fleet each; that of `routing-quality` is taken from there.
        seed: of the fleets.
        limit: test prompts a task and condition.
        arms: as `treadle eval` spells them; base, oracle and sequence among them.
    """

    ranks: tuple[int, ...] = Field(min_length=1)
    seed: int
    limit: int = Field(ge=1)
    arms: tuple[str, ...] = ("base", "oracle", "sequence")


class RoutingCompositionRun(TomlTable):
    """`routing-composition`.

    Attributes:
        seeds: one fleet each.
        tasks: that have an adapter; every ordered pair of them is asked.
        limit: prompts a pair.
        top_k: how many adapters act together, in turn.
        temperature: of their weights.
        fleet: how fleets are grown.
    """

    seeds: tuple[int, ...] = Field(min_length=3)
    tasks: tuple[str, ...] = Field(min_length=2)
    limit: int = Field(ge=1)
    top_k: tuple[int, ...] = Field(min_length=1)
    temperature: float = Field(gt=0.0)
    fleet: FleetSettings


class RoutingContinualRun(TomlTable):
    """`routing-continual`.

    Attributes:
        fleet: its tasks join in this order, the first being there from the beginning.
        updated: the task whose adapter is trained again at the end.
        limit: test prompts a task.
        quick_tasks: the tasks under --quick, none of which needs files; the first is updated.
        quick_limit: prompts a task under --quick.
        quick_tokens: training tokens of an adapter under --quick.
    """

    fleet: FleetRun
    updated: str
    limit: int = Field(ge=1)
    quick_tasks: tuple[str, ...] = Field(min_length=2)
    quick_limit: int = Field(ge=1)
    quick_tokens: int = Field(ge=1)

    @model_validator(mode="after")
    def _sound(self) -> "RoutingContinualRun":
        if self.updated not in self.fleet.tasks:
            raise ValueError(f"updated is {self.updated!r}, which is none of fleet.tasks")
        return self


class PublicTextChoice(TomlTable):
    """A public text to calibrate on, as `recipes.calibration.PublicSource` has it, under a name for tables."""

    name: str
    text: str = "pydoc"
    limit: int = Field(ge=1)
    words: int = Field(ge=1)
    seed: int = 0
    field: str = "text"
    method: Literal["public", "analytic"] = "public"


class RoutingCalibrationRun(TomlTable):
    """`routing-calibration`; the fleets are those of `routing-quality`.

    Attributes:
        limit: test prompts a task and condition.
        outside: tasks without an adapter, whose questions belong to nobody.
        texts: to calibrate on; the first is of the kind that the fleets have.
    """

    limit: int = Field(ge=1)
    outside: tuple[str, ...] = Field(min_length=1)
    texts: tuple[PublicTextChoice, ...] = Field(min_length=2)


class RoutingAttackRun(TomlTable):
    """`routing-attack`.

    Attributes:
        seeds: one fleet each.
        tasks: of the consortium's members; each in turn is the victim, and the one behind it attacks.
        limit: prompts of the victim that are routed.
        barred: how many of them are routed again under a permitted set that leaves the attacker out.
        known: training texts that the attacker has: of the victim's kind to aim with, its own to be calibrated on.
        inflation: how many times its honest B a member submits.
        fleet: how fleets are grown.
    """

    seeds: tuple[int, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=2)
    limit: int = Field(ge=1)
    barred: int = Field(ge=1)
    known: int = Field(ge=1)
    inflation: float = Field(default=10.0, gt=0)
    fleet: FleetSettings
