"""`par-importance-cost`: what importance costs beside plain forward and backward passes over the same samples.

plain:    sum of a batch's losses, backward into A and B, gradients dropped
element:  `measure` of elements, two blocks; rank: of ranks
in turn each round, which is recorded as it ends; medians over rounds of the ratio within the round
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import cast

import torch

from treadle import randomness
from treadle.configs.bench.partition import ParImportanceCostRun
from treadle.family.injection import linear_shapes, trainable_factors
from treadle.models.loading import load_model
from treadle.partition.importance import importance, measure
from treadle.partition.units import Granularity
from treadle.progress import Progress, silent
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name, finished_runs, record_run
from treadle.train.attention import quick_attention
from treadle.train.objectives import Pair, mean_losses
from treadle.train.unchanged import eval_mode

NAME = "par-importance-cost"

Arm = Callable[[], None]


def par_importance_cost(config: ParImportanceCostRun, *, runs: Path, progress: Progress = silent) -> BenchmarkResult:
    """Seconds of every arm, a row a round; rounds that stand in `runs` are not run again.

    Raises:
        UnavailableError: the base is not there.
    """
    done = len(list(finished_runs(runs)))
    if done < config.rounds:
        _measure_rounds(config, range(done, config.rounds), runs, progress)
    return summary(config, list(finished_runs(runs)))


def quick_par_importance_cost(
    config: ParImportanceCostRun, *, work: Path, progress: Progress = silent
) -> BenchmarkResult:
    """The same over one batch, which decides nothing."""
    small = config.model_copy(update={"samples": config.batch, "rounds": 3})
    return par_importance_cost(small, runs=work / "quick.jsonl", progress=progress).undecided()


def _measure_rounds(config: ParImportanceCostRun, rounds: range, runs: Path, progress: Progress) -> None:
    model, samples = load_model(config.base, device="cpu"), config.samples
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
        loss(batches[0]).backward()  # brings pages and kernels in
        for turn in rounds:
            record_run(runs, {"round": turn + 1, **_round(arms, turn, config.rounds, progress), "commit": commit()})


def _pairs(config: ParImportanceCostRun, samples: int, vocabulary: int) -> list[Pair]:
    """Random prompts and answers of one length."""
    size = (samples, config.prompt_tokens + config.answer_tokens)
    drawn = (randomness.uniform(config.seed, "samples", size) * vocabulary).astype(int).tolist()
    return [(tuple(row[: config.prompt_tokens]), tuple(row[config.prompt_tokens :])) for row in drawn]


def _drawn(config: ParImportanceCostRun, name: str, shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(randomness.normal(config.seed, name, shape)).float() / shape[1] ** 0.5


def _round(arms: Mapping[str, Arm], turn: int, rounds: int, progress: Progress) -> dict[str, float]:
    """Seconds of every arm; who begins changes from round to round."""
    names, taken = list(arms), dict[str, float]()
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        progress(f"round {turn + 1}: {name}", turn * len(names) + len(taken), rounds * len(names))
        start = time.perf_counter()
        arms[name]()
        taken[name] = time.perf_counter() - start
    return {name: taken[name] for name in names}


def summary(config: ParImportanceCostRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """Medians over rounds of what an arm takes, as a multiple of the plain passes of its round."""

    def over_plain(arm: str) -> float:
        return median(cast("float", run[arm]) / cast("float", run["plain"]) for run in runs)

    metrics = {
        "importance_over_fwdbwd": Metric.against(over_plain("element"), "1", at_most=1.5),
        "rank_importance_over_fwdbwd": Metric.against(over_plain("rank"), "1"),
    }
    return BenchmarkResult(NAME, device_name(), commit(), config.model_dump(mode="json"), metrics, runs)
