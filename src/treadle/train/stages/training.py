"""LoRA-PAR: one adapter trained in stages, each of which moves its own region.

start       A and B of every module, by name
warm-up     all parameters on all systems' examples, where the start has B = 0
importance  of every rank or element, to every system by itself
regions     what each system selects at θ, and what several share
stages      in their order: a system's own parameters and a share of the shared ones, on its examples

Reference: arXiv 2507.20999. Deviations: importance is measured after a warm-up where B starts at 0 (the article starts
from PiSSA and says nothing of it); regions may be made of whole ranks; a stage may train any system by SFT or GRPO.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.data.metrics import Metric
from treadle.data.prompts import Example
from treadle.errors import ConfigError, InputError, MismatchError
from treadle.evaluation.answers import Answering, correct
from treadle.family.family import AdapterFamily
from treadle.family.injection import trainable_factors
from treadle.partition.importance import Measured, Score, measure
from treadle.partition.region_files import load_regions, save_regions
from treadle.partition.regions import Regions
from treadle.partition.units import Mask
from treadle.progress import Progress, silent
from treadle.train.checkpoint import LOST, check_facts
from treadle.train.masked import MaskedAdamW, element_masks, masked_gradients
from treadle.train.objectives import mean_losses
from treadle.train.rows import Row, encoded, shuffled
from treadle.train.settings import SftSettings
from treadle.train.stages.acting import Acting, acting, all_ranks, others_acting
from treadle.train.stages.factors import Factors
from treadle.train.stages.hosting import Hosting, Look, Record, discard, last_checkpoint
from treadle.train.stages.rewards import Judging, Reward, reward_of
from treadle.train.stages.rollouts import fitting, train_by_rollouts
from treadle.train.stages.settings import GrpoStage, SftStage, Stage
from treadle.train.stages.starts import WITHOUT_IMPORTANCE, Start, started
from treadle.train.stages.state import Facts, Kept, keep, kept
from treadle.train.stages.supervised import train_supervised
from treadle.train.unchanged import eval_mode

WARM_UP = "warm-up"
_SAVE_STEPS = 50
_ALL = 1 << 30
_BLOCKS = 8  # of a system's samples: four rows of growing draws
_OF = "facts.json"


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
class Passed:
    """What one part of the run told.

    Attributes:
        name: "warm-up", or the stage's number, system and kind.
        records: of TRL, by step; and accuracy by system, where it was measured.
        parameters: that were trained.
        left_out: examples whose prompt was too long.
    """

    name: str
    records: Sequence[Record]
    parameters: int
    left_out: int = 0


@dataclass(frozen=True)
class Staged:
    """What a run made.

    Attributes:
        factors: at the end.
        regions: of the systems; None where there are none.
        passed: the warm-up, if any, and every stage.
        accuracy: name of the moment → system → share of held-out examples answered rightly.
    """

    factors: Factors
    regions: Regions | None
    passed: Sequence[Passed]
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])


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


def train_in_stages(run: Run) -> Staged:
    """The factors after all stages; a run that was killed continues from its last checkpoint.

    On return the model is as it was. Equal model, data, family and plan give the same factors on one CPU with one
    number of threads.

    Args:
        run: its parts; `folder` holds its state, which is the caller's to remove once the result is safe.

    Raises:
        InputError: a system has no example, or a stage no parameter or no example to train; said before any stage.
        MismatchError: the folder's state is of another run.
        TreadleError: every importance is 0, a reward fails, or a loss is not finite.
    """
    partition = run.plan.partition
    _check(run)
    first = started(run.model, run.family, partition.start, moves_A=partition.moves_A, seed=partition.seed)
    factors, facts, passed = first, run.facts(), list[Passed]()
    accuracy = {"before": _measured(run, first)}
    if partition.warm_up is not None:
        rows = _mixture(run, partition.warm_up)
        factors, told = _part(run, first, factors, None, (WARM_UP, partition.warm_up, rows), facts)
        passed.append(told)
    regions = _regions(run, factors, facts) if partition.granularity != "none" else None
    if regions is not None:
        facts = {**facts, **regions.facts}  # what a control has done to them
    active = [_active(regions, stage, i) if regions else None for i, stage in enumerate(run.plan.stages, 1)]
    for number, (assigned, region) in enumerate(zip(run.plan.stages, active, strict=True), 1):
        name = f"stage-{number}"
        facts = facts | assigned.decisive(number)
        factors, told = _part(run, first, factors, region, (name, assigned.stage, assigned.system), facts)
        passed.append(told)
        accuracy[name] = _measured(run, factors)
    return Staged(factors, regions, passed, {name: found for name, found in accuracy.items() if found})


def _check(run: Run) -> None:
    for name, system in run.systems.items():
        if not system.examples:
            raise InputError("no example belongs to it", where=f"system {name}", remedy="check the labels of the data")
    for assigned in run.plan.stages:  # what is wrong with a stage is said before the first one is trained
        if assigned.system not in run.systems:
            known = ", ".join(run.systems)
            raise InputError(f"no system {assigned.system!r}", where="stages", remedy=f"choose among {known}")
        if isinstance(assigned.stage, SftStage):
            run.rows(assigned.system, assigned.stage.max_length)
        else:
            _rewards(run, assigned.stage, assigned.system)
            fitting(run.tokenizer, run.systems[assigned.system].examples, assigned.stage)
    partition = run.plan.partition
    if partition.granularity != "none" and partition.start in WITHOUT_IMPORTANCE and partition.warm_up is None:
        raise ConfigError(
            f"start = {partition.start!r} has B = 0, where every importance is 0", remedy="give it a warm-up"
        )


def _active(regions: Regions, assigned: Assigned, number: int) -> Mask:
    """What the run's stage of that number trains.

    Raises:
        InputError: nothing.
    """
    region, system = regions.active(assigned.system, assigned.share), assigned.system
    if region.parameters == 0:
        raise InputError(
            f"stage {number} has no parameter to train: what {system} selected is shared, and share = "
            f"{assigned.share:g} takes nothing of it",
            where="region",
            remedy="raise the stage's share",
        )
    return region


def _measured(run: Run, factors: Factors) -> dict[str, float]:
    if not any(system.held_out for system in run.systems.values()):
        return {}
    run.progress("accuracy on held-out examples", 0, 0)
    with acting(run.model, factors, all_ranks(factors)):
        return run.accuracy()


def _mixture(run: Run, stage: SftStage) -> list[Row]:
    """All systems' rows in an order drawn from the seed."""
    rows = [row for name in run.systems for row in run.rows(name, stage.max_length)]
    return [rows[place] for place in shuffled(len(rows), stage.seed, WARM_UP)]


