"""`par-smollm2`: LoRA, OLoRA, PiSSA, PiSSA with rewards, and regions, at equal steps on a real model.

Two systems whose labels are exact because they are two tasks: one that recognises, one that calculates. Every arm
reads the same examples in the same number of steps; arms with rewards roll out where the others read solutions.

Reference: arXiv 2507.20999, table 2 (the arms).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import cast

from treadle.configs.bench.partition import ParSmollm2Run
from treadle.data.tasks import Task, load_task
from treadle.evaluation.intervals import mean_interval, sign_flip_p
from treadle.models.loading import model_folder
from treadle.progress import Progress, silent
from treadle.recipes.bench.par_trials import Trial, World, arm_row, paired, reported, run_trials
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name, finished_runs
from treadle.train.stages.run import System

NAME = "par-smollm2"
FIRST, SECOND = "first", "second"
_MEASURES = ("accuracy", FIRST, SECOND)


def par_smollm2(
    config: ParSmollm2Run, *, folder: Path, runs: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """Every trial of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: model, tasks, stages, arms, grid, seeds.
        folder: of the configuration, where task files are.
        runs: the JSON Lines file of finished trials.
        data: the folder of the data sets.
        progress: told of every trial.
    """
    run_trials(config, world_of(config, folder, data), runs, progress)
    return summary(config, list(finished_runs(runs)))


def quick_par_smollm2(
    config: ParSmollm2Run, *, folder: Path, work: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """One arm with regions, one rate, a few steps: shows that everything works and decides nothing."""
    small = config.model_copy(
        update={
            "arms": tuple(arm for arm in config.arms if arm.name in (config.ours, config.peer)),
            "factors": config.factors[:1],
            "tuning_seeds": config.tuning_seeds[:1],
            "seeds": (),
            "samples": 8,
            "train_limit": 32,
            "validation_limit": 16,
            "warm_up": replace(config.warm_up, steps=2),
            "sft": replace(config.sft, steps=2),
            "grpo": replace(config.grpo, steps=2),
        }
    )
    runs = work / "quick" / "runs.jsonl"
    return par_smollm2(small, folder=folder, runs=runs, data=data, progress=progress).undecided()


def world_of(config: ParSmollm2Run, folder: Path, data: Path | None) -> World:
    """The base with two tasks; which examples are trained on hangs on the seed, which are asked does not."""
    tasks = {name: _task(named, folder) for name, named in ((FIRST, config.first), (SECOND, config.second))}

    def systems(trial: Trial) -> Mapping[str, System]:
        return {name: _system(config, trial, task, data) for name, task in tasks.items()}

    parts = {
        "sft-first": (FIRST, config.sft),
        "sft-second": (SECOND, config.long_sft),
        "grpo-second": (SECOND, config.grpo),
    }
    base = model_folder(config.base)
    return World(lambda _seed: base, systems, parts)


def _task(named: str, folder: Path) -> Task:
    beside = folder / named
    return load_task(str(beside) if beside.is_file() else named)


def _system(config: ParSmollm2Run, trial: Trial, task: Task, data: Path | None) -> System:
    examples = task.examples("train", data_root=data, limit=config.train_limit, seed=trial.seed)
    if trial.stage == "tune":
        asked = task.examples("validation", data_root=data, limit=config.validation_limit)
    else:
        asked = task.examples("test", data_root=data, limit=config.test_limit)
    return System(examples, asked, task.metric)


def summary(config: ParSmollm2Run, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """A row an arm with its means and its difference from the peer, paired by seed, with a 95% interval."""
    tested = reported(runs)
    rows: list[dict[str, object]] = []
    for arm in config.arms:
        row = arm_row(arm, tested, _MEASURES)
        differences = paired(tested, arm.name, config.peer, "accuracy")
        if arm.name != config.peer and len(differences) > 1:
            interval = mean_interval(differences)
            row |= {"minus_peer": interval.estimate, "low": interval.low, "high": interval.high}
            row["p"] = sign_flip_p(differences)
        rows.append(row)
    ours = [run for run in tested if run["arm"] == config.ours]
    differences = paired(tested, config.ours, config.peer, "accuracy")
    metrics = {
        "reward_first": Metric(_mean(ours, "reward_first"), "1"),
        "reward_last": Metric(_mean(ours, "reward_last"), "1"),
        "accuracy_minus_pissa_rl": Metric(fmean(differences) if differences else math.nan, "1"),
    }
    return BenchmarkResult(NAME, device_name(), commit(), json.loads(config.model_dump_json()), metrics, rows)


def _mean(runs: Sequence[Mapping[str, object]], measure: str) -> float:
    return fmean(cast("float", run[measure]) for run in runs) if runs else math.nan
