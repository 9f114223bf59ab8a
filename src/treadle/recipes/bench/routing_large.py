"""`routing-large`: the best of up to 100,000 adapters for one token at one layer, by bounds, flat and by FAISS.

for each module, number of adapters and of threads: in each round every arm in its turn takes all tokens;
medians and means over tokens and rounds
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from treadle import files
from treadle.algebra import pair_products
from treadle.configs.bench.routing_cost import RoutingLargeRun, Spectra
from treadle.errors import InputError
from treadle.progress import Progress, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.recipes.bench.spectra import SyntheticBank, synthetic_bank
from treadle.routing.approximate import ApproximateIndex, approximate_search, build_approximate_index
from treadle.routing.decision import TIE
from treadle.routing.search import Found, ScoreIndex, build_index, search
from treadle.toml import checked

NAME = "routing-large"
# float32 scores here are a thousand times closer than this to the true ones.
_DOUBT = 1e-3

Row = dict[str, str | int | float]


def routing_large(
    config: RoutingLargeRun, *, folder: Path, quick: bool = False, progress: Progress = silent
) -> BenchmarkResult:
    """The table and its worst rows; `quick` measures one module with few tokens.

    Args:
        config: sizes.
        folder: where the spectra are.
        quick: judge nothing.
        progress: told of every bank.

    Raises:
        InputError: the spectra do not have one of the modules.
        UnavailableError: FAISS is not installed.
    """
    path = folder / config.spectra
    spectra = checked(files.read_json(path), Spectra, where=path)
    modules, queries = (config.modules[:1], config.quick_queries) if quick else (config.modules, config.queries)
    cells = [(module, adapters) for module in modules for adapters in config.adapters]
    rows: list[Row] = []
    before = torch.get_num_threads()
    try:
        for done, (module, adapters) in enumerate(cells):
            progress(f"{module}, {adapters} adapters", done, len(cells))
            layer = next((layer for layer in spectra.layers if layer.module == module), None)
            if layer is None:
                raise InputError(f"no module {module!r}", where=path, remedy="see its modules")
            tokens = config.sample + queries
            bank = synthetic_bank(spectra, layer, adapters=adapters, tokens=tokens, seed=config.seed)
            rows += [{"module": module, "adapters": adapters} | row for row in _cell(config, bank)]
    finally:
        torch.set_num_threads(before)
    metrics = _metrics(rows)
    if quick:
        metrics = {name: metric.undecided() for name, metric in metrics.items()}
    settings = config.model_dump(mode="json") | {"spectra_sha256": files.sha256_of(path), "quick": quick}
    return BenchmarkResult(NAME, device_name(), commit(), settings, metrics, rows)


@dataclass(frozen=True)
class _Arms:
    """One bank, ready to be asked in every way.

    Attributes:
        bank: the adapters.
        columns: packed Grams, one column an adapter: the faster of the two layouts for one token.
        scales: ‖B‖_F/σ, float32.
        centres: -μ/σ, float32.
        index: exact.
        approximate: not exact.
    """

    bank: SyntheticBank
    columns: Tensor
    scales: Tensor
    centres: Tensor
    index: ScoreIndex
    approximate: ApproximateIndex

    def settle(self, z: Tensor, places: Sequence[int]) -> list[float]:
        """Scores by definition, of a few."""
        chosen = torch.tensor(places)
        norms = torch.linalg.vector_norm(self.bank.triangles[chosen] @ z, dim=1)
        return ((norms - self.bank.mean[chosen]) / self.bank.std[chosen]).tolist()

    def flat(self, z: Tensor) -> int:
        """The product, the scores and the argmax, float64 where float32 leaves a doubt: in place, as lean as can be."""
        length = float(torch.linalg.vector_norm(z))
        norms = torch.mv(self.columns.T, pair_products((z / length)[None]).float()[0]).clamp_min_(0.0).sqrt_()
        value = torch.addcmul(self.centres, norms, self.scales, value=length)
        best = float(value.max())
        near = (value >= best - _DOUBT * max(1.0, abs(best))).nonzero()[:, 0].tolist()
        return near[0] if len(near) == 1 else near[_first_best(torch.tensor(self.settle(z, near)))]

    def search(self, z: Tensor) -> Found:
        """The exact index's answer."""
        return search(self.index, z, settle=lambda places: self.settle(z, places))

    def product(self, z: Tensor) -> Tensor:
        """The flat way's product alone, which decides nothing yet."""
        return torch.mv(self.columns.T, pair_products(z[None]).float()[0])


