"""`rank-worth`: what a probe's ranks are worth, beside equal ranks and the same ranks on other modules.

tune:        every arm of every cell on one grid of learning rates, one seed, validation rows
validation:  every arm at its best rate, on several seeds; the arm and the budget that do best are chosen
test:        that arm at that budget, uniform and shuffled, on fresh seeds and test rows

All arms have the same budget of parameters of A and B and train B alone, as families do; `floor`, the paper's rule,
loses part of it, and what an arm has is recorded with each trial. Where the arms differ they differ in
nothing but the plan: A's rows, the order of the examples and the head are the same for a seed.

Reference: arXiv 2408.09015 (the question); it trains A and B, and holds its ranks against neither shuffled ranks nor
equal parameters.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, cast

from treadle.configs.bench.ranks import RankArm, RankCell, RankWorthRun
from treadle.data.tasks import load_task
from treadle.evaluation.intervals import mean_interval, sign_flip_p
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import identity_of, is_causal, load_model
from treadle.progress import Progress, silent
from treadle.ranks.allocation import AllocationSettings, allocate, mean_rank_budget
from treadle.ranks.controls import shared_scores
from treadle.ranks.eva import EvaSettings
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.probes import probe_scores
from treadle.ranks.scores import ProbeScores
from treadle.recipes.bench.classification import Classification, classification, classifying_base
from treadle.recipes.bench.result import (
    BenchmarkResult,
    Metric,
    commit,
    data_of,
    device_name,
    finished_runs,
    is_recorded,
    record_run,
)
from treadle.recipes.rank_peers import settings_of
from treadle.train.accuracy import accuracy_of
from treadle.train.rows import classes_of
from treadle.train.sft import train_sft

NAME = "rank-worth"
UNIFORM, SHUFFLED = "uniform", "shuffled"
PUBLIC = "public"
Stage = Literal["tune", "validation", "test"]
_NEEDS_LABELS = ("gradient",)


@dataclass(frozen=True)
class Trial:
    """One training: an arm in a cell, a seed and a rate, judged on the rows that its stage may see."""

    cell: RankCell
    arm: RankArm
    stage: Stage
    seed: int
    rate: float

    def key(self) -> dict[str, object]:
        """What tells this trial from all others, as JSON has it."""
        return {
            "task": self.cell.task,
            "mean_rank": self.cell.mean_rank,
            "arm": self.arm.name,
            "stage": self.stage,
            "seed": self.seed,
            "learning_rate": self.rate,
        }


@dataclass(frozen=True)
class Bench:
    """Where a study's trials find what they need: tasks and probes are read once, and scores are kept in `work`."""

    config: RankWorthRun
    data: Path
    work: Path
    progress: Progress

    def task(self, name: str) -> Classification:
        """The task's rows, and its base."""
        config, task = self.config, load_task(name)
        return classification(
            task,
            classifying_base(config.base, task, work=self.work, head_seed=config.head_seed),
            root=self.data,
            limits={
                "train": config.train_limit,
                "validation": config.validation_limit,
                "test": config.test_limit,
            },
            condition=config.condition,
            dtype=config.dtype,
            max_length=config.max_length,
        )

    def scores(self, task: str, probe: str, read: Classification, *, mean_rank: int, text: str = PUBLIC) -> ProbeScores:
        """The probe's scores of all layers of the task's base; EVA, which shares out ranks itself, is told how many."""
        settings = settings_of(probe, mean_rank=mean_rank)
        of_budget = f"-{mean_rank}" if isinstance(settings, EvaSettings) else ""
        of_text = "" if text == PUBLIC else f"-on-{text}"
        path = self.work / f"scores-{task}-{probe}{of_budget}{of_text}.json"
        if not path.exists():
            model = load_model(str(read.base), device="cpu")  # float32: a probe's differences are small
            inputs = self._labelled(read) if probe in _NEEDS_LABELS else self._texts(read, text)
            shapes = linear_shapes(model)
            probe_scores(model, inputs, shapes, settings=settings, progress=self.progress).save(path)
        return ProbeScores.load(path)

    def _texts(self, read: Classification, text: str) -> ProbeInputs:
        config = self.config
        if text == PUBLIC:
            return ProbeInputs.of_public_text(read.tokenizer, sequences=config.sequences, tokens=config.tokens)
        found = load_task(text).examples(
            "train", data_root=self.data, condition=config.condition, limit=config.sequences
        )
        return ProbeInputs.of_texts(read.tokenizer, [example.prompt for example in found], tokens=config.tokens)

    def _labelled(self, read: Classification) -> ProbeInputs:
        classes = None if is_causal(read.base) else classes_of(read.model)
        examples = read.examples["train"][: self.config.sequences]
        return ProbeInputs.of_examples(read.tokenizer, examples, classes=classes, tokens=self.config.tokens)


