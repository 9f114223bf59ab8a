"""`routing-exactness`: does the routed argmax equal a float64 brute force, on trained and on random adapters?

The routed model runs over text; what entered each layer is recorded beside it. For every (token, layer) the reference
takes those inputs and the stored A and B, computes every ‖B_i A x‖ in float64, and its z-score. A decision is wrong if
the model's winner scores lower than the reference's best by more than the declared tie.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.configs.bench.routing_cost import RandomBanks, RoutingExactnessRun
from treadle.data.public_text import public_texts
from treadle.family.injection import Attachment, Delta, adapted_layers
from treadle.progress import Progress, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.recipes.bench.routing_cost import routed_layer
from treadle.recipes.fleet import grow_fleet
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import text_batches
from treadle.routing.decision import BASE, TIE
from treadle.routing.factors import LayerFactors
from treadle.routing.layer import Composition
from treadle.routing.routed import RoutedModel
from treadle.routing.trace import Trace


def routing_exactness(
    config: RoutingExactnessRun, *, work: Path, quick: bool = False, progress: Progress = silent
) -> BenchmarkResult:
    """The figures on a fleet trained on the spot; `quick` makes at least 100,000 decisions of each kind."""
    fleet = grow_fleet(config.fleet.model_copy(update={"out": work / "fleet"}), progress)
    wanted = config.quick_decisions if quick else config.decisions
    rows = [
        _compare(fleet.bank, model, fleet.tokenizer, scorer, _Amount(str(model.dtype), wanted, progress))
        for model in (fleet.model, deepcopy(fleet.model).bfloat16())
        for scorer in ("seqr", "norm")
    ]
    rows += _random_rows(config.random, quick=quick, progress=progress)
    decisions, wrong = (sum(int(row[key]) for row in rows) for key in ("decisions", "wrong"))
    rescored = sum(int(row["rescored"]) for row in rows) / decisions
    metrics = {
        "decisions": Metric.against(float(decisions), "decisions", at_least=float(config.quick_decisions)),
        "wrong_decisions": Metric.against(float(wrong), "decisions", at_most=0.0),
        "rescored_share": Metric(rescored, "1"),
    }
    settings = config.model_dump(mode="json", exclude={"fleet": {"out", "data"}}) | {"quick": quick}
    return BenchmarkResult("routing-exactness", device_name(), commit(), settings, metrics, rows)


class _Amount:
    """How much is compared, and who hears of it."""

    def __init__(self, dtype: str, decisions: int, progress: Progress) -> None:
        self.dtype, self.decisions, self.progress = dtype.removeprefix("torch."), decisions, progress


def _compare(
    bank: AdapterBank, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scorer: str, amount: _Amount
) -> dict[str, int | str | float]:
    """One row: counts for a scorer and a dtype of the model."""
    counts = {"decisions": 0, "wrong": 0, "ties": 0, "rescored": 0}
    routed = RoutedModel(model, bank, scorer=scorer, granularity="token")
    inputs: dict[str, Tensor] = {}
    layers = adapted_layers(model, {module: f.shape for module, f in bank.layers.items()})
    texts = public_texts("pydoc", limit=10_000, seed=17).passages
    try:
        with Attachment(layers, {module: _recorder(inputs, module) for module in layers}), torch.inference_mode():
            for batch in text_batches(tokenizer, texts, tokens=512):
                inputs.clear()
                with routed.trace() as trace:
                    routed(batch["input_ids"], batch["attention_mask"])
                _count(bank.layers, inputs, trace, scorer, counts)
                amount.progress(f"{scorer}, {amount.dtype}", counts["decisions"], amount.decisions)
                if counts["decisions"] >= amount.decisions:
                    break
    finally:
        routed.unwrap()
    return {"scorer": scorer, "dtype": amount.dtype, "adapters": len(bank.names), **counts}


def _random_rows(
    config: RandomBanks, *, quick: bool, progress: Progress = silent
) -> list[dict[str, int | str | float]]:
    """One row a bank of random adapters and dtype of the layer's input."""
    sizes = config.adapters[:-1] if quick and len(config.adapters) > 1 else config.adapters
    tokens = config.decisions // 8 if quick else config.decisions
    cells = [(rank, count, ratio) for rank in config.ranks for count in sizes for ratio in config.conditions]
    rows: list[dict[str, int | str | float]] = []
    for done, (rank, count, ratio) in enumerate(cells):
        progress(f"{count} random adapters of rank {rank}, condition {ratio:g}", done, len(cells))
        draw = torch.Generator().manual_seed(1000 * rank + count)
        A = torch.randn(rank, config.inner, generator=draw) / config.inner**0.5
        Bs = _random_Bs(config.outer, rank, count, ratio, draw)
        norms = torch.linalg.vector_norm(torch.randn(256, rank, generator=draw) @ torch.stack(Bs).mT, dim=2)
        layer = routed_layer(A, Bs, norms.mean(1), norms.std(1))
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, config.inner, generator=draw).to(dtype)
            with torch.inference_mode():
                choice = layer.choose(x, None, Composition(1, 1.0), explained=True)
            assert choice.decision is not None, "an argmax is a decision"
            counts = {"decisions": 0, "wrong": 0, "ties": 0, "rescored": int(choice.decision.rescored.sum())}
            _judge(layer.factors, x, choice.decision.winner, counts, calibrated=True)
            named = {"scorer": "seqr", "dtype": str(dtype).removeprefix("torch."), "adapters": count}
            rows.append({**named, "rank": rank, "condition": ratio, **counts})
    return rows


