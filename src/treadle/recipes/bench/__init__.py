"""The benchmarks by name; `benchmarks/NAME.toml` holds the settings, `benchmarks/results/` what came of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from treadle import files
from treadle.configs.audit import PrivacyAuditRun
from treadle.configs.bench.federated import DpStepCostRun, FederatedBytesRun, FederatedFaultsRun, FederatedQualityRun
from treadle.configs.bench.partition import (
    ParClaimsRun,
    ParImportanceCostRun,
    ParMindsRun,
    ParSavingsRun,
    ParSmollm2Run,
    ParVotersRun,
)
from treadle.configs.bench.ranks import RankChangeRun, RankDepthRun, RankProbeCostRun, RankWorthRun
from treadle.configs.bench.routing_cost import (
    RoutingCostRun,
    RoutingExactnessRun,
    RoutingLargeRun,
    RoutingMemoryRun,
    RoutingModelCostRun,
)
from treadle.configs.bench.routing_quality import (
    DemoQualityRun,
    RoutingAttackRun,
    RoutingCalibrationRun,
    RoutingCompositionRun,
    RoutingContinualRun,
    RoutingQualityRun,
    RoutingRanksRun,
)
from treadle.errors import InputError
from treadle.progress import Progress, silent
from treadle.recipes.bench import (
    demo_quality,
    dp_step_cost,
    federated_bytes,
    federated_faults,
    federated_quality,
    par_claims,
    par_importance_cost,
    par_minds,
    par_savings,
    par_smollm2,
    par_voters,
    privacy_audit,
    rank_change,
    rank_depth,
    rank_probe_cost,
    rank_worth,
    routing_attack,
    routing_calibration,
    routing_composition,
    routing_continual,
    routing_cost,
    routing_exactness,
    routing_large,
    routing_memory,
    routing_model_cost,
    routing_quality,
    routing_ranks,
)
from treadle.recipes.bench.result import BenchmarkResult, finished_runs
from treadle.toml import TomlTable, load_toml

Config = TypeVar("Config", bound=TomlTable)


@dataclass(frozen=True)
class Session:
    """What a benchmark is run with.

    Attributes:
        runs: the JSON Lines file of a study's finished runs.
        work: where intermediate state goes; of a temporary folder if nobody named one.
        data: the folder of the data sets.
        quick: whether to measure a small part.
        progress: told of everything.
    """

    runs: Path
    work: Path
    data: Path | None
    quick: bool
    progress: Progress


@dataclass(frozen=True)
class Benchmark(Generic[Config]):
    """One benchmark.

    Attributes:
        settings: the class of its configuration.
        run: measures in full or quickly, as the session says.
        shown: a study's figures from its recorded runs alone; None where the committed result is shown.
    """

    settings: type[Config]
    run: Callable[[Config, Session], BenchmarkResult]
    shown: Callable[[Config, Sequence[Mapping[str, object]]], BenchmarkResult] | None = None


def _named(
    name: str,
    settings: type[Config],
    run: Callable[[Config, Session], BenchmarkResult],
    summary: Callable[[Config, Sequence[Mapping[str, object]]], BenchmarkResult],
) -> Benchmark[Config]:
    """One of several studies by the same code, each with the settings of its own name."""
    return Benchmark(
        settings,
        lambda config, session: replace(run(config, session), name=name),
        lambda config, runs: replace(summary(config, runs), name=name),
    )


def _federated_quality(config: FederatedQualityRun, session: Session) -> BenchmarkResult:
    study = federated_quality
    if session.quick:
        return study.quick_federated_quality(config, work=session.work, data=session.data, progress=session.progress)
    return study.federated_quality(
        config, runs=session.runs, work=session.work, data=session.data, progress=session.progress
    )


def _rank_worth(config: RankWorthRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return rank_worth.quick_rank_worth(config, work=session.work, data=session.data, progress=session.progress)
    return rank_worth.rank_worth(
        config, runs=session.runs, work=session.work, data=session.data, progress=session.progress
    )


def _demo_quality(config: DemoQualityRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return demo_quality.quick_demo_quality(config, work=session.work, progress=session.progress)
    return demo_quality.demo_quality(
        config, runs=session.runs, work=session.work, data=session.data, progress=session.progress
    )


def _privacy_audit(config: PrivacyAuditRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return privacy_audit.quick_privacy_audit(config, work=session.work, progress=session.progress)
    return privacy_audit.privacy_audit(
        config, runs=session.runs, work=session.work, data=session.data, progress=session.progress
    )


def _federated_bytes(config: FederatedBytesRun, session: Session) -> BenchmarkResult:
    return federated_bytes.federated_bytes(config, work=session.work, quick=session.quick, progress=session.progress)


def _federated_faults(config: FederatedFaultsRun, session: Session) -> BenchmarkResult:
    return federated_faults.federated_faults(config, work=session.work, progress=session.progress)


def _dp_step_cost(config: DpStepCostRun, session: Session) -> BenchmarkResult:
    return dp_step_cost.dp_step_cost(config, work=session.work, quick=session.quick, progress=session.progress)


def _par_importance_cost(config: ParImportanceCostRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return par_importance_cost.quick_par_importance_cost(config, work=session.work, progress=session.progress)
    return par_importance_cost.par_importance_cost(config, runs=session.runs, progress=session.progress)


def _par_savings(config: ParSavingsRun, session: Session) -> BenchmarkResult:
    return par_savings.par_savings(config, quick=session.quick, progress=session.progress)


def _rank_change(config: RankChangeRun, session: Session) -> BenchmarkResult:
    worth = load_toml(session.runs.parent.parent / f"{rank_worth.NAME}.toml", RankWorthRun)
    if session.quick:
        return rank_change.quick_rank_change(
            config, worth, work=session.work, data=session.data, progress=session.progress
        )
    return rank_change.rank_change(
        config, worth, runs=session.runs, work=session.work, data=session.data, progress=session.progress
    )


def _rank_depth(config: RankDepthRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return rank_depth.quick_rank_depth(config, work=session.work, progress=session.progress)
    return rank_depth.rank_depth(config, runs=session.runs, work=session.work, progress=session.progress)


def _rank_probe_cost(config: RankProbeCostRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return rank_probe_cost.quick_rank_probe_cost(config, work=session.work, progress=session.progress)
    return rank_probe_cost.rank_probe_cost(config, runs=session.runs, work=session.work, progress=session.progress)


def _routing_composition(config: RoutingCompositionRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return routing_composition.quick_routing_composition(config, work=session.work, progress=session.progress)
    return routing_composition.routing_composition(
        config, runs=session.runs, work=session.work, progress=session.progress
    )


def _routing_attack(config: RoutingAttackRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return routing_attack.quick_routing_attack(config, work=session.work, progress=session.progress)
    return routing_attack.routing_attack(config, runs=session.runs, work=session.work, progress=session.progress)


def _routing_calibration(config: RoutingCalibrationRun, session: Session) -> BenchmarkResult:
    fleets = load_toml(session.runs.parent.parent / f"{routing_quality.NAME}.toml", RoutingQualityRun)
    if session.quick:
        return routing_calibration.quick_routing_calibration(
            config, fleets, work=session.work, progress=session.progress
        )
    return routing_calibration.routing_calibration(
        config, fleets, runs=session.runs, work=session.work, data=session.data, progress=session.progress
    )


def _routing_continual(config: RoutingContinualRun, session: Session) -> BenchmarkResult:
    study = routing_continual.quick_routing_continual if session.quick else routing_continual.routing_continual
    out = session.work / ("quick" if session.quick else "fleet")
    placed = config.fleet.model_copy(update={"out": out, "data": session.data})
    return study(config.model_copy(update={"fleet": placed}), session.progress)


def _routing_cost(config: RoutingCostRun, session: Session) -> BenchmarkResult:
    return routing_cost.routing_cost(config, quick=session.quick, progress=session.progress)


def _routing_exactness(config: RoutingExactnessRun, session: Session) -> BenchmarkResult:
    return routing_exactness.routing_exactness(
        config, quick=session.quick, work=session.work, progress=session.progress
    )


def _routing_large(config: RoutingLargeRun, session: Session) -> BenchmarkResult:
    folder = session.runs.parent.parent  # the spectra lie beside the configuration
    return routing_large.routing_large(config, folder=folder, quick=session.quick, progress=session.progress)


def _routing_memory(config: RoutingMemoryRun, session: Session) -> BenchmarkResult:
    return routing_memory.routing_memory(config, work=session.work, quick=session.quick, progress=session.progress)


def _routing_model_cost(config: RoutingModelCostRun, session: Session) -> BenchmarkResult:
    return routing_model_cost.routing_model_cost(config, quick=session.quick, progress=session.progress)


def _routing_quality(config: RoutingQualityRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return routing_quality.quick_routing_quality(config, work=session.work, progress=session.progress)
    return routing_quality.routing_quality(
        config, runs=session.runs, work=session.work, data=session.data, progress=session.progress
    )


def _par_claims(config: ParClaimsRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return par_claims.quick_par_claims(config, work=session.work, progress=session.progress)
    return par_claims.par_claims(config, runs=session.runs, work=session.work, progress=session.progress)


def _par_minds(config: ParMindsRun, session: Session) -> BenchmarkResult:
    if session.quick:
        return par_minds.quick_par_minds(config, work=session.work, progress=session.progress)
    return par_minds.par_minds(config, runs=session.runs, work=session.work, progress=session.progress)


def _par_smollm2(config: ParSmollm2Run, session: Session) -> BenchmarkResult:
    folder = session.runs.parent.parent  # task files lie beside the configuration
    if session.quick:
        return par_smollm2.quick_par_smollm2(
            config, folder=folder, work=session.work, data=session.data, progress=session.progress
        )
    return par_smollm2.par_smollm2(
        config, folder=folder, runs=session.runs, data=session.data, progress=session.progress
    )


def _par_voters(config: ParVotersRun, session: Session) -> BenchmarkResult:
    study = par_voters.quick_par_voters if session.quick else par_voters.par_voters
    return study(config, work=session.work, data=session.data, progress=session.progress)


def _routing_ranks(config: RoutingRanksRun, session: Session) -> BenchmarkResult:
    quality = load_toml(session.runs.parent.parent / f"{routing_quality.NAME}.toml", RoutingQualityRun)
    if session.quick:
        return routing_ranks.quick_routing_ranks(config, quality, work=session.work, progress=session.progress)
    return routing_ranks.routing_ranks(
        config, quality, runs=session.runs, work=session.work, data=session.data, progress=session.progress
    )


BENCHMARKS: Mapping[str, Benchmark[Any]] = {
    "demo-quality": Benchmark(DemoQualityRun, _demo_quality, demo_quality.summary),
    "dp-step-cost": Benchmark(DpStepCostRun, _dp_step_cost),
    "federated-quality": _named(
        "federated-quality", FederatedQualityRun, _federated_quality, federated_quality.summary
    ),
    "federated-quality-clients": _named(
        "federated-quality-clients", FederatedQualityRun, _federated_quality, federated_quality.summary
    ),
    "federated-quality-smollm2": _named(
        "federated-quality-smollm2", FederatedQualityRun, _federated_quality, federated_quality.summary
    ),
    "federated-quality-subj": _named(
        "federated-quality-subj", FederatedQualityRun, _federated_quality, federated_quality.summary
    ),
    "par-claims": _named("par-claims", ParClaimsRun, _par_claims, par_claims.summary),
    "par-claims-ours": _named("par-claims-ours", ParClaimsRun, _par_claims, par_claims.summary),
    "par-minds": Benchmark(ParMindsRun, _par_minds, par_minds.summary),
    "par-smollm2": Benchmark(ParSmollm2Run, _par_smollm2, par_smollm2.summary),
    "par-voters": Benchmark(ParVotersRun, _par_voters),
    "privacy-audit": Benchmark(PrivacyAuditRun, _privacy_audit, privacy_audit.summary),
    "federated-bytes": Benchmark(FederatedBytesRun, _federated_bytes),
    "federated-faults": Benchmark(FederatedFaultsRun, _federated_faults),
    "par-importance-cost": Benchmark(ParImportanceCostRun, _par_importance_cost, par_importance_cost.summary),
    "par-savings": Benchmark(ParSavingsRun, _par_savings),
    "rank-change": Benchmark(RankChangeRun, _rank_change, rank_change.summary),
    "rank-depth": Benchmark(RankDepthRun, _rank_depth, rank_depth.summary),
    "rank-probe-cost": Benchmark(RankProbeCostRun, _rank_probe_cost, rank_probe_cost.summary),
    "rank-worth": _named("rank-worth", RankWorthRun, _rank_worth, rank_worth.summary),
    "rank-worth-8": _named("rank-worth-8", RankWorthRun, _rank_worth, rank_worth.summary),
    "rank-worth-100": _named("rank-worth-100", RankWorthRun, _rank_worth, rank_worth.summary),
    "rank-worth-500": _named("rank-worth-500", RankWorthRun, _rank_worth, rank_worth.summary),
    "rank-worth-smollm2": _named("rank-worth-smollm2", RankWorthRun, _rank_worth, rank_worth.summary),
    "routing-attack": Benchmark(RoutingAttackRun, _routing_attack, routing_attack.summary),
    "routing-calibration": Benchmark(RoutingCalibrationRun, _routing_calibration, routing_calibration.summary),
    "routing-composition": Benchmark(RoutingCompositionRun, _routing_composition, routing_composition.summary),
    "routing-continual": Benchmark(RoutingContinualRun, _routing_continual),
    "routing-cost": Benchmark(RoutingCostRun, _routing_cost),
    "routing-exactness": Benchmark(RoutingExactnessRun, _routing_exactness),
    "routing-large": Benchmark(RoutingLargeRun, _routing_large),
    "routing-memory": Benchmark(RoutingMemoryRun, _routing_memory),
    "routing-model-cost": Benchmark(RoutingModelCostRun, _routing_model_cost),
    "routing-quality": Benchmark(RoutingQualityRun, _routing_quality, routing_quality.summary),
    "routing-ranks": Benchmark(RoutingRanksRun, _routing_ranks, routing_ranks.summary),
}


def run_benchmark(
    name: str,
    *,
    folder: Path,
    quick: bool = False,
    show: bool = False,
    data: Path | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> Mapping[str, object]:
    """A benchmark's JSON: measured in full (and written to `results/NAME.json`), `quick`ly, or recomputed to `show`.

    Args:
        name: one of `BENCHMARKS`.
        folder: where the configurations and `results/` are, `benchmarks` in a checkout.
        quick: measure a small part again, in minutes; writes nothing.
        show: recompute the metrics from the committed runs, or read the committed result.
        data: the folder of the data sets.
        work: where a long study keeps its intermediate state.
        progress: told of everything.

    Raises:
        InputError: no such benchmark, or nothing to show.
    """
    if name not in BENCHMARKS:
        raise InputError(f"no benchmark {name!r}", remedy=f"choose among {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    path, runs = folder / "results" / f"{name}.json", folder / "results" / f"{name}.runs.jsonl"
    with TemporaryDirectory() as temporary:
        place = work or Path(temporary)
        session = Session(runs, place, data, quick, progress)
        if show and benchmark.shown is None:
            return _committed(path)
        config = load_toml(folder / f"{name}.toml", benchmark.settings)
        if show and benchmark.shown is not None:
            return _shown(benchmark.shown(config, _recorded(runs)), path)
        result = benchmark.run(config, session)
    if not quick:
        files.write_json(path, result.to_json())
    return result.to_json()


def _recorded(runs: Path) -> list[dict[str, object]]:
    found = list(finished_runs(runs))
    if not found:
        raise InputError("no finished runs", where=runs, remedy="run the benchmark first")
    return found


def _shown(result: BenchmarkResult, path: Path) -> dict[str, object]:
    """The recomputed figures, under the commit and device that the committed result names."""
    content = result.to_json()
    return content | {key: _committed(path)[key] for key in ("device", "commit")} if path.exists() else content


def _committed(path: Path) -> dict[str, object]:
    if not path.exists():
        raise InputError("no committed result", where=path, remedy="run the benchmark first")
    return json.loads(path.read_bytes())
