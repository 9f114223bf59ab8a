"""`par-importance-cost`: what importance costs beside plain forward and backward passes over the same samples.

plain:    sum of a batch's losses, backward into A and B, gradients dropped
element:  `measure` of elements, two blocks; rank: of ranks
in turn each round; medians over rounds of the ratio within the round
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from treadle import randomness
from treadle.configs.bench.partition import ParImportanceCostRun
from treadle.family.injection import linear_shapes, trainable_factors
from treadle.models.loading import load_model
from treadle.partition.importance import importance, measure
from treadle.partition.units import Granularity
from treadle.progress import Progress, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.train.attention import quick_attention
from treadle.train.objectives import Pair, mean_losses
from treadle.train.unchanged import eval_mode

NAME = "par-importance-cost"
_QUICK_ROUNDS = 3

Arm = Callable[[], None]


def par_importance_cost(
    config: ParImportanceCostRun, *, quick: bool = False, progress: Progress = silent
) -> BenchmarkResult:
    """Seconds of every arm, a row a round; `quick` passes over one batch.

    Raises:
        UnavailableError: the base is not there.
    """
    model = load_model(config.base, device="cpu")
    samples, rounds = (config.batch, _QUICK_ROUNDS) if quick else (config.samples, config.rounds)
    pairs = _pairs(config, samples, model.config.get_text_config().vocab_size)
    batches = [range(begin, min(begin + config.batch, samples)) for begin in range(0, samples, config.batch)]
    shapes = linear_shapes(model, config.kinds)
    A = {n: _drawn(config, f"{n}/A", (config.rank, s.in_features)) for n, s in shapes.items()}
    B = {n: 0.1 * _drawn(config, f"{n}/B", (s.out_features, config.rank)) for n, s in shapes.items()}

    def loss(numbers: Sequence[int]) -> torch.Tensor:
        return mean_losses(model, [pairs[number] for number in numbers]).sum()

    moving = A if config.moves_A else {}
    with (
        eval_mode(model),
        quick_attention(model, config.prompt_tokens + config.answer_tokens),
        trainable_factors(model, A, B, train_A=moving, train_B=B) as (lora_A, lora_B),
    ):
        factors = [*lora_A.values(), *lora_B.values()]

        def plain() -> None:
            for batch in batches:
                loss(batch).backward()
                for factor in factors:
                    factor.grad = None

        def measured(granularity: Granularity) -> None:
            importance(measure(loss, batches, lora_A=lora_A, lora_B=lora_B, granularity=granularity))

        arms: dict[str, Arm] = {
            "plain": plain,
            "element": lambda: measured("element"),
            "rank": lambda: measured("rank"),
        }
        plain()  # brings pages and kernels in
        rows = _rounds(arms, rounds, progress)
    settings = config.model_dump(mode="json") | {"quick": quick}
    result = BenchmarkResult(NAME, device_name(), commit(), settings, metrics_of(rows), rows)
    return result.undecided() if quick else result


def _pairs(config: ParImportanceCostRun, samples: int, vocabulary: int) -> list[Pair]:
    """Random prompts and answers of one length."""
    size = (samples, config.prompt_tokens + config.answer_tokens)
    drawn = (randomness.uniform(config.seed, "samples", size) * vocabulary).astype(int).tolist()
    return [(tuple(row[: config.prompt_tokens]), tuple(row[config.prompt_tokens :])) for row in drawn]


def _drawn(config: ParImportanceCostRun, name: str, shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(randomness.normal(config.seed, name, shape)).float() / shape[1] ** 0.5


def _rounds(arms: Mapping[str, Arm], rounds: int, progress: Progress) -> list[dict[str, object]]:
    """Seconds of every arm, a row a round; who begins changes from round to round."""
    names, rows = list(arms), list[dict[str, object]]()
    for turn in range(rounds):
        taken: dict[str, float] = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            progress(f"round {turn + 1}: {name}", turn * len(names) + len(taken), rounds * len(names))
            start = time.perf_counter()
            arms[name]()
            taken[name] = time.perf_counter() - start
        rows.append({"round": turn + 1, **{name: taken[name] for name in names}})
    return rows


def metrics_of(rows: Sequence[Mapping[str, object]]) -> dict[str, Metric]:
    """Medians over rounds of what an arm takes, as a multiple of the plain passes of its round."""

    def over_plain(arm: str) -> float:
        return median(float(str(row[arm])) / float(str(row["plain"])) for row in rows)

    return {
        "importance_over_fwdbwd": Metric.against(over_plain("element"), "1", at_most=1.5),
        "rank_importance_over_fwdbwd": Metric.against(over_plain("rank"), "1"),
    }
