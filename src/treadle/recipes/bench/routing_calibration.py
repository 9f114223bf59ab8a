"""`routing-calibration`: what the choice of public text moves, and how well `sequence` knows that nobody is meant.

for each seed and text: calibrate the fleet of `routing-quality` on the text, let `sequence` choose for every prompt

Prompts of tasks that have an adapter are inside, questions of other tasks outside; AUROC is of their chances.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from treadle.configs.bench.routing_quality import PublicTextChoice, RoutingCalibrationRun, RoutingQualityRun
from treadle.data.prompts import Example
from treadle.data.tasks import load_task
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
from treadle.recipes.bench.routing_quality import barely_trained
from treadle.recipes.calibration import PublicSource, calibration_of
from treadle.recipes.evaluate import decisions
from treadle.recipes.fleet import Fleet, grow_fleet
from treadle.routing.abstention import LEVEL
from treadle.routing.bank import AdapterBank
from treadle.routing.decision import BASE
from treadle.routing.routed import RoutedModel

NAME = "routing-calibration"
_NEVER = 0.999999
"""An `abstain` under which the chance is computed, and only what no public prompt falls short of is the base's."""


def routing_calibration(
    config: RoutingCalibrationRun,
    quality: RoutingQualityRun,
    *,
    runs: Path,
    work: Path,
    data: Path | None,
    progress: Progress = silent,
) -> BenchmarkResult:
    """Every seed that is not in `runs` yet, then the figures of all of them.

    Args:
        config: texts and prompts.
        quality: whose fleets are calibrated: in the same `work` they are grown once.
        runs: the JSON Lines file of finished runs.
        work: where fleets grow.
        data: the folder of the data sets.
        progress: told of everything.

    Raises:
        InputError: no data folder.
    """
    data = data_of(data)
    done = {run["seed"] for run in finished_runs(runs)}
    for seed in quality.seeds:
        if seed not in done:
            record_run(runs, _run(config, quality, seed, work=work, data=data, progress=progress))
    return summary(config, list(finished_runs(runs)))


def quick_routing_calibration(
    config: RoutingCalibrationRun, quality: RoutingQualityRun, *, work: Path, progress: Progress = silent
) -> BenchmarkResult:
    """Two generated tasks, barely trained, and a third outside: shows that everything works and decides nothing."""
    texts = tuple(text.model_copy(update={"limit": min(text.limit, 48)}) for text in config.texts[:2])
    small = config.model_copy(update={"limit": 6, "outside": ("chain_sum",), "texts": texts})
    run = _run(small, barely_trained(quality), quality.seeds[0], work=work, data=None, progress=progress)
    return summary(small, [run]).undecided()


def _run(
    config: RoutingCalibrationRun,
    quality: RoutingQualityRun,
    seed: int,
    *,
    work: Path,
    data: Path | None,
    progress: Progress,
) -> dict[str, object]:
    told = part(progress, f"seed {seed}")
    fleet = grow_fleet(quality.fleet_run(seed, work=work, data=data), told)
    asked = {
        (task, condition): load_task(task).examples(
            "test", data_root=data, condition=condition, limit=config.limit, seed=seed
        )
        for condition in quality.conditions
        for task in (*quality.asked, *config.outside)
    }
    rows: list[dict[str, object]] = []
    for done, text in enumerate(config.texts):
        told(f"calibrating on {text.name}", done, len(config.texts))
        source = PublicSource(**text.model_dump(exclude={"name"}))
        bank = fleet.bank.calibrate(
            calibration_of(source, fleet.bank.names), model=fleet.model, tokenizer=fleet.tokenizer
        )
        rows += _rows(text, fleet, bank, asked)
    return {"seed": seed, "commit": commit(), "rows": rows}


def _rows(
    text: PublicTextChoice, fleet: Fleet, bank: AdapterBank, asked: Mapping[tuple[str, str], Sequence[Example]]
) -> list[dict[str, object]]:
    """A row a task and condition: who was chosen, and the chance of each prompt, None without public prompts."""
    routed = RoutedModel(fleet.model, bank, abstain=_NEVER)
    rows: list[dict[str, object]] = []
    try:
        for (task, condition), examples in asked.items():
            place, chance = _chosen(routed, fleet.tokenizer, examples)
            row: dict[str, object] = {"text": text.name, "task": task, "condition": condition}
            if task in bank.names:
                row["right_adapter"] = float((place == bank.names.index(task)).float().mean())
            if chance is not None:
                row["chances"] = [round(float(each), 4) for each in chance]
            rows.append(row)
    finally:
        routed.unwrap()
    return rows


def _chosen(
    routed: RoutedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> tuple[Tensor, Tensor | None]:
    """Whom `sequence` would choose for each prompt if it never abstained, and the chance."""
    place, chance = torch.full((len(examples),), BASE), torch.ones(len(examples))
    known = True
    for places, decision in decisions(routed, tokenizer, examples):
        place[places] = torch.where(decision.winner == BASE, decision.runner_up, decision.winner).cpu()
        known = decision.chance is not None
        if decision.chance is not None:
            chance[places] = decision.chance.float().cpu()
    return place, chance if known else None


def summary(config: RoutingCalibrationRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """Means over seeds by text and condition; the metrics are of the first text, and of the spread over all."""
    cells: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        rows = cast("list[dict[str, object]]", run["rows"])
        for text, condition in dict.fromkeys((str(row["text"]), str(row["condition"])) for row in rows):
            mine = [row for row in rows if (row["text"], row["condition"]) == (text, condition)]
            cells.setdefault((text, condition), []).append(_cell(mine))
    table: list[dict[str, object]] = []
    for (text, condition), seeds in cells.items():
        names = dict.fromkeys(name for seed in seeds for name in seed)
        means = {name: fmean(seed[name] for seed in seeds if name in seed) for name in names}
        table.append({"text": text, "condition": condition, "seeds": len(seeds), **means})
    metrics: dict[str, Metric] = {}
    for condition in dict.fromkeys(condition for _, condition in cells):
        mine = [row for row in table if row["condition"] == condition]
        right = [cast("float", row["right_adapter"]) for row in mine]
        metrics[f"right_adapter_{condition}"] = Metric(right[0], "1")
        metrics[f"right_adapter_{condition}_spread"] = Metric(max(right) - min(right), "1")
        metrics[f"auroc_{condition}"] = Metric(cast("float", mine[0]["auroc"]), "1")
    return BenchmarkResult(NAME, device_name(), commit(), config.model_dump(mode="json"), metrics, table)


def _cell(rows: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """One text, condition and seed: the right adapter over tasks, what is left to the base, and the AUROC."""
    inside = [row for row in rows if "right_adapter" in row]
    found = {"right_adapter": fmean(cast("float", row["right_adapter"]) for row in inside)}
    if not all("chances" in row for row in rows):
        return found
    near, far = (
        torch.tensor([chance for row in rows if ("right_adapter" in row) == here for chance in _chances(row)])
        for here in (True, False)
    )
    return found | {
        "inside_left_to_base": float((near > LEVEL).float().mean()),
        "outside_left_to_base": float((far > LEVEL).float().mean()),
        "auroc": auroc(far, near),
    }


def _chances(row: Mapping[str, object]) -> list[float]:
    return cast("list[float]", row["chances"])


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a positive's value is above a negative's, ties counted half (Mann and Whitney)."""
    above = (positive[:, None] > negative[None]).double().mean()
    equal = (positive[:, None] == negative[None]).double().mean()
    return float(above + 0.5 * equal)