def _part(
    run: Run,
    first: Factors,
    factors: Factors,
    region: Mask | None,
    task: tuple[str, Stage, str | list[Row]],
    facts: Facts,
) -> tuple[Factors, Passed]:
    """The factors after one part of the run, from disk if it was done before."""
    name, stage, _ = task
    path = run.folder / f"{name}.safetensors"
    parameters = factors.trainable if region is None else region.parameters
    found = kept(path, first, facts)
    if found is None:
        hosting = Hosting(
            _folder_of(run.folder / name, facts),
            _save_steps(stage),
            _look(run),
            run.plan.look_steps,
            _labelled(run.progress, name),
        )
        with (
            acting(run.model, factors, _ranks(factors, region)) as now,
            _optimizer(now, region, stage) as optimizer,
        ):
            records, left_out = _trained(run, now, optimizer, task, hosting)
            found = Kept(now.now(), records, left_out)
        keep(path, found, facts)
        discard(hosting.folder)
    return found.factors, Passed(name, found.records, parameters, found.left_out)


def _folder_of(folder: Path, facts: Facts) -> Path:
    """The folder of a part's checkpoints, which are of a run with these facts or of none.

    Raises:
        MismatchError: they are of another run; names what differs.
    """
    path = folder / _OF
    if path.exists():
        check_facts(path, files.read_json(path), facts)
    elif last_checkpoint(folder) is not None:
        raise MismatchError("the checkpoints are of a run that is not named", where=folder, remedy=LOST)
    else:
        files.write_json(path, dict(facts))
    return folder


