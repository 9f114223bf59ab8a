"""The TOML of `treadle train` in stages (LoRA-PAR): systems, regions, stages."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from treadle.configs.train import SourceData, TaskData, TrainRun, kind_of_data
from treadle.data.metrics import Code, ExactMatch
from treadle.files import checked_name
from treadle.partition.importance import SCORES, Score
from treadle.toml import TomlTable, read_toml
from treadle.train.stages.settings import GrpoStage, SftStage
from treadle.train.stages.starts import WITHOUT_IMPORTANCE, Start

Repeats = Literal["gsm8k"]
"""The tables of `reports/published.toml`."""

Ablation = Literal["shuffled", "all", "lower-rank", "reversed"]
"""What may be taken away from a run; see `recipes.stage_ablations`."""


class SystemTask(TaskData):
    """The training split of a task, as the data of a system.

    Attributes:
        held_out: examples of the validation split that accuracy is measured on; 0 measures none.
    """

    held_out: int = Field(default=0, ge=0)


class SystemSource(SourceData):
    """Rows of any source with a template, as the data of a system.

    Attributes:
        where: field → value; only rows with these values belong to the system, as `treadle classify` labels them.
        metric: how generated answers are judged; rewards `exact` and `code` need it, and so does accuracy.
        held_out: the last rows so many are not trained on, but accuracy is measured on them.
    """

    where: dict[str, str | int | bool] = Field(default_factory=dict[str, str | int | bool])
    metric: Annotated[ExactMatch | Code, Field(discriminator="kind")] | None = None
    held_out: int = Field(default=0, ge=0)


SystemData = Annotated[
    Annotated[SystemTask, Tag("task")] | Annotated[SystemSource, Tag("source")], Discriminator(kind_of_data)
]


class RegionRun(TomlTable):
    """Which parameters belong to which system.

    Attributes:
        start: where A and B begin.
        moves_A: whether A is trained too; the adapter then leaves its family, and says so.
        warm_up: fine-tuning of all parameters on all systems' examples before importance is measured; the starts at
            which B = 0 need it.
        granularity: "rank" makes regions of whole ranks, "element" of single parameters, "none" trains everything in
            every stage.
        score: of importance; see `partition.importance`.
        theta: share of a system's total importance that its parameters reach, in (0, 1].
        samples: of each system, importance is measured on.
        batch_size: of them in one pass; no influence but on memory and time.
        seed: of the start and of the choice of samples.
    """

    start: Start = "zero"
    moves_A: bool = False
    warm_up: SftStage | None = None
    granularity: Literal["rank", "element", "none"] = "rank"
    score: Score = SCORES[0]
    theta: float = Field(default=0.9, gt=0.0, le=1.0)
    samples: int = Field(default=100, ge=2)
    batch_size: int = Field(default=8, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _sound(self) -> "RegionRun":
        if self.granularity != "none" and self.start in WITHOUT_IMPORTANCE and self.warm_up is None:
            raise ValueError(f"start = {self.start!r} has B = 0, where every importance is 0: add [regions.warm_up]")
        return self


class StageRun(TomlTable):
    """One stage: whose data, whose parameters, how they are trained.

    Attributes:
        system: whose examples train whose parameters.
        share: of the shared parameters, those most important to the system, that are trained too; in [0, 1]
            (α of the first stage, β of the second).
        sft: makes it supervised fine-tuning.
        grpo: makes it group-relative policy optimisation.
    """

    system: str
    share: float = Field(default=1.0, ge=0.0, le=1.0)
    sft: SftStage | None = None
    grpo: GrpoStage | None = None

    @model_validator(mode="after")
    def _sound(self) -> "StageRun":
        if (self.sft is None) == (self.grpo is None):
            raise ValueError("a stage is either sft or grpo: give it one of the two tables")
        return self


class StagesRun(TomlTable):
    """Which adapter is trained in stages, in which family, on what.

    Attributes:
        family: the family's folder.
        name: the adapter's.
        out: the adapter's folder; what is known of its regions goes beside it, into `OUT.regions.safetensors`.
        systems: name → data, in an order that means nothing.
        regions: whose parameters are whose.
        stages: in the order in which they are trained.
        base: where the family's base model is, if its own label does not say: catalogue name, folder or hub id.
        look_steps: steps between measurements of accuracy within a stage; 0 measures at its ends alone.
        repeats: the published table whose training this is; the run's page then has the published figures beside it.
        ablations: the run again with one thing taken away, for comparison; each takes as long as the run, and makes
            figures but no adapter. "shuffled": regions of the same sizes by chance; "all": no regions; "lower-rank": a
            plain LoRA of about as many parameters; "reversed": the stages in reverse order.
        minds: whether every system's own and shared ranks are saved beside `out` as an adapter of their own,
            `NAME-SYSTEM`, for a bank to route to.
        public: whether the data may be known; only then their digest is recorded in the adapter.
        device: "auto", "cpu", "cuda", …
        overwrite: whether folders at `out` are replaced.

    Reference: arXiv 2507.20999.
    """

    family: Path
    name: str
    out: Path
    systems: dict[str, SystemData]
    regions: RegionRun = RegionRun(granularity="none")
    stages: tuple[StageRun, ...] = Field(min_length=1)
    base: str | None = None
    look_steps: int = Field(default=0, ge=0)
    repeats: Repeats | None = None
    ablations: tuple[Ablation, ...] = ()
    minds: bool = False
    public: bool = False
    device: str = "auto"
    overwrite: bool = False

    @model_validator(mode="after")
    def _sound(self) -> "StagesRun":
        for name, system in self.systems.items():
            checked_name(name)
            if system.held_out and not _is_measured(system):
                raise ValueError(f"systems.{name} holds rows out and has no metric to measure them by: add one")
        for place, stage in enumerate(self.stages):
            if stage.system not in self.systems:
                known = ", ".join(self.systems)
                raise ValueError(f"stages.{place}.system is {stage.system!r}; the systems are {known}")
        if self.regions.granularity != "none" and len(self.systems) < 2:
            raise ValueError("regions need two systems or more to tell apart; regions.granularity = 'none' needs one")
        if self.minds and (self.regions.granularity != "rank" or self.regions.moves_A):
            raise ValueError("minds are adapters of the family: they need regions of whole ranks, and A frozen")
        self._check_ablations()
        return self

    def _check_ablations(self) -> None:
        if len(set(self.ablations)) < len(self.ablations):
            raise ValueError("ablations names one twice")
        if self.ablations and not any(map(_is_measured, self.systems.values())):
            raise ValueError("ablations are compared on held-out examples: set held_out and metric of a system")
        if self.regions.granularity == "none" and set(self.ablations) - {"reversed"}:
            raise ValueError("without regions there is nothing to ablate but the order of stages: 'reversed'")
        if "reversed" in self.ablations and len(self.stages) < 2:
            raise ValueError("ablation 'reversed' needs two stages")


def _is_measured(system: SystemTask | SystemSource) -> bool:
    """Whether accuracy can be measured of it; a task has a metric always."""
    return system.held_out > 0 and (isinstance(system, SystemTask) or system.metric is not None)


def run_kind(path: Path) -> type[TrainRun] | type[StagesRun]:
    """What the TOML at `path` configures: stages, or plain training.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    return StagesRun if "stages" in read_toml(path) else TrainRun
