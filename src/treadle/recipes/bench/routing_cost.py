"""`routing-cost`: the time of one linear layer with routing, beside what others need for it.

for each shape, number of adapters, number of tokens and threads: every arm once a round, in turn; medians of rounds
"""

import gc
import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from treadle.configs.bench.routing_cost import LayerShapeRow, RoutingCostRun
from treadle.family.adapter import Adapter, Provenance
from treadle.family.injection import Attachment
from treadle.family.plan import LayerShape, RankPlan
from treadle.progress import Progress, silent
from treadle.recipes.bench.peers import Fleet, Peer, article_loop, batched_qr, peft_arrow, single_lora
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.routing.factors import build_factors, calibrated
from treadle.routing.layer import Composition, RoutedLayer
from treadle.routing.scorers import SCORERS

NAME = "routing-cost"
_MODULE = "layer"
_FEW = 0.05  # seconds of one arm's turn in a round, for arms that are faster than that


def routing_cost(config: RoutingCostRun, *, quick: bool = False, progress: Progress = silent) -> BenchmarkResult:
    """The table, and the ratios that matter; `quick` measures the shape that is judged alone, in few rounds."""
    shapes = [config.judged] if quick else config.shapes
    counts = [min(config.adapters), 256, 1024] if quick else config.adapters
    rounds = 3 if quick else config.rounds
    rows: list[dict[str, int | float]] = []
    before = torch.get_num_threads()
    cells = [(shape, count) for shape in shapes for count in counts]
    try:
        for done, (shape, count) in enumerate(cells):
            progress(f"{shape.inner}→{shape.outer}, rank {shape.rank}, {count} adapters", done, len(cells))
            arms = _arms(shape, count, arrow=count <= config.most_of_arrow)
            for threads in config.threads:
                torch.set_num_threads(threads)
                for tokens in config.tokens:
                    key = {**shape.model_dump(), "adapters": count, "tokens": tokens, "threads": threads}
                    rows.append(key | _seconds(arms, shape.inner, tokens, rounds))
            del arms
            gc.collect()
    finally:
        torch.set_num_threads(before)
    metrics = _metrics(config, rows)
    if quick:
        metrics = {name: metric.undecided() for name, metric in metrics.items()}
    settings = config.model_dump(mode="json") | {"quick": quick}
    return BenchmarkResult(NAME, device_name(), commit(), settings, metrics, rows)


def _arms(shape: LayerShapeRow, count: int, *, arrow: bool) -> dict[str, Peer]:
    """Arm → what it does to x; every arm starts from the same base layer and adapters."""
    fleet = _fleet(shape, count)
    arms: dict[str, Peer] = {"linear": fleet.base, "lora": single_lora(fleet), "treadle": _ours(fleet)}
    if arrow:
        arms["peft_arrow"] = peft_arrow(fleet)
    return arms | {"article_loop": article_loop(fleet), "batched_qr": batched_qr(fleet)}


def _fleet(shape: LayerShapeRow, count: int) -> Fleet:
    """Random adapters of one norm whose z-scores are alike, so that many of them are chosen."""
    generator = torch.Generator().manual_seed(shape.inner + count)
    base = nn.Linear(shape.inner, shape.outer, bias=False)
    A = torch.randn(shape.rank, shape.inner, generator=generator) / shape.inner**0.5
    Bs = [torch.randn(shape.outer, shape.rank, generator=generator) / shape.outer**0.5 for _ in range(count)]
    z = torch.randn(2048, shape.inner, generator=generator) @ A.T
    norms = torch.stack([torch.linalg.vector_norm(z @ torch.linalg.qr(B).R.T, dim=1) for B in Bs], 1)
    return Fleet(base.requires_grad_(requires_grad=False), A, Bs, norms.mean(0), norms.std(0))


def routed_layer(A: Tensor, Bs: Sequence[Tensor], mean: Tensor, std: Tensor) -> RoutedLayer:
    """A layer routed among adapters of one A, (rank, inner), with B (out, rank) and these statistics of their norms."""
    plan = RankPlan.uniform({_MODULE: LayerShape(A.shape[1], Bs[0].shape[0])}, rank=A.shape[0], scaling=1.0)
    adapters = [
        Adapter(f"a{place}", plan, {_MODULE: A}, {_MODULE: B}, "0", None, Provenance("random"))
        for place, B in enumerate(Bs)
    ]
    factors = calibrated(build_factors(_MODULE, adapters), {"mean": mean, "std": std})
    return RoutedLayer(factors, SCORERS["seqr"], slots=len(Bs))


def _ours(fleet: Fleet) -> Peer:
    """The layer with the very hook of a routed model, less the hook's look at whose request it is."""
    layer, argmax = routed_layer(fleet.A, fleet.Bs, fleet.mean, fleet.std), Composition(1, 1.0)

    def delta(x: Tensor) -> Tensor | None:
        return layer.added(x, layer.choose(x, None, argmax, explained=False))

    own = nn.Linear(fleet.base.in_features, fleet.base.out_features, bias=False)
    own.weight = fleet.base.weight
    Attachment({_MODULE: own}, {_MODULE: delta})
    return own


def _seconds(arms: Mapping[str, Peer], inner: int, tokens: int, rounds: int) -> dict[str, float]:
    """Arm → median seconds of a call; arms take turns, and no two calls in a row see the same x."""
    generator = torch.Generator().manual_seed(tokens)
    inputs = [torch.randn(tokens, inner, generator=generator) for _ in range(8)]
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.inference_mode():
        for name, arm in arms.items():
            for x in inputs[:2] if name in ("peft_arrow", "article_loop") else inputs:
                arm(x)
            start = time.perf_counter()
            arm(inputs[0])
            repeats[name] = max(1, min(50, int(_FEW / max(time.perf_counter() - start, 1e-6))))
        for turn in range(rounds):
            for name, arm in arms.items():
                start = time.perf_counter()
                for place in range(repeats[name]):
                    arm(inputs[(turn + place) % len(inputs)])
                times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: median(values) for name, values in times.items()}


def _metrics(config: RoutingCostRun, rows: Sequence[Mapping[str, int | float]]) -> dict[str, Metric]:
    """The ratios at the judged shape with most threads."""
    judged = config.judged.model_dump()

    def at(arm: str, adapters: int, tokens: int) -> float:
        for row in rows:
            here = (row["adapters"], row["tokens"], row["threads"]) == (adapters, tokens, max(config.threads))
            if here and all(row[key] == value for key, value in judged.items()):
                return float(row.get(arm, "nan"))
        return float("nan")

    def ratio(one: tuple[str, int, int], two: tuple[str, int, int]) -> float:
        return at(*one) / at(*two)

    fewest = min(config.adapters)
    growth = max(ratio(("treadle", 1024, t), ("treadle", fewest, t)) for t in config.tokens)
    return {
        "single_lora_ratio_n1024_t128": Metric.against(
            ratio(("treadle", 1024, 128), ("lora", 1024, 128)), "1", at_most=1.25
        ),
        "single_lora_ratio_n1024_t1": Metric.against(ratio(("treadle", 1024, 1), ("lora", 1024, 1)), "1", at_most=1.6),
        "arrow_speedup_n256_t128": Metric.against(
            ratio(("peft_arrow", 256, 128), ("treadle", 256, 128)), "1", at_least=30.0
        ),
        "arrow_speedup_n1024_t128": Metric.against(
            ratio(("peft_arrow", 1024, 128), ("treadle", 1024, 128)), "1", at_least=60.0
        ),
        "growth_n8_n1024": Metric.against(growth, "1", at_most=1.5),
    }
