"""`federated-quality`: what a frozen A is worth under differential privacy, beside averaging A and B apart.

tune: every arm on one grid of learning rate × clip, one seed, validation rows
test: every arm at its best, on fresh seeds and test rows

One run is the articles' loop without a network: in every round every client takes its private steps from the global
factors, and the variant joins what comes back. Noise is drawn from seeds: a run can be repeated and promises nothing.

Reference: arXiv 2403.12313 §5 (the question and the clients), 1909.06335 (label skew by Dirichlet shares).
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

from treadle.configs.bench.federated import FederatedCell, FederatedQualityRun, GridPoint
from treadle.data.tasks import Task, load_task
from treadle.evaluation.intervals import Interval, mean_interval
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import identity_of
from treadle.privacy.noise import SeededRandomness
from treadle.privacy.plan import Mechanism, PrivacySettings
from treadle.progress import Progress, silent
from treadle.recipes.bench.classification import Classification, classification, classifying_base, labels_of
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
from treadle.recipes.federated_trial import split
from treadle.train.accuracy import accuracy_of
from treadle.train.federated.aggregation import Update
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.local import OpenedSilo, stepped
from treadle.train.federated.variants import VariantSettings
from treadle.train.settings import PrivateSettings

NAME = "federated-quality"
CENTRAL = "central"
_BATCH = 16


@dataclass(frozen=True)
class Trial:
    """One training: a cell's arm at one ε, seed and point of the grid, judged on validation ("tune") or test rows."""

    cell: FederatedCell
    arm: str
    epsilon: float
    seed: int
    point: GridPoint
    stage: str

    def key(self) -> dict[str, object]:
        """What tells this trial from all others, as JSON has it."""
        return {
            "task": self.cell.task,
            "clients": self.cell.clients,
            "skew": self.cell.skew,
            "epsilon": "inf" if self.epsilon == math.inf else self.epsilon,
            "arm": self.arm,
            "stage": self.stage,
            "seed": self.seed,
            "learning_rate": self.point.learning_rate,
            "max_grad_norm": self.point.max_grad_norm,
        }


