"""`routing-quality`: what ways of routing are worth, in the trained form, on paraphrases and on bare text.

for each group of arms and seed: grow the fleet (once), answer every prompt, append one run with every verdict

Everything else is computed from the recorded verdicts: a share is (accuracy − base) / (reference − base), accuracies
being means over tasks; intervals are of a paired bootstrap that draws seeds, and prompts within each task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import cast

import numpy as np

from treadle.configs.bench.routing_quality import ArmGroup, RoutingQualityRun
from treadle.configs.evaluate import EvaluateRun
from treadle.configs.fleet import FleetRun
from treadle.data.public_text import overlap
from treadle.data.tasks import Task
from treadle.progress import Progress, part, silent
from treadle.recipes.bench.result import (
    BenchmarkResult,
    Metric,
    commit,
    data_of,
    device_name,
    finished_runs,
    record_run,
)
from treadle.recipes.evaluate import Answers, answers_of_bank, asked_examples
from treadle.recipes.fleet import Fleet, grow_fleet, training_examples
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import kept_passages
from treadle.routing.calibration import OwnCalibration

NAME = "routing-quality"
DEFAULT_ARM = "sequence"
Cells = Mapping[tuple[int, str, str, str], "np.ndarray[tuple[int], np.dtype[np.float64]]"]
"""(seed, task, condition, arm) → right or wrong, prompt by prompt."""


def routing_quality(
    config: RoutingQualityRun, *, runs: Path, work: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """Every (group, seed) of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: seeds, tasks, arms.
        runs: the JSON Lines file of finished runs.
        work: where fleets grow; a killed run is resumed from there.
        data: the folder of the data sets.
        progress: told of everything.

    Raises:
        InputError: no data folder.
    """
    data = data_of(data)
    done = {(run["group"], run["seed"]) for run in finished_runs(runs)}
    for group in config.groups:
        for seed in config.seeds:
            if (group.name, seed) not in done:
                record_run(runs, _run(config, group, seed, work=work, data=data, progress=progress))
    return summary(config, list(finished_runs(runs)))


def quick_routing_quality(config: RoutingQualityRun, *, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """Two generated tasks, barely trained, a dozen prompts each: shows that everything works and decides nothing."""
    small = barely_trained(config).model_copy(update={"limit": 12, "least_gain": -1.0, "resamples": 200})
    group = ArmGroup(name="quick", arms=("base", "oracle", "sequence", "linear"))
    result = summary(small, [_run(small, group, config.seeds[0], work=work, data=None, progress=progress)])
    return result.undecided()


def barely_trained(config: RoutingQualityRun) -> RoutingQualityRun:
    """The study with fleets of two generated tasks that grow in seconds."""
    tasks = ("syllogism", "family_relationships")
    sft = replace(config.fleet.sft, max_tokens=2_000)
    fleet = config.fleet.model_copy(update={"sft": sft, "calibration_texts": 48})
    return config.model_copy(update={"tasks": tasks, "asked": tasks, "fleet": fleet})


def _run(
    config: RoutingQualityRun, group: ArmGroup, seed: int, *, work: Path, data: Path | None, progress: Progress
) -> dict[str, object]:
    told = part(progress, f"{group.name}, seed {seed}")
    grown = config.fleet_run(seed, work=work, data=data)
    return group_run(config, group, grow_fleet(grown, told), grown, router=work / f"router-{seed}", progress=told)


def group_run(
    config: RoutingQualityRun, group: ArmGroup, fleet: Fleet, grown: FleetRun, *, router: Path, progress: Progress
) -> dict[str, object]:
    """Every verdict of a group's arms on one fleet, as it is recorded.

    Args:
        config: what is asked.
        group: the arms.
        fleet: that answers.
        grown: how it was grown.
        router: where the supervised router is kept.
        progress: told of every cell.
    """
    seed, data = grown.seed, grown.data
    asked = config.questions(group, seed, data=data, router=router)
    tasks = [task for task in fleet.tasks if task.name in config.asked]
    bank = fleet.bank
    if group.calibration == "own":
        texts = {
            task.name: [f"{row.prompt}{row.completion}" for row in training_examples(grown, task)]
            for task in fleet.tasks
        }
        bank = bank.calibrate(OwnCalibration(texts), model=fleet.model, tokenizer=fleet.tokenizer, progress=progress)
    prompts = [
        example.prompt for task in tasks for form in asked.conditions for example in asked_examples(task, form, asked)
    ]
    shared = overlap(kept_passages(grown.out / "bank", fleet.bank), prompts)
    if group.absent:
        parts = [_answers(fleet, bank.remove(task.name), [task], asked, progress) for task in tasks]
        answers = Answers(
            {key: arms for part in parts for key, arms in part.verdicts.items()},
            {key: arms for part in parts for key, arms in part.chosen.items()},
        )
    else:
        answers = _answers(fleet, bank, tasks, asked, progress)
    return {
        "group": group.name,
        "seed": seed,
        "commit": commit(),
        "public_overlap": shared,
        "adapters": list(bank.names),
        "cells": _cells(answers, group),
    }


def _answers(fleet: Fleet, bank: AdapterBank, tasks: Sequence[Task], asked: EvaluateRun, progress: Progress) -> Answers:
    questions = asked.model_copy(update={"tasks": tuple(task.name for task in tasks)})
    return answers_of_bank(bank, fleet.model, fleet.tokenizer, tasks, questions, progress)


def _cells(answers: Answers, group: ArmGroup) -> list[dict[str, object]]:
    """A row a task, condition and arm; one character a prompt, so that the file stays readable."""
    rows: list[dict[str, object]] = []
    for (task, condition), arms in answers.verdicts.items():
        for arm, verdicts in arms.items():
            row = {"task": task, "condition": condition, "arm": f"{arm}, absent" if group.absent else arm}
            places = answers.chosen[task, condition].get(arm)
            chosen = {} if places is None else {"chosen": [int(place) for place in places]}
            rows.append({**row, "right": "".join("1" if right else "0" for right in verdicts), **chosen})
    return rows


def summary(config: RoutingQualityRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """The figures of finished runs; a goal is only judged where every seed of its arms is there."""
    cells: dict[tuple[int, str, str, str], np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
    chosen: list[dict[str, object]] = []
    for run in runs:
        seed = cast("int", run["seed"])
        for row in cast("list[dict[str, object]]", run["cells"]):
            key = (seed, str(row["task"]), str(row["condition"]), str(row["arm"]))
            cells[key] = np.array([float(mark) for mark in str(row["right"])])
            if "chosen" in row:
                names = cast("list[str]", run["adapters"])
                places = cast("list[int]", row["chosen"])
                right = [place >= 0 and names[place] == key[1] for place in places]
                base = [place < 0 for place in places]
                chosen.append(_row(key) | {"right_adapter": fmean(right), "left_to_base": fmean(base)})
    rows: list[dict[str, object]] = [_row(key) | {"accuracy": float(found.mean())} for key, found in cells.items()]
    tasks = _counted(config, cells)
    shares = _Shares(config, cells, tasks)
    metrics = {
        "oracle_share_trained_form": shares.metric("trained", "oracle", 0.99),
        "oracle_share_paraphrase": shares.metric("paraphrase", "oracle", 0.95),
        "linear_share_bare_text": shares.metric("bare", "linear", 0.90),
    }
    settings = config.model_dump(mode="json") | {"counted": list(tasks)}
    table = [*shares.table(), *rows, *chosen]
    return BenchmarkResult(NAME, device_name(), commit(), settings, metrics, table)


def _row(key: tuple[int, str, str, str]) -> dict[str, object]:
    return {"seed": key[0], "task": key[1], "condition": key[2], "arm": key[3]}


def _counted(config: RoutingQualityRun, cells: Cells) -> tuple[str, ...]:
    """The tasks whose own adapter beats the base by enough in the trained form, on average over the seeds there are."""
    kept: list[str] = []
    for task in config.asked:
        gains = [
            cells[seed, task, "trained", "oracle"].mean() - cells[seed, task, "trained", "base"].mean()
            for seed in config.seeds
            if (seed, task, "trained", "oracle") in cells and (seed, task, "trained", "base") in cells
        ]
        if gains and fmean(gains) >= config.least_gain:
            kept.append(task)
    return tuple(kept)


class _Shares:
    """Shares of a reference and differences between arms, with intervals of one paired bootstrap.

    Every resample draws seeds with replacement, and prompts with replacement within each task and condition, the same
    for all arms.
    """

    def __init__(self, config: RoutingQualityRun, cells: Cells, tasks: Sequence[str]) -> None:
        self._config, self._cells, self._tasks = config, cells, tasks
        self._resampled: dict[tuple[str, str], np.ndarray[tuple[int, int], np.dtype[np.float64]]] = {}
        self.arms = tuple(dict.fromkeys(arm for *_, arm in cells))

    def seeds(self, arm: str, condition: str) -> list[int]:
        """The seeds for which the arm has answered every task that counts."""
        return [
            seed
            for seed in self._config.seeds
            if self._tasks and all((seed, task, condition, arm) in self._cells for task in self._tasks)
        ]

    def _means(self, arm: str, condition: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """(1 + resamples, seeds): the mean over tasks as measured, then of every resample."""
        if (arm, condition) not in self._resampled:
            draw = np.random.default_rng(0)  # the same prompts for every arm
            columns = []
            for seed in self.seeds(arm, condition):
                parts = []
                for task in self._tasks:
                    right = self._cells[seed, task, condition, arm]
                    places = draw.integers(0, len(right), size=(self._config.resamples, len(right)))
                    parts.append(np.concatenate([[right.mean()], right[places].mean(1)]))
                columns.append(np.mean(parts, axis=0))
            self._resampled[arm, condition] = np.stack(columns, 1)
        return self._resampled[arm, condition]

    def _over_seeds(
        self, values: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Every resample's mean over seeds, drawn with replacement, the same for all values of as many seeds."""
        seeds = np.random.default_rng(1).integers(0, values.shape[1], size=(values.shape[0] - 1, values.shape[1]))
        return np.take_along_axis(values[1:], seeds, 1).mean(1)

    def _drawn(self, values: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> tuple[float, float, float]:
        """The mean over seeds, and the ends of its 95% interval over resamples that draw seeds too."""
        low, high = np.quantile(self._over_seeds(values), [0.025, 0.975])
        return float(values[0].mean()), float(low), float(high)

    def share(self, arm: str, condition: str, reference: str) -> tuple[float, float, float] | None:
        """(mean accuracy − base) / (reference − base), means over tasks and seeds.

        None where seeds are missing, or the reference gains nothing. Resamples in which it gains nothing are left out.
        """
        if any(len(self.seeds(each, condition)) < len(self._config.seeds) for each in (arm, reference, "base")):
            return None
        ours, theirs, base = (self._means(each, condition) for each in (arm, reference, "base"))
        parts = [self._over_seeds(each - base) for each in (ours, theirs)]
        gain = float((theirs - base)[0].mean())
        if gain <= 0.0:  # the reference gains nothing, so there is nothing to have a share of
            return None
        drawn = parts[0][parts[1] > 0.0] / parts[1][parts[1] > 0.0]
        low, high = np.quantile(drawn, [0.025, 0.975])
        return float((ours - base)[0].mean()) / gain, float(low), float(high)

    def metric(self, condition: str, reference: str, goal: float) -> Metric:
        """The default's share as a metric; undecided while seeds are missing."""
        found = self.share(DEFAULT_ARM, condition, reference)
        if found is None:
            return Metric.against(float("nan"), "1", at_least=goal).undecided()
        return Metric.against(found[0], "1", at_least=goal)

    def table(self) -> list[dict[str, object]]:
        """A row an arm and condition: mean accuracy, and the default's lead over it, each with its 95% interval."""
        rows: list[dict[str, object]] = []
        for condition in self._config.conditions:
            for arm in self.arms:
                mine = self.seeds(arm, condition)
                if not mine:
                    continue
                accuracy, low, high = self._drawn(self._means(arm, condition))
                row: dict[str, object] = {
                    "task": "(mean)", "condition": condition, "arm": arm, "seeds": len(mine),
                    "accuracy": accuracy, "low": low, "high": high,
                }  # fmt: skip
                if mine == self.seeds(DEFAULT_ARM, condition):
                    lead = self._drawn(self._means(DEFAULT_ARM, condition) - self._means(arm, condition))
                    row |= dict(zip(("lead", "lead_low", "lead_high"), lead, strict=True))
                for reference in ("oracle", "linear"):
                    share = self.share(arm, condition, reference)
                    if share is not None:
                        ends = (f"share_of_{reference}", f"share_of_{reference}_low", f"share_of_{reference}_high")
                        row |= dict(zip(ends, share, strict=True))
                rows.append(row)
        return rows
