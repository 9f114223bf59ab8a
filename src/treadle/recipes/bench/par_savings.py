"""`par-savings`: a step that trains a share of an adapter beside one that trains it all, in bytes and in seconds.

full:   all ranks, torch's AdamW
masks:  all ranks' gradients, MaskedAdamW on a share of the elements
ranks:  a share of the ranks as a smaller adapter, the others acting frozen, torch's AdamW
in turn each round, `steps` steps at a time; medians over rounds of the ratio within the round
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle import randomness
from treadle.configs.bench.partition import ParSavingsRun
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import load_model
from treadle.progress import Progress, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.train.attention import quick_attention
from treadle.train.masked import MaskedAdamW
from treadle.train.objectives import Pair, mean_losses
from treadle.train.stages.acting import Acting, acting, all_ranks
from treadle.train.stages.factors import Factors
from treadle.train.unchanged import eval_mode

NAME = "par-savings"
ARMS = ("full", "masks", "ranks")
_QUICK = {"batch": 2, "steps": 2, "rounds": 3}


def par_savings(config: ParSavingsRun, *, quick: bool = False, progress: Progress = silent) -> BenchmarkResult:
    """Seconds of a step and bytes of gradients and optimiser, a row an arm and round.

    Raises:
        UnavailableError: the base is not there.
    """
    if quick:
        config = config.model_copy(update=_QUICK)
    model = load_model(config.base, device="cpu")
    pairs = _pairs(config, model.config.get_text_config().vocab_size)
    factors = _factors(config, model)
    rows: list[dict[str, object]] = []
    with eval_mode(model), quick_attention(model, config.prompt_tokens + config.answer_tokens):
        for turn in range(config.rounds):
            for place in range(len(ARMS)):
                arm = ARMS[(turn + place) % len(ARMS)]
                progress(f"round {turn + 1}: {arm}", turn * len(ARMS) + place, config.rounds * len(ARMS))
                rows.append({"round": turn + 1, "arm": arm, **_turn(arm, model, factors, pairs, config)})
    settings = config.model_dump(mode="json") | {"quick": quick}
    result = BenchmarkResult(NAME, device_name(), commit(), settings, metrics_of(rows), rows)
    return result.undecided() if quick else result


def _turn(
    arm: str, model: PreTrainedModel, factors: Factors, pairs: Sequence[Pair], config: ParSavingsRun
) -> dict[str, object]:
    """What an arm's steps take, and what is there after them."""
    trained = _some_ranks(factors, config.share) if arm == "ranks" else all_ranks(factors)
    with acting(model, factors, trained) as now:
        moving = [*now.lora_A.values(), *now.lora_B.values()]
        optimizer, parameters = _optimizer(arm, now, config)

        def step() -> None:
            optimizer.zero_grad()
            mean_losses(model, pairs).mean().backward()
            optimizer.step()

        step()  # brings moments in
        start = time.perf_counter()
        for _ in range(config.steps):
            step()
        seconds = (time.perf_counter() - start) / config.steps
        gradients = sum(_bytes(parameter.grad) for parameter in moving)
        return {
            "seconds": seconds,
            "trainable_parameters": parameters,
            "gradient_bytes": gradients,
            "optimizer_bytes": _optimizer_bytes(optimizer),
        }


def _optimizer(arm: str, now: Acting, config: ParSavingsRun) -> tuple[torch.optim.Optimizer, int]:
    """The arm's optimiser, and how many parameters it moves."""
    moving: Mapping[str, nn.Parameter] = {f"{name}/A": A for name, A in now.lora_A.items()} | {
        f"{name}/B": B for name, B in now.lora_B.items()
    }
    if arm != "masks":
        count = sum(parameter.numel() for parameter in moving.values())
        return torch.optim.AdamW(moving.values(), lr=1e-4, fused=True), count
    masks = {
        parameter: torch.from_numpy(randomness.uniform(config.seed, f"mask/{name}", tuple(parameter.shape)))
        < config.share
        for name, parameter in moving.items()
    }
    return MaskedAdamW(moving.values(), masks, lr=1e-4, fused=True), sum(int(mask.sum()) for mask in masks.values())


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Moments, step counts and masks."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(map(_bytes, states)) + sum(
        _bytes(mask) for group in optimizer.param_groups for mask in group.get("masks", ())
    )


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _some_ranks(factors: Factors, share: float) -> dict[str, Tensor]:
    """That share of all ranks, spread evenly over the modules."""
    found: dict[str, Tensor] = {}
    seen = 0
    for name, row in factors.plan.modules.items():
        count = round(share * (seen + row.rank)) - round(share * seen)
        found[name] = torch.arange(row.rank) < count
        seen += row.rank
    return found


def _factors(config: ParSavingsRun, model: PreTrainedModel) -> Factors:
    """An adapter that acts in every rank, as after a warm-up."""
    plan = RankPlan.uniform(linear_shapes(model, config.kinds), rank=config.rank)

    def drawn(name: str, shape: tuple[int, int]) -> Tensor:
        return torch.from_numpy(randomness.normal(config.seed, name, shape)).float() / shape[1] ** 0.5

    A = {name: drawn(f"{name}/A", (row.rank, row.in_features)) for name, row in plan.modules.items()}
    B = {name: 0.1 * drawn(f"{name}/B", (row.out_features, row.rank)) for name, row in plan.modules.items()}
    return Factors(plan, A, B, {}, {}, True)


def _pairs(config: ParSavingsRun, vocabulary: int) -> list[Pair]:
    size = (config.batch, config.prompt_tokens + config.answer_tokens)
    drawn = (randomness.uniform(config.seed, "samples", size) * vocabulary).astype(int).tolist()
    return [(tuple(row[: config.prompt_tokens]), tuple(row[config.prompt_tokens :])) for row in drawn]


def metrics_of(rows: Sequence[Mapping[str, object]]) -> dict[str, Metric]:
    """What each way to train a share takes, as a multiple of training all."""
    rounds = sorted({int(str(row["round"])) for row in rows})
    found = {(int(str(row["round"])), row["arm"]): row for row in rows}

    def over_full(arm: str, quantity: Callable[[Mapping[str, object]], float]) -> float:
        return median(quantity(found[turn, arm]) / quantity(found[turn, "full"]) for turn in rounds)

    def held(row: Mapping[str, object]) -> float:
        return float(str(row["gradient_bytes"])) + float(str(row["optimizer_bytes"]))

    def seconds(row: Mapping[str, object]) -> float:
        return float(str(row["seconds"]))

    return {
        "memory_ratio_at_40": Metric.against(over_full("ranks", held), "1", at_most=0.45),
        "step_time_ratio_at_40": Metric.against(over_full("ranks", seconds), "1", at_most=1.0),
        "masks_memory_ratio_at_40": Metric.against(over_full("masks", held), "1"),
        "masks_step_time_ratio_at_40": Metric.against(over_full("masks", seconds), "1"),
    }
