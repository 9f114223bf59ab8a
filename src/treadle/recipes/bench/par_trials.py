"""Trials of training in stages: arms × rates × worlds, one run each.

tune   every arm on one grid of learning rates, on worlds of their own
test   every arm at its best rate, on fresh worlds, paired by world
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.configs.bench.partition import ParArm, ParTrials
from treadle.errors import InputError, MismatchError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.identity import identify_folder
from treadle.models.loading import load_model, load_tokenizer
from treadle.partition.regions import shuffled as shuffled_regions
from treadle.progress import Progress
from treadle.recipes.bench.result import commit, finished_runs, is_recorded, record_run
from treadle.train.stages.run import Assigned, Partition, Plan, Run, System
from treadle.train.stages.settings import Stage
from treadle.train.stages.training import Staged, train_in_stages

WARM_UP = "warm-up"
_BASE = "base_sha256"
_SHORT = 12  # digits of a base's identity that a record keeps
_ENDS = 5  # records over which the first and the last reward are averaged


@dataclass(frozen=True)
class Trial:
    """One run: an arm in a world, all rates multiplied by the factor."""

    arm: ParArm
    stage: Literal["tune", "test"]
    seed: int
    factor: float

    def key(self) -> dict[str, object]:
        """What tells this trial from all others, as JSON has it."""
        return {"arm": self.arm.name, "stage": self.stage, "seed": self.seed, "factor": self.factor}


@dataclass(frozen=True)
class Trained:
    """A trial after its last stage: what it learnt from, and what it made on which model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: AdapterFamily
    systems: Mapping[str, System]
    made: Staged


@dataclass(frozen=True)
class World:
    """Where trials happen.

    Attributes:
        base: maps a seed to the folder of its base model.
        systems: what a trial learns from and is asked.
        parts: the name of a part of a run → its system and stage.
        also: what else is measured of a trained trial, by name; None measures accuracy, reward and shares alone.
    """

    base: Callable[[int], Path]
    systems: Callable[[Trial], Mapping[str, System]]
    parts: Mapping[str, tuple[str, Stage]]
    also: Callable[[Trial, Trained], Mapping[str, object]] | None = None


def run_trials(config: ParTrials, world: World, runs: Path, progress: Progress) -> None:
    """Do every trial that `runs` lacks; one that cannot be trained, because no rank is left, is recorded as refused."""
    expected = len(config.arms) * (len(config.factors) * len(config.tuning_seeds) + len(config.seeds))
    for trial in _missing(config, runs):
        progress(", ".join(map(str, trial.key().values())), len(list(finished_runs(runs))), expected)
        try:
            record = judged(config, trial, world)
        except InputError as error:
            if error.where != "region":
                raise
            record = {**trial.key(), "refused": str(error), "commit": commit()}
        _check_base(runs, record)
        record_run(runs, record)


def _check_base(runs: Path, record: Mapping[str, object]) -> None:
    """Arms are paired by seed, so that all runs of a seed have one base, also where another machine trains it anew."""
    for run in finished_runs(runs):
        began, here = run.get(_BASE), record.get(_BASE)
        if run["seed"] == record["seed"] and None not in (began, here) and began != here:
            raise MismatchError(
                f"seed {run['seed']} began on base {began}, this one is {here}",
                where=runs,
                remedy="name the --work folder of before, or delete that seed's lines",
            )


