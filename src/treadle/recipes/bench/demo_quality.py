"""`demo-quality`: what routing is worth against the base and the oracle, on tasks trained on the spot.

for each suite and seed: grow a fleet, evaluate every arm in each condition, append one run
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import cast

from treadle.configs.bench.routing_quality import DemoQualityRun, Suite
from treadle.configs.evaluate import EvaluateRun
from treadle.configs.fleet import FleetRun
from treadle.errors import InputError
from treadle.progress import Progress, part, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name, finished_runs, record_run
from treadle.recipes.evaluate import MEAN_OF_TASKS, Evaluation, evaluate_bank
from treadle.recipes.fleet import grow_fleet

NAME = "demo-quality"


def demo_quality(
    config: DemoQualityRun,
    *,
    runs: Path,
    work: Path,
    data: Path | None = None,
    progress: Progress = silent,
) -> BenchmarkResult:
    """Every (suite, seed) of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: suites, seeds, sizes.
        runs: the JSON Lines file of finished runs.
        work: where fleets grow; a killed run is resumed from there.
        data: the folder of the data sets, for suites that need files.
        progress: told of everything.
    """
    done = {(run["suite"], run["seed"]) for run in finished_runs(runs)}
    for seed in config.seeds:
        for suite in config.suites:
            if (suite.name, seed) not in done:
                record_run(runs, _run(config, suite, seed, work=work, data=data, progress=progress))
    return summary(config, list(finished_runs(runs)))


def quick_demo_quality(config: DemoQualityRun, *, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """One small cell, two tasks of the first suite, to see that everything works; it decides nothing."""
    suite = config.suites[0]
    small = suite.model_copy(update={"tasks": suite.tasks[:2], "max_tokens": 3_000})
    fleet = config.fleet.model_copy(update={"probe_texts": 1, "probe_words": 8})
    sized = config.model_copy(update={"limit": 40, "fleet": fleet})
    result = summary(sized, [_run(sized, small, config.seeds[0], work=work, data=None, progress=progress)])
    return result.undecided()


def _run(
    config: DemoQualityRun, suite: Suite, seed: int, *, work: Path, data: Path | None, progress: Progress
) -> dict[str, object]:
    if suite.files and data is None:
        raise InputError(f"suite {suite.name!r} needs data files", remedy="pass --data DIR")

    told = part(progress, f"{suite.name}, seed {seed}")
    fleet = grow_fleet(_fleet(config, suite, seed, work=work, data=data), told)
    tables = [
        evaluate_bank(fleet.bank, fleet.model, fleet.tokenizer, fleet.tasks, asked, told)
        for asked in _questions(config, suite, seed, data=data)
    ]
    found = Evaluation(
        tuple(row for table in tables for row in table.rows),
        tuple(row for table in tables for row in table.routing),
        tables[0].settings,
    )
    ranks = sorted(module.rank for module in fleet.plan.modules.values())
    plan = {
        "parameters": fleet.plan.count().total,
        "least": ranks[0],
        "median": ranks[len(ranks) // 2],
        "most": ranks[-1],
    }
    return {"suite": suite.name, "seed": seed, "commit": commit(), "plan": plan, **found.to_json()}


def _questions(config: DemoQualityRun, suite: Suite, seed: int, *, data: Path | None) -> list[EvaluateRun]:
    """In the trained form every router answers; on bare text the base, both routings of ours and the oracle."""
    trained = EvaluateRun(
        bank=Path(),
        tasks=suite.tasks,
        data=data,
        limit=config.limit,
        seed=seed,
        conditions=("trained",),
        arms=("base", "mean", "arrow", "token", "sequence", "oracle"),
    )
    bare: dict[str, object] = {
        "conditions": ("bare",),
        "arms": ("base", "token", "sequence", "oracle"),
        "few_shot": False,
    }
    return [trained, trained.model_copy(update=bare)]


def _fleet(config: DemoQualityRun, suite: Suite, seed: int, *, work: Path, data: Path | None) -> FleetRun:
    sft = replace(config.fleet.sft, max_tokens=suite.max_tokens, epochs=suite.epochs)
    changes = {"examples": suite.examples, "bare_share": suite.bare_share, "seed": seed, "sft": sft}
    return config.fleet.model_copy(update=changes).run(suite.tasks, out=work / f"{suite.name}-{seed}", data=data)


def summary(config: DemoQualityRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """The figures of finished runs; a goal is only judged where every seed of its suite is there."""
    generated = [run for run in runs if run["suite"] == config.suites[0].name]
    filed = [run for run in runs if run["suite"] in {suite.name for suite in config.suites if suite.files}]
    rows = [_row(run, row) for run in runs for row in cast("list[dict[str, object]]", run["rows"])]
    routing = [_row(run, row) for run in runs for row in cast("list[dict[str, object]]", run["routing"])]
    metrics: dict[str, Metric] = {}
    if generated:
        complete = len(generated) == len(config.seeds)
        gaps = [_value(run, "oracle") - _value(run, "sequence") for run in generated]
        gains = [_value(run, "sequence") - _value(run, "base") for run in generated]
        metrics["oracle_minus_routed"] = _judged(Metric.against(fmean(gaps), "accuracy", at_most=0.03), complete)
        metrics["routed_minus_base"] = _judged(Metric.against(fmean(gains), "accuracy", at_least=0.15), complete)
        if complete:
            metrics["oracle_minus_routed_sd"] = Metric(stdev(gaps), "accuracy")
            metrics["routed_minus_base_sd"] = Metric(stdev(gains), "accuracy")
    if filed:
        right = [
            cast("float", row["right"])
            for run in filed
            for row in cast("list[dict[str, object]]", run["routing"])
            if row["condition"] == "trained" and row["right"] is not None
        ]
        complete = len(filed) == len(config.seeds)
        metrics["right_adapter_share_data"] = _judged(Metric.against(fmean(right), "1", at_least=0.98), complete)
    settings = config.model_dump(mode="json")
    return BenchmarkResult(NAME, device_name(), commit(), settings, metrics, [*rows, *routing])


def _judged(metric: Metric, complete: bool) -> Metric:
    return metric if complete else metric.undecided()


def _row(run: Mapping[str, object], row: Mapping[str, object]) -> dict[str, object]:
    return {"suite": run["suite"], "seed": run["seed"], **row}


def _value(run: Mapping[str, object], arm: str) -> float:
    for row in cast("list[dict[str, object]]", run["rows"]):
        if (row["task"], row["condition"], row["arm"]) == (MEAN_OF_TASKS, "trained", arm):
            return cast("float", row["value"])
    raise InputError(f"the run has no arm {arm!r}", where=NAME, remedy="run it again")
