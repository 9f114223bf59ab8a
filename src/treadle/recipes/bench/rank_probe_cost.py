"""`rank-probe-cost`: what it costs to score every module, exactly, nearly, and by EVA.

for each base: the naive loop on some modules, scaled · the cached probe · projected Jacobians · EVA · training steps
batch by batch of the texts, arms in turn; EVA, which shares out ranks over all texts, once; scores compared by rank

What is compared is the processor's seconds, so that a machine with other work does not tell otherwise: run it with one
thread (`OMP_NUM_THREADS=1`), as threads that wait for one another count too. Every arm is recorded as it ends.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treadle import randomness
from treadle.configs.bench.ranks import RankProbeCostRun
from treadle.family.injection import linear_shapes, trainable
from treadle.family.plan import LayerShape
from treadle.models.loading import load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.ranks.eva import EvaSettings
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.jacobian import JacobianSettings
from treadle.ranks.noise import drawn, noisy, pointed
from treadle.ranks.outputs import disagreement, observer
from treadle.ranks.perturbation import PerturbationSettings
from treadle.ranks.probes import ProbeSettings, probe_scores
from treadle.ranks.stability import spearman
from treadle.recipes.bench.classification import trained_base
from treadle.recipes.bench.result import (
    BenchmarkResult,
    Metric,
    commit,
    device_name,
    finished_runs,
    is_recorded,
    record_run,
)
from treadle.recipes.footprint import forget_peak, peak_bytes
from treadle.train.objectives import Kind, kind_of, summed_loss

NAME = "rank-probe-cost"
_BY_BATCH = ("naive", "prefix", "jacobian", "training")
_STEPS, _ROWS, _TOKENS, _RANK = 500, 16, 64, 8  # of the training that a probe's time is held against

Means = dict[str, float]


def rank_probe_cost(
    config: RankProbeCostRun, *, runs: Path, work: Path, progress: Progress = silent
) -> BenchmarkResult:
    """Seconds, memory and agreement; arms that stand in `runs` are not run again.

    Raises:
        UnavailableError: a base is not there.
    """
    for base in config.bases:
        _measure(base, config, runs, work, progress)
    return summary(config, list(finished_runs(runs)))


def _measure(base: str, config: RankProbeCostRun, runs: Path, work: Path, progress: Progress) -> None:
    """Run and record every arm on every batch that is not recorded, arms in turn."""
    folder = trained_base(base, work, name="two-classes", labels=("no", "yes"), seed=config.seed)
    model, inputs = load_model(str(folder), device="cpu"), _inputs(folder, config)
    turns: list[tuple[str, int | None, Callable[[], Means]]] = []
    for number, ids in enumerate(inputs.batches):
        batch = ProbeInputs((ids,), inputs.text_sha256)
        turns += [(arm, number, run) for arm, run in _arms(model, batch, config, progress).items() if arm != "eva"]
    turns.append(("eva", None, _arms(model, inputs, config, progress)["eva"]))
    for place, (arm, number, run) in enumerate(turns):
        key = {"base": base, "arm": arm, "batch": number}
        if not is_recorded(runs, key):
            progress(f"{base}: {arm}", place, len(turns))
            text = {"text_sha256": inputs.text_sha256, "commit": commit()}
            record_run(runs, {**key, **_measured(run), **text})


def quick_rank_probe_cost(config: RankProbeCostRun, *, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """The same on one base and so little text that nothing is decided."""
    small = config.model_copy(
        update={
            "bases": (config.quick_base,),
            "judged": config.quick_base,
            "sequences": 4,
            "tokens": 16,
            "trials": 2,
            "naive_modules": 6,
            "training_steps": 2,
        }
    )
    return rank_probe_cost(small, runs=work / "quick.jsonl", work=work, progress=progress).undecided()


def _inputs(folder: Path, config: RankProbeCostRun) -> ProbeInputs:
    return ProbeInputs.of_public_text(
        load_tokenizer(str(folder)),
        sequences=config.sequences,
        tokens=config.tokens,
        seed=config.seed,
        batch=config.batch,
    )


def _arms(
    model: PreTrainedModel, inputs: ProbeInputs, config: RankProbeCostRun, progress: Progress
) -> dict[str, Callable[[], Means]]:
    """Arm → what runs it once and returns its scores."""
    shapes = linear_shapes(model)

    # A pooler reads one row a text: too few for EVA to find directions in.
    by_rows = {name: shape for name, shape in shapes.items() if "pooler" not in name}

    def by(settings: ProbeSettings) -> Callable[[], Means]:
        chosen = by_rows if isinstance(settings, EvaSettings) else shapes
        return lambda: probe_scores(
            model, inputs, chosen, settings=settings, seed=config.seed, progress=progress
        ).means()

    shaking = PerturbationSettings(trials=config.trials)
    return {
        "naive": lambda: naive_scores(model, inputs, spread(list(shapes), config.naive_modules), shaking, config.seed),
        "prefix": by(shaking),
        "jacobian": by(JacobianSettings(projections=config.projections)),
        "eva": by(EvaSettings(rank=config.eva_rank)),
        "training": lambda: _train(model, shapes, config),
    }


def spread(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of the names, evenly over their order."""
    count = min(count, len(names))
    return [names[(2 * place + 1) * len(names) // (2 * count)] for place in range(count)]


def naive_scores(
    model: PreTrainedModel, inputs: ProbeInputs, names: Sequence[str], settings: PerturbationSettings, seed: int
) -> Means:
    """The paper's loop as it reads, with the draws of `perturbation`: every forward pass whole."""
    observe = observer(model, settings.output)
    found: Means = {}
    with torch.no_grad():
        for name in names:
            weight, values = model.get_submodule(name).get_parameter("weight"), list[Tensor]()
            for trial in range(settings.trials):
                for ids in inputs.batches:
                    outputs: list[Tensor] = []
                    for copy in (0, 1):
                        shaken = noisy(weight.data, settings.scale, drawn(seed, name, trial, copy))
                        with pointed([weight], [shaken]):
                            outputs.append(observe(ids).flatten(1))
                    values.append(disagreement(outputs[0], outputs[1], settings.metric))
            found[name] = float(torch.cat(values).double().mean())
    return found


def _train(model: PreTrainedModel, shapes: Mapping[str, LayerShape], config: RankProbeCostRun) -> Means:
    """Some steps of B alone, by AdamW, on random rows; there are no scores."""
    lora_A = {
        name: torch.from_numpy(randomness.uniform(config.seed, name, (_RANK, shape.in_features))).float()
        for name, shape in shapes.items()
    }
    vocabulary = model.config.get_text_config().vocab_size
    tokens = (randomness.uniform(config.seed, "rows", (_ROWS, _TOKENS)) * vocabulary).astype(int).tolist()
    cut = _TOKENS if kind_of(model) is Kind.CLASSIFIER else _TOKENS - 1
    rows = [(tuple(row[:cut]), tuple(row[cut:]) or (0,)) for row in tokens]
    with trainable(model, lora_A, shapes) as lora_B:
        optimizer = torch.optim.AdamW(lora_B.values(), lr=1e-4)
        for _ in range(config.training_steps):
            optimizer.zero_grad()
            (summed_loss(model, rows) / len(rows)).backward()
            optimizer.step()
    return {}


def _measured(arm: Callable[[], Means]) -> dict[str, object]:
    """The arm's seconds, the bytes it held beyond those before it (None where the kernel does not tell), its scores."""
    device = torch.device("cpu")
    told = forget_peak(device)
    before, start, begun = peak_bytes(device), time.process_time(), time.perf_counter()
    means = arm()
    seconds, wall = time.process_time() - start, time.perf_counter() - begun
    held = peak_bytes(device) - before if told else None
    return {"seconds": seconds, "wall_seconds": wall, "peak_bytes": held, "means": means}


def summary(config: RankProbeCostRun, runs: Sequence[Mapping[str, object]]) -> BenchmarkResult:
    """The figures of the recorded arms, a row a base."""
    rows = [_row(base, [run for run in runs if run["base"] == base], config) for base in config.bases]
    judged = rows[config.bases.index(config.judged)]

    def figure(name: str) -> float:
        return cast("float", judged[name])

    metrics = {
        "prefix_speedup": Metric.against(figure("prefix_speedup"), "1", at_least=1.7),
        "prefix_difference": Metric.against(figure("prefix_difference"), "logit", at_most=1e-6),
        "jacobian_speedup": Metric.against(figure("jacobian_speedup"), "1", at_least=50.0),
        "jacobian_spearman": Metric.against(figure("jacobian_spearman"), "1", at_least=0.9),
        "jacobian_of_training": Metric.against(figure("jacobian_of_training"), "1", at_most=0.02),
    }
    return BenchmarkResult(NAME, device_name(), commit(), config.model_dump(mode="json"), metrics, rows)


def _row(base: str, runs: Sequence[Mapping[str, object]], config: RankProbeCostRun) -> dict[str, object]:
    """What one base shows: an arm's seconds over all its batches, its mean scores, the most that it held in a batch.

    Of batches the median: the first arm of a process pays what torch sets up once and keeps.

    The naive loop's seconds are scaled from the modules that it ran to all of them.
    """
    arms = {arm: [run for run in runs if run["arm"] == arm] for arm in (*_BY_BATCH, "eva")}
    means = {arm: _mean([cast("Means", run["means"]) for run in own]) for arm, own in arms.items()}
    seconds = {arm: sum(cast("float", run["seconds"]) for run in own) for arm, own in arms.items()}
    held = {
        arm: [cast("int", run["peak_bytes"]) for run in own if run["peak_bytes"] is not None]
        for arm, own in arms.items()
    }
    modules, ran = len(means["prefix"]), len(means["naive"])
    naive = seconds["naive"] * modules / ran
    steps = seconds["training"] * _STEPS / (config.training_steps * len(arms["training"]))
    return {
        "base": base,
        "modules": modules,
        "naive_modules": ran,
        "naive_measured_seconds": seconds["naive"],
        "naive_seconds": naive,
        **{f"{arm}_seconds": seconds[arm] for arm in ("prefix", "jacobian", "eva")},
        "training_seconds": steps,
        **{f"{arm}_peak_bytes": median(own) if own else None for arm, own in held.items()},
        "prefix_speedup": naive / seconds["prefix"],
        "prefix_difference": max(abs(means["prefix"][name] - score) for name, score in means["naive"].items()),
        "jacobian_speedup": naive / seconds["jacobian"],
        "jacobian_speedup_over_prefix": seconds["prefix"] / seconds["jacobian"],
        "jacobian_spearman": spearman(means["jacobian"], means["prefix"]),
        "eva_spearman": spearman(means["eva"], {name: means["prefix"][name] for name in means["eva"]}),
        "jacobian_of_training": seconds["jacobian"] / steps,
        "text_sha256": runs[0]["text_sha256"],
    }


def _mean(batches: Sequence[Means]) -> Means:
    """The mean over batches of as many texts each."""
    return {name: fmean(batch[name] for batch in batches) for name in batches[0]}
