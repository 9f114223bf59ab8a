"""`par-claims`: what of LoRA-PAR holds in a small world whose two systems are known exactly.

In a world all arms share base, family, warm-up, data and steps, and differ in what they train in which order. Worlds
differ in all of these but the steps.

Reference: arXiv 2507.20999 §4 (the claims); it has neither the plain small LoRA nor intervals.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

from treadle.configs.bench.partition import ParArm, ParClaimsRun, ParWorldRun
from treadle.data.prompts import Example
from treadle.evaluation.intervals import mean_interval
from treadle.progress import Progress, silent
from treadle.recipes.bench.par_trials import Trial, World, arm_row, best_factor, paired, reported, run_trials, tuned
from treadle.recipes.bench.par_world import RECALL, SUMS, WorldSize, base_of, facts_of, metric_of, sums_of
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name, finished_runs
from treadle.train.rows import shuffled
from treadle.train.stages.run import System

NAME = "par-claims"
Config = TypeVar("Config", bound=ParWorldRun)
FULL, DENSE = "full", "dense"
_MEASURES = ("accuracy", "recall", "sums", "recall_first", "sums_first")
_ORDER = ("sft-recall", "grpo-sums")  # of "ours"
_NEAR = 0.02  # two points, within which "ours" may lie below full LoRA


@dataclass(frozen=True)
class Claim:
    """A difference that ought to be above 0: of two arms, in one measure."""

    text: str
    arm: str
    other: str
    measure: str


CLAIMS = (
    Claim("importance beats random elements, after SFT on facts", "element .9", "random element .9", "recall_first"),
    Claim("importance beats random elements, under GRPO alone", "grpo: element .9", "grpo: random", "sums"),
    Claim("importance beats random elements, SFT then GRPO", "element .9", "random element .9", "accuracy"),
    Claim("importance beats random ranks, SFT then GRPO", "rank .8", "random rank .8", "accuracy"),
    Claim("importance beats a LoRA of lower rank, after SFT on facts", "element .9", DENSE, "recall_first"),
    Claim("importance beats a LoRA of lower rank, under GRPO alone", "grpo: element .9", "grpo: dense", "sums"),
    Claim("importance beats a LoRA of lower rank, SFT then GRPO", "element .9", DENSE, "accuracy"),
    Claim("θ = .9 beats full LoRA, SFT then GRPO", "element .9", FULL, "accuracy"),
    Claim("θ = .95 beats full LoRA, SFT then GRPO", "element .95", FULL, "accuracy"),
    # over three equidistant values, the slope of a straight line is the difference of the outer two
    Claim("shared parameters help: α = β = 1 beats 0, the trend over 0, .5, 1", "element .9", "shares 0", "accuracy"),
    Claim("shared parameters help: α = β = 1 beats .5", "element .9", "shares .5", "accuracy"),
    Claim("shared parameters help: α = β = .5 beats 0", "shares .5", "shares 0", "accuracy"),
    Claim("shared parameters help first: α = 1 beats 0 where β = 1", "element .9", "shares 0, 1", "accuracy"),
    Claim("shared parameters help second: β = 1 beats 0 where α = 1", "element .9", "shares 1, 0", "accuracy"),
    Claim("|gφ − ½F̂φ²| beats |g|", "element .9", "gradient .9", "accuracy"),
    Claim("|gφ − ½F̂φ²| beats F̂", "element .9", "fisher .9", "accuracy"),
    Claim("|gφ − ½F̂φ²| beats |g|·F̂, the score as printed", "element .9", "printed .9", "accuracy"),
    Claim("true labels beat random ones", "element .9", "random labels", "accuracy"),
    Claim("SFT then GRPO beats GRPO then SFT", "element .9", "grpo, sft", "accuracy"),
    Claim("SFT then GRPO beats SFT then SFT", "element .9", "sft, sft", "accuracy"),
    Claim("elements beat ranks at like shares", "element .9", "rank .8", "accuracy"),
)


def par_claims(config: ParClaimsRun, *, runs: Path, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """Every trial of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: world, stages, arms, grid, seeds.
        runs: the JSON Lines file of finished trials.
        work: where the bases are kept.
        progress: told of every trial.
    """
    run_trials(config, world_of(config, work, progress), runs, progress)
    return summary(config, list(finished_runs(runs)))


def quick_par_claims(config: ParClaimsRun, *, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """Two arms, one rate, a base of a few steps: shows that everything works and decides nothing."""
    small = barely_trained(config, ("rank .8", FULL, DENSE))
    runs = work / "quick" / "runs.jsonl"
    return par_claims(small, runs=runs, work=work / "quick", progress=progress).undecided()


def barely_trained(config: Config, arms: Sequence[str]) -> Config:
    """The study with these arms alone, one rate and world, a base of a few steps."""
    return config.model_copy(
        update={
            "arms": tuple(arm for arm in config.arms if arm.name in arms),
            "base_steps": 60,
            "factors": config.factors[:1],
            "tuning_seeds": config.tuning_seeds[:1],
            "seeds": config.seeds[:1],
            "sft": replace(config.sft, steps=6),
            "grpo": replace(config.grpo, steps=3),
            "warm_up": replace(config.warm_up, steps=6),
            "test_sums": 50,
        }
    )


def size_of(config: ParWorldRun) -> WorldSize:
    """How large the configured world is."""
    return WorldSize(
        width=config.width,
        layers=config.layers,
        base_facts=config.base_facts,
        facts=config.facts,
        terms=config.terms,
        base_sums=config.base_sums,
        base_steps=config.base_steps,
    )


def world_of(config: ParWorldRun, work: Path, progress: Progress = silent) -> World:
    """The small world: a base a seed, trained in `work` if it is not there yet."""

    def base(seed: int) -> Path:
        return base_of(size_of(config), work / f"base-{config.base_steps}-{seed}", seed=seed, progress=progress)

    parts = {"sft-recall": (RECALL, config.sft), "grpo-sums": (SUMS, config.grpo), "sft-sums": (SUMS, config.long_sft)}
    return World(base, lambda trial: _systems(config, trial), parts)


def _systems(config: ParWorldRun, trial: Trial) -> dict[str, System]:
    """The world of the seed: facts that are asked again, and sums of which others are asked."""
    size, seed = size_of(config), trial.seed
    known = {
        RECALL: facts_of(config.facts, seed=seed, name="facts"),
        SUMS: sums_of(config.sums, terms=config.terms, seed=seed, name="train"),
    }
    asked = {RECALL: known[RECALL], SUMS: sums_of(config.test_sums, terms=config.terms, seed=seed, name="test")}
    if trial.arm.labels == "random":
        known = _dealt(known, seed)
    return {name: System(known[name], asked[name], metric_of(size)) for name in known}


def _dealt(known: Mapping[str, list[Example]], seed: int) -> dict[str, list[Example]]:
    """All examples dealt out anew; every system keeps its number, and as facts are few they are shown as often.

    Facts are repeated until both kinds are as many, so that a random half of all is half facts.
    """
    most = max(map(len, known.values()))
    even = [kind[place % len(kind)] for kind in known.values() for place in range(most)]
    order = shuffled(len(even), seed, "labels")
    names = list(known)
    return {name: [even[place] for place in order[part :: len(names)]] for part, name in enumerate(names)}


def summary(config: ParClaimsRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """A row an arm with its means, a row a claim with its interval and verdict, and what ours is worth."""
    tested = reported(runs)
    rows: list[dict[str, object]] = [arm_row(arm, tested, _MEASURES) for arm in config.arms]
    names = {arm.name for arm in config.arms}
    rows += [_claim_row(claim, tested) for claim in CLAIMS if {claim.arm, claim.other} <= names]
    ours, metrics = _ours(config, runs), dict[str, Metric]()
    for other, bound in ((FULL, -_NEAR), (DENSE, 0.0)):
        differences = paired(tested, ours, other, "accuracy") if ours else []
        name = "ours_minus_full_lower95" if other == FULL else "ours_minus_dense_lowrank_lower95"
        low = mean_interval(differences).low if len(differences) > 1 else math.nan
        metric = Metric.against(low, "1", at_least=bound)
        metrics[name] = metric if len(differences) == len(config.seeds) else metric.undecided()
    verdicts = [row["verdict"] for row in rows if "verdict" in row]
    metrics["claims_reproduced"] = Metric(float(verdicts.count("reproduced")), "claims")
    metrics["claims_not_reproduced"] = Metric(float(verdicts.count("not reproduced")), "claims")
    settings = {**json.loads(config.model_dump_json()), "ours": ours}
    return BenchmarkResult(NAME, device_name(), commit(), settings, metrics, rows)


def _ours(config: ParClaimsRun, runs: Sequence[Mapping[str, object]]) -> str:
    """The arm with regions that does best on the tuning seeds and trains few enough parameters; "" before they ran."""
    searched = [run for run in runs if run["stage"] == "tune" and "refused" not in run]

    def allowed(arm: ParArm) -> bool:
        active = [cast("list[float]", run["active"]) for run in searched if run["arm"] == arm.name]
        plain = arm.granularity != "none" and arm.control is None and arm.labels == "true" and arm.parts == _ORDER
        return plain and bool(active) and max(map(max, active)) <= config.most_active

    candidates = [arm for arm in config.arms if allowed(arm)]
    merit = {arm.name: tuned(runs, arm, best_factor(config, runs, arm)) for arm in candidates}
    return max(merit, key=lambda name: merit[name], default="")


def _claim_row(claim: Claim, runs: Sequence[Mapping[str, object]]) -> dict[str, object]:
    differences = paired(runs, claim.arm, claim.other, claim.measure)
    row: dict[str, object] = {
        "claim": claim.text,
        "arm": claim.arm,
        "other": claim.other,
        "measure": claim.measure,
        "seeds": len(differences),
        "verdict": "not run",
    }
    if len(differences) > 1:
        interval = mean_interval(differences)
        below = "not reproduced" if interval.high < 0 else "unclear"
        row["verdict"] = "reproduced" if interval.low > 0 else below
        row |= {"difference": interval.estimate, "low": interval.low, "high": interval.high}
    return row
