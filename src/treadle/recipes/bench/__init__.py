"""The benchmarks by name; `benchmarks/NAME.toml` holds the settings, `benchmarks/results/` what came of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from treadle import files
from treadle.configs.bench import DemoQualityRun, RoutingExactnessRun
from treadle.configs.toml import load_toml
from treadle.errors import InputError
from treadle.progress import Progress, silent
from treadle.recipes.bench.demo_quality import demo_quality, quick_demo_quality, summary
from treadle.recipes.bench.result import BenchmarkResult, finished_runs
from treadle.recipes.bench.routing_exactness import routing_exactness

BENCHMARKS = ("routing-exactness", "demo-quality")


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
    path, runs = folder / "results" / f"{name}.json", folder / "results" / f"{name}.runs.jsonl"
    with TemporaryDirectory() as temporary:
        place = work or Path(temporary)
        if name == "demo-quality":
            study = load_toml(folder / f"{name}.toml", DemoQualityRun)
            if show:
                return _shown(summary(study, _recorded(runs)), path)
            if quick:
                return quick_demo_quality(study, work=place, progress=progress).to_json()
            result = demo_quality(study, runs=runs, work=place, data=data, progress=progress)
        else:
            if show:
                return _committed(path)
            config = load_toml(folder / f"{name}.toml", RoutingExactnessRun)
            result = routing_exactness(config, quick=quick, work=work, progress=progress)
            if quick:
                return result.to_json()
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
