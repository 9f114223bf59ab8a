"""`par-minds`: does it help to route the two minds of LoRA-PAR, where training ends with their sum?

every trial   the two stages of `par-claims` in a world of its own, regions of whole ranks, A frozen
minds         each system's own and shared ranks, an adapter of the family each
ways          of answering both systems' questions: the sum, either mind, and the bank of both, routed

All ways answer with ranks of one training, so they are paired by world; the sum also has those that neither system
selected, which the warm-up trained and no mind holds. Every one is held against the sum of the
first arm: of two arms, it is the one that was made to be summed.

Reference: arXiv 2507.20999 (the stages), 2509.18093 (routing); neither routes the minds.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import cast

from treadle.configs.bench.partition import ParMindsRun
from treadle.evaluation.answers import Answerer, Answering, correct
from treadle.evaluation.intervals import mean_interval
from treadle.family.adapter import Provenance
from treadle.family.injection import inject
from treadle.progress import Progress, silent
from treadle.recipes.bench.par_claims import barely_trained, size_of, world_of
from treadle.recipes.bench.par_trials import Trained, Trial, arm_row, reported, run_trials
from treadle.recipes.bench.par_world import RECALL, SUMS, WorldSize, public_text
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name, finished_runs
from treadle.recipes.evaluate import choices
from treadle.recipes.stages import mind_of
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import Calibration, OwnCalibration, PublicCalibration
from treadle.routing.decision import BASE
from treadle.routing.routed import Granularity, RoutedModel

NAME = "par-minds"
DEFAULT = "public sequence"
"""How a bank routes if nobody says otherwise."""

ROUTED: Mapping[str, tuple[str, Granularity]] = {
    DEFAULT: ("public", "sequence"),
    "public token": ("public", "token"),
    "own sequence": ("own", "sequence"),
    "own token": ("own", "token"),
}
"""Way → whose text calibrates the bank, and how often it chooses."""

WAYS = ("summed", "base", "oracle", "wrong", *ROUTED)
_SYSTEMS = (RECALL, SUMS)
_OWN = {name: name for name in _SYSTEMS}
_MEASURES = ("accuracy", *_SYSTEMS, *(f"{name}_first" for name in _SYSTEMS))


def par_minds(config: ParMindsRun, *, runs: Path, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """Every trial of the configuration that is not in `runs` yet, then the figures of all of them.

    Args:
        config: world, stages, arms, grid, seeds.
        runs: the JSON Lines file of finished trials.
        work: where the bases are kept.
        progress: told of every trial.
    """
    world = replace(world_of(config, work, progress), also=partial(measured, size_of(config)))
    run_trials(config, world, runs, progress)
    return summary(config, list(finished_runs(runs)))


def quick_par_minds(config: ParMindsRun, *, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """One arm, one rate, a base of a few steps: shows that everything works and decides nothing."""
    small = barely_trained(config, (config.arms[0].name,))
    runs = work / "quick" / "runs.jsonl"
    return par_minds(small, runs=runs, work=work / "quick", progress=progress).undecided()


def measured(size: WorldSize, trial: Trial, trained: Trained) -> dict[str, object]:
    """What every way answers rightly, by system and in the mean, and where each calibration sends the prompts."""
    model, tokenizer, systems = trained.model, trained.tokenizer, trained.systems
    regions = trained.made.regions
    assert regions is not None  # the configuration sees to it
    minds = [
        mind_of(trained.made.factors, regions, name).adapter(
            trained.family, name, provenance=Provenance("lora-par"), transposed=False
        )
        for name in systems
    ]
    texts = {name: [one.prompt + one.completion for one in system.examples] for name, system in systems.items()}
    kinds: Mapping[str, Calibration] = {
        "public": PublicCalibration(public_text(size, seed=trial.seed)),
        "own": OwnCalibration(texts),
    }
    banks = {
        kind: AdapterBank.build(trained.family, minds, calibration=calibration, model=model, tokenizer=tokenizer)
        for kind, calibration in kinds.items()
    }
    alone: dict[str, dict[str, float]] = {}
    for mind in minds:
        with inject(model, mind.lora_A, mind.folded()):
            alone[mind.name] = _right(model, trained)
    moments = list(trained.made.accuracy.values())
    found: dict[str, Mapping[str, float]] = {
        "summed": moments[-1],
        "base": moments[0],
        "oracle": {name: alone[name][name] for name in systems},
        "wrong": {name: fmean(alone[other][name] for other in systems if other != name) for name in systems},
    }
    for way, (kind, granularity) in ROUTED.items():
        routed = RoutedModel(model, banks[kind], granularity=granularity)
        try:
            found[way] = _right(routed, trained)
        finally:
            routed.unwrap()
    figures = {f"{way} {name}": value for way, values in found.items() for name, value in values.items()}
    means = {way: fmean(values.values()) for way, values in found.items()}
    return {**means, **figures, "sent": {kind: _sent(bank, trained) for kind, bank in banks.items()}}


def _right(model: Answerer, trained: Trained) -> dict[str, float]:
    """System → share of its held-out examples that are answered rightly."""
    found: dict[str, float] = {}
    for name, system in trained.systems.items():
        assert system.metric is not None  # the world has one
        verdicts = correct(model, trained.tokenizer, system.held_out, system.metric, Answering())
        found[name] = fmean(verdicts)
    return found


def _sent(bank: AdapterBank, trained: Trained) -> dict[str, dict[str, float]]:
    """System → mind, or "base" → share of the system's prompts that are sent to it, one choice a prompt."""
    found: dict[str, dict[str, float]] = {}
    for name, system in trained.systems.items():
        chosen = choices(bank, trained.model, trained.tokenizer, system.held_out)
        places = {**{mind: place for place, mind in enumerate(bank.names)}, "base": BASE}
        found[name] = {mind: chosen.count(place) / len(chosen) for mind, place in places.items()}
    return found