def federated_quality(
    config: FederatedQualityRun, *, runs: Path, work: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """Every trial of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: cells, arms, grid, seeds.
        runs: the JSON Lines file of finished trials.
        work: where base models with heads are stored.
        data: the folder of the data sets.
        progress: told of every trial.

    Raises:
        InputError: no data folder.
    """
    data = data_of(data)
    loaded: dict[str, Classification] = {}
    for trial in _trials(config, runs):
        task = trial.cell.task
        if task not in loaded:
            loaded[task] = load_data(config, load_task(task), root=data, work=work)
        told = ", ".join(str(value) for value in trial.key().values())
        progress(told, len(list(finished_runs(runs))), _expected(config))
        record_run(runs, judged(config, trial, loaded[task]))
    return summary(config, list(finished_runs(runs)))


def quick_federated_quality(
    config: FederatedQualityRun, *, work: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """One cell, one point of the grid, two rounds: shows that everything works and decides nothing."""
    data = data_of(data)
    small = config.model_copy(
        update={"cells": config.cells[:1], "grid": config.grid[:1], "rounds": 2, "train_limit": 240, "test_limit": 64}
    )
    cell = small.cells[0]
    loaded = load_data(small, load_task(cell.task), root=data, work=work)
    rows: list[dict[str, object]] = []
    for arm in cell.arms:
        progress(arm, len(rows), len(cell.arms))
        for stage in ("tune", "test"):
            trial = Trial(cell, arm, cell.epsilons[-1], small.seeds[0], small.grid[0], stage)
            rows.append(judged(small, trial, loaded))
    return summary(small, rows).undecided()


def _trials(config: FederatedQualityRun, runs: Path) -> Iterator[Trial]:
    """The trials that are not recorded, those that choose before those that are chosen."""
    for cell in config.cells:
        for epsilon in cell.epsilons:
            for arm in cell.arms:
                for point in config.grid:
                    yield from _missing(Trial(cell, arm, epsilon, config.tuning_seed, point, "tune"), runs)
        for seed in config.seeds:
            for epsilon in cell.epsilons:
                for arm in cell.arms:
                    point = best_point(config, list(finished_runs(runs)), cell, arm, epsilon)
                    yield from _missing(Trial(cell, arm, epsilon, seed, point, "test"), runs)


def _missing(trial: Trial, runs: Path) -> Iterator[Trial]:
    if not is_recorded(runs, trial.key()):
        yield trial


def _expected(config: FederatedQualityRun) -> int:
    each = len(config.grid) + len(config.seeds)
    return sum(len(cell.epsilons) * len(cell.arms) * each for cell in config.cells)


def best_point(
    config: FederatedQualityRun, runs: Sequence[Mapping[str, object]], cell: FederatedCell, arm: str, epsilon: float
) -> GridPoint:
    """The point of the grid with the best validation accuracy, the first of equals."""

    def accuracy(point: GridPoint) -> float:
        key = Trial(cell, arm, epsilon, config.tuning_seed, point, "tune").key()
        return next(cast("float", run["accuracy"]) for run in runs if key.items() <= run.items())

    return max(config.grid, key=accuracy)


def load_data(config: FederatedQualityRun, task: Task, *, root: Path, work: Path) -> Classification:
    """The task's rows for the configured base."""
    base = classifying_base(config.base, task, work=work, head_seed=config.head_seed)
    return classification(
        task,
        base,
        root=root,
        limits={"train": config.train_limit, "validation": config.test_limit, "test": config.test_limit},
        condition=config.condition,
        dtype=config.dtype,
        max_length=config.max_length,
    )


def judged(config: FederatedQualityRun, trial: Trial, data: Classification) -> dict[str, object]:
    """The trial's record: what it is, its accuracy, and its seconds."""
    begun = time.monotonic()
    family = AdapterFamily.create(
        base=identity_of(str(data.base)),
        plan=RankPlan.uniform(linear_shapes(data.model, config.modules), rank=config.rank),
        seed=trial.seed,
        init=config.init,
    )
    state = trained(config, trial, data, family)
    rows = data.rows["validation" if trial.stage == "tune" else "test"]
    clients = sorted(state.own) or [""]  # where every client keeps its own B, the mean over clients
    accuracy = fmean(accuracy_of(data.model, state.of_client(client), rows) for client in clients)
    return trial.key() | {"accuracy": accuracy, "seconds": round(time.monotonic() - begun, 1), "commit": commit()}


def trained(config: FederatedQualityRun, trial: Trial, data: Classification, family: AdapterFamily) -> GlobalState:
    """The global factors after the last round."""
    parts = split(
        [row.target[0] for row in data.rows["train"]],
        1 if trial.arm == CENTRAL else trial.cell.clients,
        config.skews[trial.cell.skew],
        seed=trial.seed,
    )
    batch = config.expected_batch * (trial.cell.clients if trial.arm == CENTRAL else 1)
    variant = VariantSettings(trial.arm).variant(tuple(family.plan.modules), rounds=config.rounds)
    silos = {
        str(client): (
            OpenedSilo(data.model, [data.rows["train"][place] for place in part]),
            _mechanism(config, trial, len(part), batch, client),
        )
        for client, part in enumerate(parts)
    }
    settings = PrivateSettings(
        learning_rate=trial.point.learning_rate,
        optimizer=config.optimizer,
        micro_batch=_BATCH,
        max_length=config.max_length,
    )
    state = GlobalState.start(family)
    for server_round in range(1, config.rounds + 1):
        names = variant.work(server_round).reply(Factors(state.lora_A, state.lora_B)).keys()
        updates = [
            Update(name, stepped(silo, state.of_client(name), names, mechanism, settings, steps=config.local_steps))
            for name, (silo, mechanism) in silos.items()
        ]
        state = variant.aggregate(state, updates, server_round=server_round).state
    return state


def _mechanism(config: FederatedQualityRun, trial: Trial, records: int, batch: int, client: int) -> Mechanism:
    """A client's whole budget over all rounds, calibrated for the records that it has."""
    settings = PrivacySettings(
        epsilon=trial.epsilon,
        delta=config.delta,
        records=records,
        expected_batch=min(batch, records),
        rounds=config.rounds,
        local_steps=config.local_steps,
        max_grad_norm=trial.point.max_grad_norm,
    )
    name = f"{trial.seed}/{trial.arm}/{client}"
    draws = SeededRandomness(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little"))
    return settings.plan().mechanism(records, draws)


def summary(config: FederatedQualityRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """A row an arm, cell and ε with its 95% interval over seeds, and one for FFA less each other arm, seeds in pairs.

    The metrics are of the first cell.
    """
    found: dict[tuple[object, ...], dict[int, float]] = {}
    for run in runs:
        if run["stage"] == "test":
            key = (run["task"], run["clients"], run["skew"], str(run["epsilon"]), run["arm"])
            found.setdefault(key, {})[cast("int", run["seed"])] = cast("float", run["accuracy"])
    rows = found | {
        (*place, f"ffa - {arm}"): less for *place, arm in found if arm != "ffa" and (less := _paired(found, place, arm))
    }
    table: list[dict[str, object]] = []
    for key, seeds in rows.items():
        row = dict(zip(("task", "clients", "skew", "epsilon", "arm"), key, strict=True))
        interval = mean_interval(list(seeds.values()))
        table.append(
            row | {"seeds": len(seeds), "accuracy": interval.estimate, "low": interval.low, "high": interval.high}
        )
    skew = config.cells[0].skew
    metrics = {
        f"ffa_minus_fedit_{skew}_eps{epsilon}": _difference(config, found, "fedit", f"{epsilon}.0", gain=epsilon == 1)
        for epsilon in (8, 3, 1)
    }
    metrics["ffa_minus_central_epsinf"] = _difference(config, found, CENTRAL, "inf", least=-0.02)
    return BenchmarkResult(NAME, device_name(), commit(), json.loads(config.model_dump_json()), metrics, table)


def _paired(
    found: Mapping[tuple[object, ...], Mapping[int, float]], place: Sequence[object], other: object
) -> dict[int, float]:
    """Seed → FFA's accuracy less the other arm's, where both have run."""
    ours, theirs = (found.get((*place, arm), {}) for arm in ("ffa", other))
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def _difference(
    config: FederatedQualityRun,
    found: Mapping[tuple[object, ...], Mapping[int, float]],
    other: str,
    epsilon: str,
    *,
    gain: bool = False,
    least: float | None = None,
) -> Metric:
    """FFA minus another arm, paired by seed: its goal is a mean of at least `least`, else about its 95% interval.

    Whether it holds is not said where neither arm can be told from guessing: that nothing equals nothing is no success.
    """
    cell = config.cells[0]
    place = (cell.task, cell.clients, cell.skew, epsilon)
    less = _paired(found, place, other)
    goal = f">= {least:g}" if least is not None else "lower95 > 0" if gain else "upper95 >= 0"
    if not less:
        return Metric(float("nan"), "1", goal)
    interval = mean_interval(list(less.values()))
    chance = 1 / len(labels_of(load_task(cell.task)))
    learns = any(mean_interval(list(found[*place, arm].values())).low > chance for arm in ("ffa", other))
    if set(less) < set(config.seeds) or not learns:
        return Metric(interval.estimate, "1", goal)
    return Metric(interval.estimate, "1", goal, _holds(interval, gain=gain, least=least))


def _holds(interval: Interval, *, gain: bool, least: float | None) -> bool:
    if least is not None:
        return interval.estimate >= least
    return interval.low > 0 if gain else interval.high >= 0
