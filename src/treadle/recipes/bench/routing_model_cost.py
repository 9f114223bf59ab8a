"""`routing-model-cost`: prefill and decoding of a real model with a routed fleet, beside one unmerged PEFT adapter.

for each number of adapters and granularity: prompts in turn with PEFT's model, medians over prompts and rounds
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.configs.bench.routing_cost import RoutingModelCostRun
from treadle.data.public_text import public_texts
from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.recipes.bench.peers import single_lora_model
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import PublicCalibration
from treadle.routing.routed import Granularity, RoutedModel

NAME = "routing-model-cost"


def routing_model_cost(
    config: RoutingModelCostRun, *, quick: bool = False, progress: Progress = silent
) -> BenchmarkResult:
    """Seconds of prefill and of a decoding step, and their ratios to a single adapter's."""
    counts = [config.adapters[0], config.judged] if quick else config.adapters
    rounds = 2 if quick else config.rounds
    model, tokenizer = load_model(config.base, device="cpu"), load_tokenizer(config.base)
    plan = RankPlan.uniform(linear_shapes(model), rank=config.rank)
    family = AdapterFamily.create(base=config.base, plan=plan, seed=config.seed)
    prompts = _prompts(tokenizer, config)
    peer = single_lora_model(load_model(config.base, device="cpu"), config.rank)
    rows: list[dict[str, object]] = []
    for done, count in enumerate(counts):
        progress(f"{count} adapters", done, len(counts))
        bank = random_bank(family, count, model, tokenizer, size=config.size, seed=config.seed)
        for granularity in config.granularities:
            # Random adapters know nothing: let them act all the same, after the look that the default takes.
            routed = RoutedModel(model, bank, granularity=granularity, abstain=0.999, memory=config.memory)
            try:
                rows.append(_row(count, granularity, routed, peer, prompts, rounds))
            finally:
                routed.unwrap()
        del bank
        gc.collect()
    metrics = _metrics(config, rows)
    if quick:
        metrics = {name: metric.undecided() for name, metric in metrics.items()}
    return BenchmarkResult(
        NAME, device_name(), commit(), config.model_dump(mode="json") | {"quick": quick}, metrics, rows
    )


def _prompts(tokenizer: PreTrainedTokenizerBase, config: RoutingModelCostRun) -> list[Tensor]:
    """Prompts of the same length, from public text."""
    texts = public_texts("pydoc", limit=4 * config.prompts, words=2 * config.tokens, seed=config.seed).passages
    ids = [tokenizer(text, return_tensors="pt")["input_ids"][:, : config.tokens] for text in texts]
    return [row for row in ids if row.shape[1] == config.tokens][: config.prompts]


def random_bank(
    family: AdapterFamily,
    count: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    size: float,
    seed: int,
) -> AdapterBank:
    """Random adapters, entries of deviation `size`, calibrated on public prompts, so that many of them are chosen."""
    generator = torch.Generator().manual_seed(seed)
    adapters = [
        Adapter(
            f"a{place}",
            family.plan,
            family.lora_A,
            {
                module: size * torch.randn(row.out_features, row.rank, generator=generator)
                for module, row in family.plan.modules.items()
            },
            family.fingerprint,
            family.base,
            Provenance("random"),
        )
        for place in range(count)
    ]
    calibration = PublicCalibration(public_texts(limit=16, seed=seed + 1).passages, name="pydoc")
    return AdapterBank.build(family, adapters, calibration=calibration, model=model, tokenizer=tokenizer)


@dataclass(frozen=True)
class _Times:
    """Seconds of one prompt: of its prefill, and of one step after it."""

    prefill: float
    decode: float


def _row(
    count: int,
    granularity: Granularity,
    routed: RoutedModel,
    peer: PreTrainedModel,
    prompts: Sequence[Tensor],
    rounds: int,
) -> dict[str, object]:
    ours: list[_Times] = []
    theirs: list[_Times] = []
    with torch.inference_mode():
        for model in (routed, peer):  # the first call allocates
            _timed(model, prompts[0])
        for _ in range(rounds):
            for prompt in prompts:
                theirs.append(_timed(peer, prompt))
                ours.append(_timed(routed, prompt))
    return {
        "adapters": count,
        "granularity": granularity,
        "chosen": len(routed.wins()),
        "prefill": median(t.prefill for t in ours),
        "decode": median(t.decode for t in ours),
        "lora_prefill": median(t.prefill for t in theirs),
        "lora_decode": median(t.decode for t in theirs),
    }


def _timed(model: RoutedModel | PreTrainedModel, prompt: Tensor, steps: int = 4) -> _Times:
    """Prefill of the prompt, then greedy steps; `sequence` chooses once, as part of the prefill."""
    start = time.perf_counter()
    chosen: Mapping[str, object] = {}
    if isinstance(model, RoutedModel) and model.granularity == "sequence":
        chosen = {"chosen": model.choose(prompt)}
    out = model(prompt, use_cache=True, logits_to_keep=1, **chosen)
    prefill = time.perf_counter() - start
    seconds: list[float] = []
    for _ in range(steps):
        start = time.perf_counter()
        token = out.logits[:, -1].argmax(1, keepdim=True)
        out = model(token, use_cache=True, past_key_values=out.past_key_values, logits_to_keep=1, **chosen)
        seconds.append(time.perf_counter() - start)
    return _Times(prefill, median(seconds))


def _metrics(config: RoutingModelCostRun, rows: Sequence[Mapping[str, object]]) -> dict[str, Metric]:
    """The worst granularity at the judged number of adapters."""
    judged = [row for row in rows if row["adapters"] == config.judged]

    def worst(phase: str) -> float:
        return max((float(row[phase]) / float(row[f"lora_{phase}"]) for row in judged), default=float("nan"))  # type: ignore[arg-type]

    return {
        "prefill_ratio_n256": Metric.against(worst("prefill"), "1", at_most=1.2),
        "decode_ratio_n256": Metric.against(worst("decode"), "1", at_most=1.5),
    }