def reported(runs: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """The runs of the reported worlds, but for those that were refused."""
    return [run for run in runs if run["stage"] == "test" and "refused" not in run]


def _missing(config: ParTrials, runs: Path) -> Iterator[Trial]:
    """The trials that are not recorded: those that tune, seed by seed, then those that are reported."""
    tune = [
        Trial(arm, "tune", seed, factor)
        for seed in config.tuning_seeds
        for arm in config.arms
        for factor in config.factors
    ]
    yield from (trial for trial in tune if not is_recorded(runs, trial.key()))
    found = list(finished_runs(runs))
    test = [Trial(arm, "test", seed, best_factor(config, found, arm)) for seed in config.seeds for arm in config.arms]
    yield from (trial for trial in test if not is_recorded(runs, trial.key()))


def best_factor(config: ParTrials, runs: Sequence[Mapping[str, object]], arm: ParArm) -> float:
    """The factor of the grid with the best mean merit over the tuning seeds, the first of equals."""
    return max(config.factors, key=lambda factor: tuned(runs, arm, factor))


def tuned(runs: Sequence[Mapping[str, object]], arm: ParArm, factor: float) -> float:
    """The mean over the tuning seeds, at this factor, of the measure that the arm's rate is chosen by."""
    key = {"arm": arm.name, "stage": "tune", "factor": factor}
    merits = [cast("float", run[arm.merit]) for run in runs if key.items() <= run.items() and "refused" not in run]
    return fmean(merits) if merits else -math.inf


def judged(config: ParTrials, trial: Trial, world: World) -> dict[str, object]:
    """The trial's record: what it is, accuracies, rewards, shares of parameters, seconds."""
    begun = time.monotonic()
    trained = _trained(config, trial, world)
    record = {**trial.key(), _BASE: trained.family.base.sha256[:_SHORT], **_measures(trained.made)}
    if world.also is not None:
        record |= world.also(trial, trained)
    return {**record, "seconds": round(time.monotonic() - begun, 1), "commit": commit()}


def _trained(config: ParTrials, trial: Trial, world: World) -> Trained:
    arm, systems = trial.arm, world.systems(trial)
    base = world.base(trial.seed)
    model, tokenizer = load_model(str(base), device="cpu", dtype=config.dtype), load_tokenizer(str(base))
    shapes = linear_shapes(model, config.kinds)
    plan = RankPlan.uniform(shapes, rank=arm.rank or config.rank, scaling=config.scaling)
    family = AdapterFamily.create(base=identify_folder(base, "base"), plan=plan, seed=trial.seed)
    partition = Partition(
        start=arm.start,
        moves_A=arm.moves_A,
        warm_up=replace(config.warm_up, seed=trial.seed),
        granularity=arm.granularity,
        theta=arm.theta,
        score=arm.score,
        samples=config.samples,
        seed=trial.seed,
        control=(lambda regions: shuffled_regions(regions, seed=trial.seed)) if arm.control else None,
    )
    stages = [
        Assigned(system, _of_trial(stage, trial), share)
        for (system, stage), share in zip((world.parts[part] for part in arm.parts), arm.shares, strict=False)
    ]
    with tempfile.TemporaryDirectory() as folder:
        plan_of_run = Plan(partition, stages)
        made = train_in_stages(Run(model, tokenizer, family, systems, plan_of_run, Path(folder)))
    return Trained(model, tokenizer, family, systems, made)


def _of_trial(stage: Stage, trial: Trial) -> Stage:
    return replace(stage, learning_rate=trial.factor * stage.learning_rate, seed=trial.seed)


def _measures(made: Staged) -> dict[str, object]:
    """Accuracy by system at the end and after the first stage, the ends of the rewards, and what was trained."""
    moments = list(made.accuracy.values())
    stages = [part for part in made.passed if part.name != WARM_UP]
    rewards = [record.values["reward"] for part in stages for record in part.records if "reward" in record.values]
    return {
        **moments[-1],
        **{f"{name}_first": value for name, value in moments[1].items()},
        "accuracy": fmean(moments[-1].values()),
        "reward_first": fmean(rewards[:_ENDS]) if rewards else None,
        "reward_last": fmean(rewards[-_ENDS:]) if rewards else None,
        "active": [round(part.parameters / made.factors.trainable, 4) for part in stages],
        "parameters": [part.parameters for part in stages],
    }


def paired(runs: Sequence[Mapping[str, object]], arm: str, other: str, measure: str) -> list[float]:
    """The arm's measure less the other's, seed by seed, where both have run."""
    found = {
        name: {cast("int", run["seed"]): cast("float", run[measure]) for run in runs if run["arm"] == name}
        for name in (arm, other)
    }
    return [found[arm][seed] - found[other][seed] for seed in sorted(found[arm].keys() & found[other].keys())]


def arm_row(arm: ParArm, runs: Sequence[Mapping[str, object]], measures: Sequence[str]) -> dict[str, object]:
    """The arm's means over the reported seeds."""
    own = [run for run in runs if run["arm"] == arm.name]
    row: dict[str, object] = {"arm": arm.name, "seeds": len(own)}
    if own:
        for measure in measures:
            row[measure] = fmean(cast("float", run[measure]) for run in own)
        stages = zip(*(cast("list[float]", run["active"]) for run in own), strict=True)
        row["active"] = [round(fmean(stage), 3) for stage in stages]
        row["factor"] = own[0]["factor"]
    return row