def _random_Bs(outer: int, rank: int, count: int, ratio: float, draw: torch.Generator) -> list[Tensor]:
    """Random B of one condition number, every eighth next to a twin."""
    values = torch.logspace(0.0, -math.log10(ratio), rank)
    found: list[Tensor] = []
    for place in range(count):
        if place % 8 == 7:
            found.append(found[-1] * (1.0 + 1e-6 * torch.randn(outer, rank, generator=draw)))
            continue
        left = torch.linalg.qr(torch.randn(outer, rank, generator=draw)).Q
        right = torch.linalg.qr(torch.randn(rank, rank, generator=draw)).Q
        found.append(left * values @ right)
    return found


def _recorder(inputs: dict[str, Tensor], module: str) -> Delta:
    def record(x: Tensor) -> None:
        inputs[module] = x.reshape(-1, x.shape[-1])

    return record


def _count(
    layers: Mapping[str, LayerFactors], inputs: Mapping[str, Tensor], trace: Trace, scorer: str, counts: dict[str, int]
) -> None:
    for module, factors in layers.items():
        winner = trace.layers[module][0].winner.flatten()
        _judge(factors, inputs[module], winner, counts, calibrated=scorer == "seqr")
    counts["rescored"] += trace.rescored


def _judge(factors: LayerFactors, x: Tensor, winner: Tensor, counts: dict[str, int], *, calibrated: bool) -> None:
    """Add one layer's decisions to the counts."""
    reference = brute_force(factors, x, calibrated=calibrated)
    best = reference.max(1).values
    slack = TIE * best.abs().clamp_min(1.0)
    got = torch.where(winner == BASE, -torch.inf, reference.gather(1, winner.clamp_min(0)[:, None]).squeeze(1))
    counts["decisions"] += winner.numel()
    counts["wrong"] += int((~(got >= best - slack)).sum())
    counts["ties"] += int(((reference >= (best - slack)[:, None]).sum(1) > 1).sum())


def brute_force(factors: LayerFactors, x: Tensor, *, calibrated: bool) -> Tensor:
    """Every adapter's score for every token in float64, from the stored matrices alone: (tokens, adapters)."""
    columns: list[Tensor] = []
    for adapter in range(factors.present.shape[0]):
        group = factors.group_of(adapter)
        if group is None:
            columns.append(torch.full((x.shape[0],), -torch.inf, dtype=torch.float64))
            continue
        update = factors.folded_B(adapter).double() @ group.A.double()
        norm = torch.linalg.vector_norm(x.double() @ update.T, dim=1)
        if calibrated:
            score = (norm - factors.mean[adapter].double()) / factors.std[adapter].double()
            norm = score if bool(factors.eligible[adapter]) else torch.full_like(score, -torch.inf)
        columns.append(norm)
    return torch.stack(columns, 1)