def _cell(config: RoutingLargeRun, bank: SyntheticBank) -> list[Row]:
    sample, queries = bank.z[: config.sample], bank.z[config.sample :]
    grams, scales = bank.packed(), torch.linalg.matrix_norm(bank.triangles) / bank.std
    centres = bank.mean / bank.std
    start = time.perf_counter()
    index = build_index(grams, scales, centres, sample)
    built = time.perf_counter() - start
    approximate = build_approximate_index(index, sample, probes=config.probes, candidates=config.candidates)
    arms = _Arms(bank, grams.T.contiguous(), scales.float(), -centres.float(), index, approximate)
    truth = [_first_best(bank.scores(z)) for z in queries]
    rows: list[Row] = []
    for threads in config.threads:
        torch.set_num_threads(threads)
        rows.append({"threads": threads, "build_seconds": built} | _measured(arms, queries, truth, config.rounds))
    return rows


def _measured(arms: _Arms, queries: Tensor, truth: Sequence[int], rounds: int) -> Row:
    """Times and counts: in each round every arm takes all tokens in its turn."""
    calls: Mapping[str, Callable[[Tensor], object]] = {
        "product": arms.product,
        "flat": arms.flat,
        "search": arms.search,
        "approximate": lambda z: approximate_search(arms.approximate, z),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    tokens = list(queries)
    found = [arms.search(z) for z in tokens]
    flat = [arms.flat(z) for z in tokens]
    near = [approximate_search(arms.approximate, z) for z in tokens]
    for _ in range(rounds):
        for name, call in calls.items():
            for z in tokens:
                start = time.perf_counter()
                call(z)
                times[name].append(time.perf_counter() - start)
    scored = [each.scored for each in found]
    row: Row = {"tokens": len(tokens), "scored_median": median(scored), "scored_most": max(scored)}
    row |= {f"{name}_microseconds": 1e6 * median(values) for name, values in times.items()}
    row |= {f"{name}_mean_microseconds": 1e6 * fmean(values) for name, values in times.items()}
    winners = {"flat": flat, "search": [each.winner for each in found], "approximate": [each.winner for each in near]}
    row |= {f"{name}_recall": _share(places, truth) for name, places in winners.items()}
    return row | {"approximate_recall_stated": arms.approximate.recall}


def _share(places: Sequence[int], truth: Sequence[int]) -> float:
    return sum(one == other for one, other in zip(places, truth, strict=True)) / len(truth)


def _first_best(scores: Tensor) -> int:
    """The place of the best score, ties to the first."""
    best = float(scores.max())
    return int((scores >= best - TIE * max(1.0, abs(best))).nonzero()[0, 0])


def _metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Recall over everything; the other figures from the worst row of the largest banks."""
    largest = max(int(row["adapters"]) for row in rows)
    large = [row for row in rows if row["adapters"] == largest]

    def least(one: str, two: str, kind: str = "") -> float:
        return min(float(row[f"{one}_{kind}microseconds"]) / float(row[f"{two}_{kind}microseconds"]) for row in large)

    recall = fmean(float(row["search_recall"]) for row in rows)
    return {
        "recall": Metric.against(recall, "1", at_least=1.0),
        "speedup_over_flat": Metric.against(least("flat", "search"), "1", at_least=2.0),
        "mean_speedup_over_flat": Metric(least("flat", "search", "mean_"), "1"),
        "speedup_over_product": Metric(least("product", "search"), "1"),
        "approximate_recall": Metric(min(float(row["approximate_recall"]) for row in large), "1"),
        "approximate_speedup_over_flat": Metric(least("flat", "approximate"), "1"),
    }
