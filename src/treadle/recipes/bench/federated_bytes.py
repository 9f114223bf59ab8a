"""`federated-bytes`: what a round sends when A is frozen, against sending both factors.

a family over a real model's layers, silos that answer at once
rounds by ffa and by fedit, every message passed as the bytes that Flower would send
bytes up and down from the second round on, the start-up transfer of A and plan apart
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from treadle.configs.bench.federated import FederatedBytesRun
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import load_model
from treadle.progress import Progress, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.train.federated.checkpoint import RunFolder, facts_of
from treadle.train.federated.client import LocalResult, Silo
from treadle.train.federated.factors import key_of_A
from treadle.train.federated.federation import Federation
from treadle.train.federated.messages import Order
from treadle.train.federated.run import federate, in_process_grid
from treadle.train.federated.settings import LocalWork, RoundRules
from treadle.train.federated.standing import RoundReport
from treadle.train.federated.variants import VariantSettings

NAME = "federated-bytes"
_TOLERANCE = 0.01  # heads of messages and arrays, which do not grow with ranks


def federated_bytes(
    config: FederatedBytesRun, *, work: Path, quick: bool = False, progress: Progress = silent
) -> BenchmarkResult:
    """Bytes of ffa over bytes of fedit, up and down together, beside what the shapes alone say."""
    rounds = 2 if quick else config.rounds
    shapes = linear_shapes(load_model(config.base, device="cpu"))
    plan = RankPlan.uniform(shapes, rank=config.rank)
    family = AdapterFamily.create(base=config.base, plan=plan, seed=config.seed)
    sent = list[tuple[str, int, int, int]]()
    for variant in ("ffa", "fedit"):
        progress(f"{rounds} rounds of {variant}", 0, 0)
        reports = _reports(family, variant, config.model_copy(update={"rounds": rounds}), work / variant)
        sent.append((variant, *_totals(reports)))
    count = plan.count()
    expected = count.lora_B / (count.lora_A + count.lora_B)
    whole = {variant: down + up for variant, down, up, _ in sent}
    ratio = whole["ffa"] / whole["fedit"]
    metrics = {
        "ffa_over_fedit": Metric(ratio, "1", f"{expected:.3f} ± {_TOLERANCE:g}", abs(ratio - expected) <= _TOLERANCE),
        "family_bytes": Metric(sent[0][3] / config.clients, "bytes"),
    }
    rows = [{"variant": variant, "down": down, "up": up, "family": once} for variant, down, up, once in sent]
    settings = {"base": config.base, "rank": config.rank, "clients": config.clients, "rounds": rounds}
    return BenchmarkResult(NAME, device_name(), commit(), {**settings, "expected": expected}, metrics, rows)


def _reports(family: AdapterFamily, variant: str, config: FederatedBytesRun, folder: Path) -> list[RoundReport]:
    """Every round's report, from silos that change what they get and train nothing."""
    names = tuple(f"silo-{number}" for number in range(1, config.clients + 1))
    work = LocalWork(rounds=config.rounds, expected_batch=1, learning_rate=1.0)
    kind = VariantSettings(variant).variant(list(family.plan.modules), rounds=config.rounds)
    federation = Federation(family, kind, work, RoundRules(names))
    silos = [Silo(name, folder / name, _answer) for name in names]
    reports = list[RoundReport]()
    federate(federation, in_process_grid(silos), RunFolder(folder / "run", facts_of(federation)), reports.append)
    return reports


def _answer(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
    generator = torch.Generator().manual_seed(order.server_round)
    known: Mapping[str, Tensor] = {
        **factors.lora_B,
        **{key_of_A(name): A for name, A in factors.lora_A.items()},
    }
    moved = {name: known[name] + 1e-3 * torch.randn(known[name].shape, generator=generator) for name in order.trained}
    return LocalResult(moved, "CAUSAL_LM", transposed=False, epsilon=None, delta=None)


def _totals(reports: list[RoundReport]) -> tuple[int, int, int]:
    """Bytes down, up, and of the family.

    The first round is no measure of the others: its B is zero, and Flower sends equal arrays once.
    """
    clients = [row for report in reports if report.server_round > 1 for row in report.clients]
    return (
        sum(row.down for row in clients),
        sum(row.up for row in clients),
        max(report.family_bytes for report in reports),
    )