def summary(config: ParMindsRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """A row an arm with its means, and a row an arm and way with its difference from the first arm's sum.

    The metrics speak of the first arm, routed as a bank does by default.
    """
    tested = reported(runs)
    arms = {arm.name: [run for run in tested if run["arm"] == arm.name] for arm in config.arms}
    rows = [arm_row(arm, tested, _MEASURES) for arm in config.arms]
    first = arms[config.arms[0].name]
    rows += [_way_row(name, way, own, first) for name, own in arms.items() if own for way in WAYS]
    routed, most = (mean_interval(_beyond(first, way, first) or [math.nan]) for way in (DEFAULT, "oracle"))
    low = Metric.against(routed.low, "1", at_least=0.0)
    metrics = {
        "routed_minus_summed": Metric(routed.estimate, "1"),
        "routed_minus_summed_lower95": low if len(first) == len(config.seeds) else low.undecided(),
        "routed_minus_summed_upper95": Metric(routed.high, "1"),
        "oracle_minus_summed": Metric(most.estimate, "1"),
        "prompts_that_reach_their_mind": Metric(_sent_to(first, DEFAULT, _OWN) if first else math.nan, "1"),
    }
    return BenchmarkResult(NAME, device_name(), commit(), json.loads(config.model_dump_json()), metrics, rows)


def _way_row(
    arm: str, way: str, runs: Sequence[Mapping[str, object]], first: Sequence[Mapping[str, object]]
) -> dict[str, object]:
    row: dict[str, object] = {"arm": arm, "way": way, "seeds": len(runs)}
    row |= {"accuracy": _mean(runs, way)} | {name: _mean(runs, f"{way} {name}") for name in _SYSTEMS}
    if way in ROUTED and ROUTED[way][1] == "sequence":
        row |= {"reached": _sent_to(runs, way, _OWN), "left_to_base": _sent_to(runs, way, dict.fromkeys(_OWN, "base"))}
    differences = _beyond(runs, way, first)
    if len(differences) > 1:
        interval = mean_interval(differences)
        row |= {"minus_first_sum": interval.estimate, "low": interval.low, "high": interval.high}
    return row


def _sent_to(runs: Sequence[Mapping[str, object]], way: str, wanted: Mapping[str, str]) -> float:
    """Share of the prompts of a system that are sent where `wanted` says, the systems weighing the same."""
    sent = [cast("Mapping[str, Mapping[str, Mapping[str, float]]]", run["sent"])[ROUTED[way][0]] for run in runs]
    return fmean(of_run[name][place] for of_run in sent for name, place in wanted.items())


def _beyond(runs: Sequence[Mapping[str, object]], way: str, first: Sequence[Mapping[str, object]]) -> list[float]:
    """What the way answers beyond the sum of the first arm, world by world, where both have run."""
    summed = {run["seed"]: cast("float", run["summed"]) for run in first}
    return [cast("float", run[way]) - summed[run["seed"]] for run in runs if run["seed"] in summed]


def _mean(runs: Sequence[Mapping[str, object]], measure: str) -> float:
    return fmean(cast("float", run[measure]) for run in runs)
