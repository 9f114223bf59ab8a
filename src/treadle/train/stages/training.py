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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from treadle import files
from treadle.errors import ConfigError, InputError, MismatchError
from treadle.partition.regions import Regions
from treadle.partition.units import Mask
from treadle.progress import part
from treadle.train.checkpoint import LOST, check_facts
from treadle.train.masked import MaskedAdamW, element_masks, masked_gradients
from treadle.train.rows import Row, shuffled
from treadle.train.stages.acting import Acting, acting, all_ranks
from treadle.train.stages.factors import Factors
from treadle.train.stages.hosting import Hosting, Look, Record, discard, last_checkpoint
from treadle.train.stages.measuring import selected
from treadle.train.stages.rewards import Judging, Reward, reward_of
from treadle.train.stages.rollouts import fitting, train_by_rollouts
from treadle.train.stages.run import Assigned, Run
from treadle.train.stages.settings import GrpoStage, SftStage, Stage
from treadle.train.stages.starts import WITHOUT_IMPORTANCE, started
from treadle.train.stages.state import Facts, Kept, keep, kept
from treadle.train.stages.supervised import train_supervised

WARM_UP = "warm-up"
_SAVE_STEPS = 50
_OF = "facts.json"


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
    regions = selected(run, factors, facts) if partition.granularity != "none" else None
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
            part(run.progress, name),
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
