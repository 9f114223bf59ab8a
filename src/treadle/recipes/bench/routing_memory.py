"""`routing-memory`: what a process holds at most while it serves a large fleet of a real model from disk.

a bank of random adapters is written to disk
a process of its own opens it, answers requests that go to many adapters, and says the most that it held
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from treadle.configs.bench.routing_cost import RoutingMemoryRun
from treadle.data.public_text import public_texts
from treadle.errors import UnavailableError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.recipes.bench.routing_model_cost import random_bank
from treadle.recipes.footprint import peak_bytes
from treadle.routing.bank_files import METADATA, load_bank, save_bank
from treadle.routing.routed import RoutedModel

NAME = "routing-memory"


def routing_memory(
    config: RoutingMemoryRun, *, work: Path, quick: bool = False, progress: Progress = silent
) -> BenchmarkResult:
    """The peak of resident memory, model included, after requests that each go to an adapter drawn at random."""
    adapters = min(config.adapters, 50) if quick else config.adapters
    requests = min(config.requests, 50) if quick else config.requests
    folder = work / f"bank-{adapters}"
    if not (folder / METADATA).exists():
        progress(f"writing {adapters} adapters", 0, 0)
        model, tokenizer = load_model(config.base, device="cpu"), load_tokenizer(config.base)
        plan = RankPlan.uniform(linear_shapes(model), rank=config.rank)
        family = AdapterFamily.create(base=config.base, plan=plan, seed=config.seed)
        save_bank(random_bank(family, adapters, model, tokenizer, size=0.01, seed=config.seed), folder)
    progress(f"{requests} requests", 0, 0)
    told = [str(folder), config.base, str(requests), str(config.memory), str(config.seed)]
    served = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import serve; serve()", *told],
        capture_output=True,
        text=True,
        check=False,
    )
    if served.returncode != 0:
        raise UnavailableError(
            f"the serving process failed: {served.stderr.strip()[-200:]}", remedy="look at its memory and disk"
        )
    row: dict[str, float] = json.loads(served.stdout.splitlines()[-1])
    peak = Metric.against(float(row["peak_resident"]), "bytes", at_most=2e9)
    metrics = {
        "peak_resident": peak.undecided() if quick else peak,
        "adapters_used": Metric(float(row["adapters_used"]), "adapters"),
        "seconds_per_request": Metric(row["seconds"] / requests, "s"),
    }
    settings = config.model_dump(mode="json") | {"quick": quick}
    return BenchmarkResult(NAME, device_name(), commit(), settings, metrics, [row])


def serve() -> None:
    """What the process does that is measured; its last line is a JSON object."""
    folder, base, requests, memory, seed = sys.argv[1:]
    model, tokenizer = load_model(base, device="cpu"), load_tokenizer(base)
    bank = load_bank(Path(folder))
    routed = RoutedModel(
        model, bank, granularity="sequence", abstain=1.0, memory=int(memory)
    )  # random ones act all the same
    generator = torch.Generator().manual_seed(int(seed))
    texts = public_texts("pydoc", limit=int(requests), words=6, seed=int(seed)).passages
    start, used = time.perf_counter(), set[int]()
    with torch.inference_mode():
        for turn in range(int(requests)):
            place = int(torch.randint(len(bank.names), (1,), generator=generator))
            ids = tokenizer(texts[turn % len(texts)], return_tensors="pt")["input_ids"][:, :8]
            permitted = [{bank.names[place]}]
            chosen = routed.choose(ids, permitted=permitted)
            used.add(int(chosen.winner))
            routed(ids, permitted=permitted, chosen=chosen)
    row = {
        "adapters": len(bank.names),
        "requests": int(requests),
        "adapters_used": len(used),
        "seconds": time.perf_counter() - start,
        "peak_resident": peak_bytes(torch.device("cpu")),
    }
    print(json.dumps(row))  # noqa: T201
