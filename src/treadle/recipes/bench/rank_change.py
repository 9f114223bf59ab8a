"""`rank-change`: do the modules that a probe scores highest change most when the model is trained?

for each task: every probe's scores; for each seed the change ΔW of every module
full:     all weights trained
LoRA:     A and B at one rank everywhere
B alone:  B at one rank everywhere, A frozen, as families do
rank correlation of scores with ‖ΔW‖_F and with ‖ΔW‖_F / ‖W‖_F over the modules

AdamW moves every entry by about its rate, so that ‖ΔW‖_F grows with a module's size whatever the module is worth: so
`size`, the number of its weights, stands beside the probes.

Reference: arXiv 2408.09015, which takes disagreement for a forecast of change and does not measure either.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.configs.bench.ranks import RankChangeRun, RankWorthRun, Way
from treadle.evaluation.intervals import mean_interval
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes, trainable_factors
from treadle.family.plan import RankPlan
from treadle.models.loading import identity_of, load_model
from treadle.progress import Progress, silent
from treadle.ranks.stability import spearman
from treadle.recipes.bench.classification import Classification
from treadle.recipes.bench.rank_worth import Bench
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
from treadle.train.accuracy import accuracy_of
from treadle.train.attention import quick_attention
from treadle.train.batches import steps_of
from treadle.train.objectives import mean_losses
from treadle.train.rows import Row
from treadle.train.settings import SftSettings
from treadle.train.unchanged import eval_mode

NAME = "rank-change"
SIZE = "size"
MEASURES = ("norm", "relative")

OfModules = Mapping[str, float]
Run = Mapping[str, object]


def rank_change(
    config: RankChangeRun,
    worth: RankWorthRun,
    *,
    runs: Path,
    work: Path,
    data: Path | None,
    progress: Progress = silent,
) -> BenchmarkResult:
    """Scores and changes that are not in `runs` yet, then how they go together.

    Args:
        config: tasks, probes, seeds.
        worth: base, rows and probe texts.
        runs: the JSON Lines file of finished runs.
        work: where bases with heads and the probes' scores are kept; that of `rank-worth` has them already.
        data: the folder of the data sets.
        progress: told of every run.

    Raises:
        InputError: no data folder.
    """
    data = data_of(data)
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(worth.model_copy(update={"dtype": "float32"}), data, work, progress)
    for task in config.tasks:
        asked = _asked(config, task)
        missing = [key for key in asked if not is_recorded(runs, key)]
        read = bench.task(task) if missing else None
        for done, key in enumerate(missing):
            assert read is not None  # something is missing
            progress(", ".join(map(str, key.values())), done, len(missing))
            record_run(runs, key | _found(bench, config, read, key) | {"commit": commit()})
    return summary(config, list(finished_runs(runs)))


def quick_rank_change(
    config: RankChangeRun, worth: RankWorthRun, *, work: Path, data: Path | None, progress: Progress = silent
) -> BenchmarkResult:
    """One task, one probe, few rows: shows that everything works and decides nothing."""
    small = config.model_copy(update={"tasks": config.tasks[:1], "probes": ("jacobian",), "seeds": config.seeds[:2]})
    changes = {"train_limit": 32, "validation_limit": 16, "test_limit": 1, "sequences": 4, "tokens": 16}
    short = worth.model_copy(update={**changes, "sft": replace(worth.sft, epochs=1)})
    place = work / "quick"
    return rank_change(small, short, runs=place / "runs.jsonl", work=place, data=data, progress=progress).undecided()


def _asked(config: RankChangeRun, task: str) -> list[dict[str, object]]:
    """What tells the runs of a task apart, as JSON has it: each probe's, and each training's."""
    found: list[dict[str, object]] = [{"task": task, "probe": probe} for probe in config.probes]
    for seed in config.seeds:
        found.extend({"task": task, "trained": way, "seed": seed} for way in config.learning_rates)
    return found


def _found(bench: Bench, config: RankChangeRun, read: Classification, key: Mapping[str, object]) -> dict[str, object]:
    """What one run has found: scores of a probe, or changes of a training."""
    if "probe" in key:
        scores = bench.scores(str(key["task"]), str(key["probe"]), read, mean_rank=config.mean_rank)
        return {"scores": scores.means()}
    way, seed = cast("Way", key["trained"]), cast("int", key["seed"])
    rate = config.learning_rates[way]
    settings = replace(bench.config.sft, learning_rate=rate, seed=seed, max_length=bench.config.max_length)
    changes, accuracy = (
        _full(read, settings) if way == "full" else _low_rank(read, settings, config.mean_rank, moves_A=way == "LoRA")
    )
    norms = {name: float(change.norm()) for name, change in changes.items()}
    weights = {name: read.model.get_submodule(name).get_parameter("weight") for name in norms}
    return {
        "norm": norms,
        "relative": {name: norm / float(weights[name].norm()) for name, norm in norms.items()},
        "size": {name: float(weight.numel()) for name, weight in weights.items()},
        "accuracy": accuracy,
    }


def _full(read: Classification, settings: SftSettings) -> tuple[dict[str, Tensor], float]:
    """ΔW of every module where all weights are trained, and the validation accuracy."""
    model = load_model(str(read.base), device="cpu").requires_grad_(True)
    _learn(model, read.rows["train"], list(model.parameters()), settings)
    changes = {
        name: model.get_submodule(name).get_parameter("weight").detach()
        - read.model.get_submodule(name).get_parameter("weight")
        for name in linear_shapes(model)
    }
    return changes, accuracy_of(model, Factors({}, {}), read.rows["validation"])


def _low_rank(
    read: Classification, settings: SftSettings, rank: int, *, moves_A: bool
) -> tuple[dict[str, Tensor], float]:
    """ΔW = B·A of every module at this rank, and the validation accuracy."""
    shapes = linear_shapes(read.model)
    plan = RankPlan.uniform(shapes, rank=rank)
    family = AdapterFamily.create(base=identity_of(str(read.base)), plan=plan, seed=settings.seed)
    zeros = {name: torch.zeros(shape.out_features, rank) for name, shape in shapes.items()}
    moved = shapes if moves_A else ()
    with trainable_factors(read.model, family.lora_A, zeros, train_A=moved, train_B=shapes) as (A, B):
        _learn(read.model, read.rows["train"], [*A.values(), *B.values()], settings)
    lora_A = {name: A[name].detach() if moves_A else family.lora_A[name] for name in shapes}
    lora_B = {name: B[name].detach() for name in shapes}
    accuracy = accuracy_of(read.model, Factors(lora_A, lora_B), read.rows["validation"])
    return {name: lora_B[name] @ lora_A[name] for name in shapes}, accuracy


def _learn(
    model: PreTrainedModel, rows: Sequence[Row], parameters: Sequence[nn.Parameter], settings: SftSettings
) -> None:
    """Move the parameters by AdamW, in the batches and at the rates of `train_sft`."""
    steps = steps_of([row.tokens for row in rows], settings)
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    with eval_mode(model), quick_attention(model, max(row.tokens for row in rows)):
        for index, step in enumerate(steps):
            pairs = [(rows[place].prompt, rows[place].target) for batch in step for place in batch]
            optimizer.zero_grad()
            mean_losses(model, pairs).mean().backward()
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(index, len(steps))
            optimizer.step()


def summary(config: RankChangeRun, runs: Sequence[Run]) -> BenchmarkResult:
    """A row a probe, way of training and measure: the correlation with its 95% interval over seeds, tasks averaged."""
    rows: list[dict[str, object]] = []
    for way in config.learning_rates:
        trained = [run for run in runs if run.get("trained") == way]
        for measure in MEASURES:
            for probe in (*config.probes, SIZE):
                by_seed = _correlations(runs, trained, probe, measure, tasks=config.tasks)
                if by_seed:
                    interval = mean_interval(by_seed)
                    found = {"correlation": interval.estimate, "low": interval.low, "high": interval.high}
                    rows.append({"trained": way, "measure": measure, "probe": probe, "seeds": len(by_seed), **found})
        if trained:
            accuracies = [cast("float", run["accuracy"]) for run in trained]
            rows.append({"trained": way, "measure": "accuracy", "probe": "", "accuracy": fmean(accuracies)})

    def figure(way: str, measure: str) -> Metric:
        key = {"trained": way, "measure": measure, "probe": "perturbation"}
        found = (cast("float", row["correlation"]) for row in rows if key.items() <= row.items())
        return Metric(next(found, float("nan")), "1")

    metrics = {
        f"{measure}_of_{way.replace(' ', '_')}_by_perturbation": figure(way, measure)
        for way in config.learning_rates
        for measure in MEASURES
    }
    return BenchmarkResult(NAME, device_name(), commit(), config.model_dump(mode="json"), metrics, rows)


def _correlations(
    runs: Iterable[Run], trained: Sequence[Run], probe: str, measure: str, *, tasks: Sequence[str]
) -> list[float]:
    """The mean over tasks of the correlation, for every seed that has all tasks."""
    scores = {str(run["task"]): cast("OfModules", run["scores"]) for run in runs if run.get("probe") == probe}
    found: dict[object, list[float]] = {}
    for run in trained:
        task = str(run["task"])
        own = cast("OfModules", run["size"]) if probe == SIZE else scores.get(task)
        if own is not None:
            found.setdefault(run["seed"], []).append(spearman(own, cast("OfModules", run[measure])))
    return [fmean(values) for values in found.values() if len(values) == len(tasks)]
