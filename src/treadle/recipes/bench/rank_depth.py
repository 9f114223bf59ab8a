"""`rank-depth`: does a probe say that later layers matter more, and does it only because noise was left in them?

for each base and seed: the probe with its reset, and without it in the model's order and in the opposite one
trend = rank correlation of the scores with the modules' places in the model, -1 to 1
agreement = rank correlation of the scores with those of the probe with its reset

Without a reset a module is scored with the noise of all modules before it. If the trend comes from that, it turns round
when the modules are visited from the last to the first.

Reference: arXiv 2408.09015, whose published code has no reset.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import cast

from transformers import PreTrainedModel

from treadle.configs.bench.ranks import RankDepthRun
from treadle.evaluation.intervals import Interval, mean_interval
from treadle.family.injection import linear_shapes
from treadle.models.loading import load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.ranks.accumulating import AccumulatingSettings
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.perturbation import PerturbationSettings
from treadle.ranks.probes import probe_scores
from treadle.ranks.stability import spearman
from treadle.recipes.bench.classification import trained_base
from treadle.recipes.bench.result import (
    BenchmarkResult,
    Metric,
    commit,
    device_name,
    finished_runs,
    is_recorded,
    record_run,
)

NAME = "rank-depth"
RESET, PILED, BACKWARDS = "reset", "no reset", "no reset, last module first"
ARMS = (RESET, PILED, BACKWARDS)


def rank_depth(config: RankDepthRun, *, runs: Path, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """The trends of every base, arm and seed; what stands in `runs` is not run again.

    Raises:
        UnavailableError: a base is not there.
    """
    for base in config.bases:
        cells = [{"base": base, "arm": arm, "seed": seed} for seed in config.seeds for arm in ARMS]
        missing = [cell for cell in cells if not is_recorded(runs, cell)]
        if not missing:
            continue
        folder = trained_base(base, work, name="two-classes", labels=("no", "yes"), seed=0)
        model = load_model(str(folder), device="cpu")
        tokenizer = load_tokenizer(str(folder))
        inputs = ProbeInputs.of_public_text(tokenizer, sequences=config.sequences, tokens=config.tokens)
        for done, cell in enumerate(missing):
            progress(f"{base}: {cell['arm']}, seed {cell['seed']}", done, len(missing))
            scores = _scores(model, inputs, config, arm=str(cell["arm"]), seed=cast("int", cell["seed"]))
            record_run(runs, {**cell, "scores": scores, "commit": commit()})
    return summary(config, list(finished_runs(runs)))


def quick_rank_depth(config: RankDepthRun, *, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """The same on one base and so little text that nothing is decided."""
    changes = {"bases": (config.quick_base,), "sequences": 1, "tokens": 8, "trials": 1, "seeds": config.seeds[:2]}
    small = config.model_copy(update=changes)
    return rank_depth(small, runs=work / "quick.jsonl", work=work, progress=progress).undecided()


def _scores(model: PreTrainedModel, inputs: ProbeInputs, config: RankDepthRun, *, arm: str, seed: int) -> list[float]:
    """A score a module, in the model's order."""
    shapes = linear_shapes(model)
    visited = dict(reversed(shapes.items())) if arm == BACKWARDS else shapes
    settings = (
        PerturbationSettings(trials=config.trials, compare="pristine")
        if arm == RESET
        else AccumulatingSettings(trials=config.trials, bias=False)
    )
    means = probe_scores(model, inputs, visited, settings=settings, seed=seed).means()
    return [means[name] for name in shapes]


def trend(scores: Sequence[float]) -> float:
    """The rank correlation of scores, in the model's order, with their places in it."""
    return _correlation(scores, [float(place) for place in range(len(scores))])


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    return spearman(*({str(place): score for place, score in enumerate(scores)} for scores in (first, second)))


def summary(config: RankDepthRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """A row a base and arm: trend with its 95% interval over seeds, agreement, scores (their mean over modules 1)."""
    rows: list[dict[str, object]] = []
    excess: list[Interval] = []
    for base in config.bases:
        found = {
            arm: {
                cast("int", run["seed"]): cast("list[float]", run["scores"])
                for run in runs
                if (run["base"], run["arm"]) == (base, arm)
            }
            for arm in ARMS
        }
        trends = {arm: {seed: trend(scores) for seed, scores in of.items()} for arm, of in found.items()}
        seeds = sorted(set.intersection(*(set(of) for of in trends.values())))
        if not seeds:
            continue
        excess.append(mean_interval([trends[PILED][seed] - trends[RESET][seed] for seed in seeds]))
        for arm in ARMS:
            interval = mean_interval([trends[arm][seed] for seed in seeds])
            agreement = fmean(_correlation(found[arm][seed], found[RESET][seed]) for seed in seeds)
            rows.append(
                {
                    "base": base,
                    "arm": arm,
                    "seeds": len(seeds),
                    "trend": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "agreement": agreement,
                    "scores": _profile([found[arm][seed] for seed in seeds]),
                }
            )
    piled = [cast("float", row["agreement"]) for row in rows if row["arm"] == PILED]
    metrics = {
        "bases_with_a_trend_by_piling_up": Metric(float(sum(interval.low > 0 for interval in excess)), "1"),
        "least_excess_of_trend": Metric(min((interval.estimate for interval in excess), default=float("nan")), "1"),
        "agreement_of_piling_up": Metric(fmean(piled) if piled else float("nan"), "1"),
    }
    return BenchmarkResult(NAME, device_name(), commit(), config.model_dump(mode="json"), metrics, rows)


def _profile(of_seeds: Sequence[Sequence[float]]) -> list[float]:
    """The mean score of every module over seeds, as a multiple of the mean over modules."""
    means = [fmean(values) for values in zip(*of_seeds, strict=True)]
    return [round(value / fmean(means), 4) for value in means]
