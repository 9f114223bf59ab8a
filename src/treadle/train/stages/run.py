"""What a run in stages is told: its systems, how parameters are shared out among them, and its stages."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.data.metrics import Metric
from treadle.data.prompts import Example
from treadle.evaluation.answers import Answering, correct
from treadle.family.family import AdapterFamily
from treadle.partition.importance import Score
from treadle.partition.regions import Regions
from treadle.progress import Progress, silent
from treadle.train.rows import Row, encoded
from treadle.train.settings import SftSettings
from treadle.train.stages.settings import SftStage, Stage
from treadle.train.stages.starts import Start
from treadle.train.unchanged import eval_mode


@dataclass(frozen=True)
class System:
    """What one system learns from and is measured by.

    Attributes:
        examples: to train on.
        held_out: to measure accuracy on; empty measures none.
        metric: how generated answers are judged; None where no reward and no accuracy needs one.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example] = ()
    metric: Metric | None = None


@dataclass(frozen=True)
class Partition:
    """How parameters are shared out among systems.

    Attributes:
        start: where A and B begin.
        moves_A: whether A is trained too.
        warm_up: before importance is measured; needed where the start has B = 0.
        granularity: of the regions; "none" trains everything in every stage.
        score: of importance.
        theta: share of its importance that a system selects, in (0, 1].
        samples: of each system, that importance is measured on; where one has fewer, as many of each as that one has.
        batch_size: of them in one pass.
        seed: of the start and the choice of samples.
        control: what is done to the regions afterwards, such as shuffling them for an ablation; says so in their facts.
    """

    start: Start = "zero"
    moves_A: bool = False
    warm_up: SftStage | None = None
    granularity: Literal["rank", "element", "none"] = "rank"
    score: Score = "taylor"
    theta: float = 0.9
    samples: int = 100
    batch_size: int = 8
    seed: int = 0
    control: Callable[[Regions], Regions] | None = None

    def decisive(self) -> dict[str, str | int | float | bool | None]:
        """What shapes the regions, by name."""
        given = {name: value for name, value in asdict(replace(self, control=None)).items() if name != "control"}
        warm_up = given.pop("warm_up") or {}
        given.pop("batch_size")
        return {**given, **{f"warm_up.{name}": value for name, value in warm_up.items()}}


@dataclass(frozen=True)
class Assigned:
    """A stage with its system and the share of shared parameters that it trains."""

    system: str
    stage: Stage
    share: float = 1.0

    def decisive(self, number: int) -> dict[str, str | int | float | bool | None]:
        """What the stage is told, by name, as the run's stage of that number."""
        told = {**self.stage.decisive(), "system": self.system, "share": self.share}
        return {f"stage-{number}.{name}": value for name, value in told.items()}


@dataclass(frozen=True)
class Plan:
    """All choices of a run."""

    partition: Partition
    stages: Sequence[Assigned]
    look_steps: int = 0
    allow_code_execution: bool = False


@dataclass(frozen=True)
class Run:
    """A run's parts: the model it trains, what on, and where its state is kept."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: AdapterFamily
    systems: Mapping[str, System]
    plan: Plan
    folder: Path
    progress: Progress = silent

    def facts(self) -> dict[str, str | int | float | bool | None]:
        """What tells this run from others, but for its stages."""
        return {
            "family": self.family.fingerprint,
            **self.plan.partition.decisive(),
            **{f"data.{name}": _digest(system) for name, system in self.systems.items()},
        }

    def rows(self, system: str, max_length: int) -> list[Row]:
        """The system's examples as tokens."""
        settings = SftSettings(max_length=max_length)
        return encoded(self.model, self.tokenizer, self.systems[system].examples, settings)

    def accuracy(self) -> dict[str, float]:
        """System → share of its held-out examples that the model, as it stands, answers rightly."""
        found: dict[str, float] = {}
        for name, system in self.systems.items():
            if system.held_out and system.metric is not None:
                answering = Answering(allow_code_execution=self.plan.allow_code_execution)
                with eval_mode(self.model):
                    right = correct(self.model, self.tokenizer, system.held_out, system.metric, answering)
                found[name] = sum(right) / len(right)
        return found


def _digest(system: System) -> str:
    """Of all that is learnt from and judged by; kept with the state of a run under way, and never handed on."""
    metric = None if system.metric is None else asdict(system.metric)
    content = [[asdict(example) for example in system.examples], metric]
    return hashlib.sha256(files.canonical_json(content)).hexdigest()
