"""`routing-ranks`: what routing is worth at other ranks, and whether it fares worse among related tasks.

for each rank: grow the fleet of `routing-quality` at that rank (once), answer every prompt, append one run
relatedness of a task = the largest cosine of its update ΔW = B·A with that of another adapter, over all modules

With one frozen A two updates are compared by their lora_B alone: ⟨B₁A, B₂A⟩ = tr(B₁ᵀ B₂ A Aᵀ).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.configs.bench.routing_quality import ArmGroup, RoutingQualityRun, RoutingRanksRun
from treadle.progress import Progress, part, silent
from treadle.ranks.stability import spearman
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
from treadle.recipes.bench.routing_quality import barely_trained, group_run
from treadle.recipes.fleet import grow_fleet
from treadle.routing.bank import AdapterBank

NAME = "routing-ranks"
ROUTED = "sequence"


def routing_ranks(
    config: RoutingRanksRun,
    quality: RoutingQualityRun,
    *,
    runs: Path,
    work: Path,
    data: Path | None,
    progress: Progress = silent,
) -> BenchmarkResult:
    """Every rank that is not in `runs` yet, then the figures of all of them.

    Args:
        config: ranks, prompts, arms.
        quality: tasks, forms and training; in the same `work` its own fleets are not grown again.
        runs: the JSON Lines file of finished runs.
        work: where fleets grow.
        data: the folder of the data sets.
        progress: told of everything.

    Raises:
        InputError: no data folder.
    """
    data = data_of(data)
    for rank in config.ranks:
        if not is_recorded(runs, {"rank": rank}):
            record_run(runs, _run(config, quality, rank, work=work, data=data, progress=progress))
    return summary(config, list(finished_runs(runs)))


def quick_routing_ranks(
    config: RoutingRanksRun, quality: RoutingQualityRun, *, work: Path, progress: Progress = silent
) -> BenchmarkResult:
    """Two generated tasks, barely trained, at two ranks: shows that everything works and decides nothing."""
    small, changed = config.model_copy(update={"limit": 6}), barely_trained(quality)
    found = [_run(small, changed, rank, work=work, data=None, progress=progress) for rank in config.ranks[:2]]
    return summary(small, found).undecided()


def _run(
    config: RoutingRanksRun,
    quality: RoutingQualityRun,
    rank: int,
    *,
    work: Path,
    data: Path | None,
    progress: Progress,
) -> dict[str, object]:
    told = part(progress, f"rank {rank}")
    own = rank == quality.fleet.mean_rank
    place = work if own else work / f"rank-{rank}"
    ranked = quality.model_copy(
        update={"limit": config.limit, "fleet": quality.fleet.model_copy(update={"mean_rank": rank})}
    )
    grown = ranked.fleet_run(config.seed, work=place, data=data)
    fleet = grow_fleet(grown, told)
    group = ArmGroup(name=f"rank {rank}", arms=config.arms)
    found = group_run(ranked, group, fleet, grown, router=place / f"router-{config.seed}", progress=told)
    cosines = update_cosines(fleet.bank)
    return {
        "rank": rank,
        "commit": commit(),
        "cells": found["cells"],
        "adapters": found["adapters"],
        "cosines": cosines,
    }


def update_cosines(bank: AdapterBank) -> list[list[float]]:
    """The cosine of every two adapters' updates over all modules, adapters in the bank's order."""
    total = torch.zeros(len(bank.adapters), len(bank.adapters), dtype=torch.float64)
    for module, A in bank.family.lora_A.items():
        factors = [adapter.folded_B(module) if module in adapter.lora_B else None for adapter in bank.adapters]
        shape = next(B.shape for B in factors if B is not None)
        total += _products(torch.stack([torch.zeros(shape) if B is None else B for B in factors]).double(), A.double())
    norms = total.diagonal().sqrt()
    return (total / torch.outer(norms, norms)).tolist()


def _products(
    B: Float[Tensor, "adapters outer rank"], A: Float[Tensor, "rank inner"]
) -> Float[Tensor, "adapters adapters"]:
    """⟨BᵢA, BⱼA⟩ of every two adapters at one module."""
    return (B @ (A @ A.T)).flatten(1) @ B.flatten(1).T


def summary(config: RoutingRanksRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """A row a rank and form with every arm's accuracy; a row a rank and task with its relatedness and what it gains."""
    rows: list[dict[str, object]] = []
    correlations: dict[str, list[float]] = {"gain": [], "loss": []}
    for run in sorted(runs, key=lambda run: cast("int", run["rank"])):
        cells = cast("list[dict[str, object]]", run["cells"])
        right = {
            (str(cell["task"]), str(cell["condition"]), str(cell["arm"])): fmean(map(int, str(cell["right"])))
            for cell in cells
        }
        for condition in dict.fromkeys(form for _, form, _ in right):
            means = {arm: _mean(right, condition=condition, arm=arm) for arm in config.arms}
            rows.append({"rank": run["rank"], "condition": condition, **means, **_share(means)})
        related = _relatedness(run)
        gains = {task: _mean(right, task=task, arm=ROUTED) - _mean(right, task=task, arm="base") for task in related}
        lost = {task: _mean(right, task=task, arm="oracle") - _mean(right, task=task, arm=ROUTED) for task in related}
        for task, relatedness in related.items():
            figures = {"relatedness": relatedness, "gain": gains[task], "lost_to_oracle": lost[task]}
            rows.append({"rank": run["rank"], "task": task, **figures})
        for name, found in (("gain", gains), ("loss", lost)):
            if len(related) > 2 and len(set(found.values())) > 1:
                correlations[name].append(spearman(related, found))
    trained = {
        f"oracle_share_rank_{row['rank']}": Metric(cast("float", row["share_of_oracle"]), "1")
        for row in rows
        if row.get("condition") == "trained"
    }
    with_relatedness = {
        f"relatedness_with_{name}": Metric(fmean(values) if values else float("nan"), "1")
        for name, values in correlations.items()
    }
    metrics = {**trained, **with_relatedness}
    return BenchmarkResult(NAME, device_name(), commit(), config.model_dump(mode="json"), metrics, rows)


def _mean(
    right: Mapping[tuple[str, str, str], float], *, arm: str, task: str | None = None, condition: str | None = None
) -> float:
    """The mean accuracy of an arm, over tasks and forms where they are not named."""
    return fmean(
        share
        for (of, form, by), share in right.items()
        if by == arm and task in (None, of) and condition in (None, form)
    )


def _share(means: Mapping[str, float]) -> dict[str, float]:
    """What share of the oracle's gain over the base routing has."""
    gain = means["oracle"] - means["base"]
    return {"share_of_oracle": (means[ROUTED] - means["base"]) / gain if gain > 0 else float("nan")}


def _relatedness(run: Mapping[str, object]) -> dict[str, float]:
    """Task → the largest cosine of its adapter's update with another's."""
    names, cosines = cast("list[str]", run["adapters"]), cast("list[list[float]]", run["cosines"])
    return {
        name: max(cosine for other, cosine in enumerate(cosines[place]) if other != place)
        for place, name in enumerate(names)
    }