def _save_steps(stage: Stage) -> int:
    """Steps between checkpoints: none between two updates on one set of completions, which no checkpoint holds."""
    cycle = stage.iterations if isinstance(stage, GrpoStage) else 1
    return max(1, _SAVE_STEPS // cycle) * cycle


def _trained(
    run: Run,
    now: Acting,
    optimizer: torch.optim.Optimizer | None,
    task: tuple[str, Stage, str | list[Row]],
    hosting: Hosting,
) -> tuple[Sequence[Record], int]:
    """The records of a part, and how many examples it left out."""
    _, stage, data = task
    if isinstance(stage, SftStage):
        rows = run.rows(data, stage.max_length) if isinstance(data, str) else data
        return train_supervised(now, run.tokenizer, rows, stage, hosting, optimizer=optimizer).records, 0
    assert isinstance(data, str)  # a warm-up, which mixes systems, is supervised
    system = run.systems[data]
    rewards = _rewards(run, stage, data)
    fit = fitting(run.tokenizer, system.examples, stage)
    told = train_by_rollouts(now, run.tokenizer, fit, rewards, stage, hosting, optimizer=optimizer)
    return told.records, len(system.examples) - len(fit)


def _rewards(run: Run, stage: GrpoStage, system: str) -> dict[str, Reward]:
    """The stage's rewards by name."""
    judging = Judging(run.systems[system].metric, run.plan.allow_code_execution)
    return {name: reward_of(name, judging) for name in stage.rewards}


def _ranks(factors: Factors, region: Mask | None) -> Mapping[str, torch.Tensor]:
    """The ranks that are PEFT's to train: those of the region, or all where single elements are masked."""
    if region is None or not region.ranks:
        return all_ranks(factors)
    return region.ranks


@contextlib.contextmanager
def _optimizer(now: Acting, region: Mask | None, stage: Stage) -> Iterator[torch.optim.Optimizer | None]:
    """A block in which only the region's elements move; None where every parameter that the stage has may move.

    Betas, epsilon and kernel are those of the Trainer's AdamW.
    """
    if region is None or region.ranks:
        yield None
        return
    masks = element_masks(region, now.lora_A if now.factors.moves_A else {}, now.lora_B)
    with masked_gradients(masks):
        yield MaskedAdamW(masks, masks, lr=stage.learning_rate, weight_decay=stage.weight_decay, fused=True)


def _look(run: Run) -> Look | None:
    if not any(system.held_out for system in run.systems.values()):
        return None
    return lambda step: {f"accuracy/{name}": value for name, value in run.accuracy().items()}


def _labelled(progress: Progress, name: str) -> Progress:
    return lambda description, done, total: progress(f"{name}: {description}", done, total)


def _regions(run: Run, factors: Factors, facts: Facts) -> Regions:
    """What every system selects, from its own samples; from disk if they were measured before."""
    partition, path = run.plan.partition, run.folder / "regions.safetensors"
    if path.exists():
        regions = load_regions(path)
        check_facts(path, regions.facts, facts)
    else:
        found = {name: _sums(run, factors, name) for name in run.systems}
        regions = Regions.measured(found, theta=partition.theta, score=partition.score, facts=facts)
        save_regions(regions, path)
    # The run's facts hold digests of its rows, and regions may leave its folder.
    regions = replace(regions, facts={"seed": partition.seed, "family": run.family.fingerprint})
    return partition.control(regions) if partition.control else regions


def _longest(run: Run, system: str) -> int:
    """Tokens of a row that its importance is measured on: as many as training reads, or all where only rewards do."""
    stages = [assigned.stage for assigned in run.plan.stages if assigned.system == system]
    read = [stage.max_length for stage in (run.plan.partition.warm_up, *stages) if isinstance(stage, SftStage)]
    return max(read, default=_ALL)


def _digest(system: System) -> str:
    """Of all that is learnt from and judged by; kept with the state of a run under way, and never handed on."""
    metric = None if system.metric is None else asdict(system.metric)
    content = [[asdict(example) for example in system.examples], metric]
    return hashlib.sha256(files.canonical_json(content)).hexdigest()


def _sums(run: Run, factors: Factors, system: str) -> Measured:
    partition = run.plan.partition
    assert partition.granularity != "none"
    rows = run.rows(system, _longest(run, system))
    # As many of every system: draws of unequal size could not be told from systems that differ.
    count = min(partition.samples, *(len(each.examples) for each in run.systems.values()))
    chosen = shuffled(len(rows), partition.seed, f"importance/{system}")[:count]
    order = sorted(chosen, key=lambda place: rows[place].tokens)
    size = partition.batch_size
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    names = list(factors.plan.modules)
    folded = {name: factors.scaling(name) * factors.lora_B[name] for name in names}
    moving = names if factors.moves_A else ()
    with (
        others_acting(run.model, factors, all_ranks(factors)),
        trainable_factors(run.model, factors.lora_A, folded, train_A=moving, train_B=names) as (lora_A, lora_B),
    ):
        measured = measure(
            lambda places: mean_losses(run.model, [(rows[i].prompt, rows[i].target) for i in places]).sum(),
            batches,
            lora_A=lora_A,
            lora_B=lora_B,
            granularity=partition.granularity,
            blocks=max(2, min(_BLOCKS, count - count % 2)),
            progress=_labelled(run.progress, system),
        )
    return measured.unfolded({name: factors.scaling(name) for name in names})