def rank_worth(
    config: RankWorthRun, *, runs: Path, work: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """Every trial of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: arms, cells, grid, seeds.
        runs: the JSON Lines file of finished trials.
        work: where bases with heads and the probes' scores are kept.
        data: the folder of the data sets.
        progress: told of every trial.

    Raises:
        InputError: no data folder.
    """
    data = data_of(data)
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(config, data, work, progress)
    task, read = "", None
    for trial in _trials(config, runs):
        if read is None or task != trial.cell.task:
            task, read = trial.cell.task, bench.task(trial.cell.task)
        progress(", ".join(map(str, trial.key().values())), len(list(finished_runs(runs))), _expected(config))
        record_run(runs, judged(bench, trial, read))
    return summary(config, list(finished_runs(runs)))


def quick_rank_worth(
    config: RankWorthRun, *, work: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """One cell, one rate, few rows: shows that everything works and decides nothing."""
    small = config.model_copy(
        update={
            "cells": config.cells[:1],
            "learning_rates": config.learning_rates[:1],
            "train_limit": 96,
            "validation_limit": 64,
            "test_limit": 64,
            "sequences": 4,
            "tokens": 16,
        }
    )
    result = rank_worth(small, runs=work / "quick" / "runs.jsonl", work=work / "quick", data=data, progress=progress)
    return result.undecided()


def _trials(config: RankWorthRun, runs: Path) -> Iterator[Trial]:
    """The trials that are not recorded: those that tune, those that choose, those that are reported."""
    for cell in config.cells:
        for arm in config.arms:
            for rate in config.learning_rates:
                yield from _missing(Trial(cell, arm, "tune", config.tuning_seed, rate), runs)
        for seed in config.seeds:
            for arm in config.arms:
                rate = best_rate(config, list(finished_runs(runs)), cell, arm)
                yield from _missing(Trial(cell, arm, "validation", seed, rate), runs)
    found = list(finished_runs(runs))
    for cell, arm in reported(config, found):
        for seed in config.test_seeds:
            yield from _missing(Trial(cell, arm, "test", seed, best_rate(config, found, cell, arm)), runs)


def _missing(trial: Trial, runs: Path) -> Iterator[Trial]:
    if not is_recorded(runs, trial.key()):
        yield trial


def _expected(config: RankWorthRun) -> int:
    each = len(config.arms) * (len(config.learning_rates) + len(config.seeds))
    tasks = len({cell.task for cell in config.cells})
    return len(config.cells) * each + 3 * tasks * len(config.test_seeds)


def best_rate(config: RankWorthRun, runs: Sequence[Mapping[str, object]], cell: RankCell, arm: RankArm) -> float:
    """The rate of the grid with the best validation accuracy on the tuning seed, the first of equals."""

    def accuracy(rate: float) -> float:
        key = Trial(cell, arm, "tune", config.tuning_seed, rate).key()
        return next(cast("float", run["accuracy"]) for run in runs if key.items() <= run.items())

    return max(config.learning_rates, key=accuracy)


def reported(config: RankWorthRun, runs: Sequence[Mapping[str, object]]) -> list[tuple[RankCell, RankArm]]:
    """The cells and arms of the test: the budget and the arm that validation prefers, uniform and shuffled.

    An arm's merit at a budget is its mean gain over the better of uniform and shuffled, averaged over tasks.
    """
    found = _by_seed(runs, "validation")
    controls_of = {UNIFORM, SHUFFLED}

    def merit(mean_rank: int, arm: RankArm) -> float:
        gains = [
            min(
                fmean(_paired(found, (cell.task, mean_rank), arm.name, other).values()) for other in sorted(controls_of)
            )
            for cell in config.cells
            if cell.mean_rank == mean_rank
        ]
        return fmean(gains)

    budgets = list(dict.fromkeys(cell.mean_rank for cell in config.cells))
    candidates = [(budget, arm) for budget in budgets for arm in config.arms if arm.control is None]
    budget, chosen = max(candidates, key=lambda candidate: merit(*candidate))
    arms = [arm for arm in config.arms if arm.name in (chosen.name, UNIFORM, SHUFFLED)]
    return [(cell, arm) for cell in config.cells if cell.mean_rank == budget for arm in arms]


def plan_of(arm: RankArm, scores: ProbeScores, *, mean_rank: int, seed: int) -> RankPlan:
    """The arm's plan at the parameters of the uniform plan of this rank; a shuffle is drawn from the seed."""
    shapes = scores.shapes()
    own = shared_scores(scores, arm.control, seed=seed)
    return allocate(own, shapes, budget=mean_rank_budget(shapes, mean_rank), settings=AllocationSettings(arm.rule))


def judged(bench: Bench, trial: Trial, read: Classification) -> dict[str, object]:
    """The trial's record: what it is, its accuracy, parameters and seconds."""
    begun, config = time.monotonic(), bench.config
    scores = bench.scores(trial.cell.task, trial.arm.probe, read, mean_rank=trial.cell.mean_rank, text=trial.arm.text)
    plan = plan_of(trial.arm, scores, mean_rank=trial.cell.mean_rank, seed=trial.seed)
    family = AdapterFamily.create(base=identity_of(str(read.base)), plan=plan, seed=trial.seed)
    settings = replace(config.sft, learning_rate=trial.rate, seed=trial.seed, max_length=config.max_length)
    found = train_sft(read.model, read.tokenizer, family, read.examples["train"], settings)
    folded = {name: B * family.scaling(name) for name, B in found.lora_B.items()}
    rows = read.rows["test" if trial.stage == "test" else "validation"]
    return trial.key() | {
        "accuracy": accuracy_of(read.model, Factors(family.lora_A, folded), rows),
        "parameters": plan.count().total,
        "dropped": len(scores.modules) - len(plan.modules),
        "seconds": round(time.monotonic() - begun, 1),
        "commit": commit(),
    }


BySeed = Mapping[tuple[object, object, object], Mapping[int, float]]
"""(task, mean rank, arm) → seed → accuracy."""


def _by_seed(runs: Sequence[Mapping[str, object]], stage: Stage) -> BySeed:
    found: dict[tuple[object, object, object], dict[int, float]] = {}
    for run in runs:
        if run["stage"] == stage:
            key = (run["task"], run["mean_rank"], run["arm"])
            found.setdefault(key, {})[cast("int", run["seed"])] = cast("float", run["accuracy"])
    return found


def _paired(found: BySeed, cell: tuple[object, object], arm: str, other: str) -> dict[int, float]:
    """Seed → the arm's accuracy less the other's, where both have run."""
    ours, theirs = (found.get((*cell, name), {}) for name in (arm, other))
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def summary(config: RankWorthRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """A row an arm, cell and stage: accuracy, differences from uniform and shuffled with 95% intervals, sign-flip p."""
    table: list[dict[str, object]] = []
    for stage in ("validation", "test"):
        found = _by_seed(runs, stage)
        for (task, mean_rank, arm), accuracies in found.items():
            row: dict[str, object] = {"stage": stage, "task": task, "mean_rank": mean_rank, "arm": arm}
            row |= {"seeds": len(accuracies), "accuracy": fmean(accuracies.values())}
            for other in (UNIFORM, SHUFFLED):
                differences = list(_paired(found, (task, mean_rank), str(arm), other).values())
                if arm != other and differences:
                    interval = mean_interval(differences)
                    row |= {
                        f"minus_{other}": interval.estimate,
                        f"minus_{other}_low": interval.low,
                        f"minus_{other}_high": interval.high,
                        f"minus_{other}_p": sign_flip_p(differences),
                    }
            table.append(row)
    settings = json.loads(config.model_dump_json())
    metrics = {"tasks_beating_uniform_and_shuffled": _judged(config, _by_seed(runs, "test"))}
    return BenchmarkResult(NAME, device_name(), commit(), settings, metrics, table)


def _judged(config: RankWorthRun, found: BySeed) -> Metric:
    """The tasks where the chosen arm's intervals over both lie above zero; undecided until all test seeds have run.

    The goal is two tasks: a study of one has none.
    """
    chosen = {(task, rank, arm) for task, rank, arm in found if arm not in (UNIFORM, SHUFFLED)}
    wins, complete = 0, bool(chosen)
    for task, rank, arm in chosen:
        sides = [_paired(found, (task, rank), str(arm), other) for other in (UNIFORM, SHUFFLED)]
        complete &= all(len(side) == len(config.test_seeds) for side in sides)
        wins += all(len(side) > 1 and mean_interval(list(side.values())).low > 0 for side in sides)
    tasks = {cell.task for cell in config.cells}
    complete &= {task for task, _, _ in chosen} == tasks
    goal = 2.0 if len(tasks) > 1 else None
    metric = Metric.against(float(wins) if chosen else math.nan, "tasks", at_least=goal)
    return metric if complete else metric.undecided()
