"""`dp-step-cost`: a private step of B beside the plain one and beside Opacus, in seconds and in memory.

for each base: every arm does one whole step a round, in turn, on the same batch; medians of rounds
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle import randomness
from treadle.configs.bench.federated import DpStepCostRun
from treadle.errors import UnavailableError
from treadle.family.injection import linear_shapes, trainable
from treadle.models.loading import load_model
from treadle.privacy.noise import SystemRandomness
from treadle.privacy.plan import PrivacySettings
from treadle.progress import Progress, silent
from treadle.recipes.bench.classification import trained_base
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.recipes.footprint import forget_peak, peak_bytes
from treadle.train.objectives import Kind, kind_of, summed_loss
from treadle.train.private import private_steps
from treadle.train.rows import Row
from treadle.train.settings import PrivateSettings

NAME = "dp-step-cost"
_SETTINGS = PrivateSettings(learning_rate=1e-3, micro_batch=2**20)  # the whole batch in one forward pass
_ROUNDS = 1000  # more than any run does; the plan pays for them

Arm = Callable[[], None]


def dp_step_cost(
    config: DpStepCostRun, *, work: Path, quick: bool = False, progress: Progress = silent
) -> BenchmarkResult:
    """Medians of seconds and the peak of memory, an arm a column; `quick` measures one base in three rounds.

    Raises:
        UnavailableError: Opacus or dp-accounting is not installed, or a base is not there.
    """
    rows: list[dict[str, object]] = []
    for base in [config.quick_base] if quick else config.bases:
        folder = trained_base(base, work, name="two-classes", labels=("no", "yes"), seed=config.seed)
        progress(f"{base}: warming up", 0, 0)
        with _arms(folder, config) as arms:
            peaks = {f"{name}_peak_bytes": _peak(arm) for name, arm in arms.items()}
            rows.append({"base": base, **_seconds(arms, 3 if quick else config.rounds, base, progress), **peaks})
        gc.collect()
    settings = config.model_dump(mode="json") | {"quick": quick}
    result = BenchmarkResult(NAME, device_name(), commit(), settings, _metrics(rows), rows)
    return result.undecided() if quick else result


@contextlib.contextmanager
def _arms(folder: Path, config: DpStepCostRun) -> Iterator[dict[str, Arm]]:
    """Arm → one step of it. Ours share a model; Opacus keeps its hooks in place, so each of its arms has one."""
    try:
        from treadle.recipes.bench.opacus_peers import Step, opacus_ghost, opacus_hooks
    except ImportError as error:
        raise UnavailableError("Opacus is not installed", remedy="pip install 'treadle[dev]'") from error
    model = load_model(str(folder), device="cpu")
    rows, shapes = _rows(kind_of(model), model.config.get_text_config().vocab_size, config), linear_shapes(model)
    lora_A = {
        name: torch.from_numpy(randomness.uniform(config.seed, name, (config.rank, shape.in_features))).float()
        / shape.in_features**0.5
        for name, shape in shapes.items()
    }
    plan = PrivacySettings(
        8.0, 1e-5, config.batch, config.batch, rounds=_ROUNDS, local_steps=1, accountant="rdp"
    ).plan()
    mechanism = plan.mechanism(len(rows), SystemRandomness())
    settings = replace(_SETTINGS, max_length=config.tokens)
    step = Step(
        lambda peer: _losses(peer, kind_of(model), rows),
        config.batch,
        _SETTINGS.learning_rate,
        plan.settings.max_grad_norm,
        plan.noise_multiplier,
    )
    theirs = {
        name: peer(load_model(str(folder), device="cpu"), list(shapes), config.rank, step)
        for name, peer in {"opacus_hooks": opacus_hooks, "opacus_ghost": opacus_ghost}.items()
    }
    with trainable(model, lora_A, shapes) as lora_B:
        optimizer = torch.optim.SGD(lora_B.values(), lr=_SETTINGS.learning_rate)

        def plain() -> None:
            optimizer.zero_grad()
            (summed_loss(model, [(row.prompt, row.target) for row in rows]) / len(rows)).backward()
            optimizer.step()

        def private() -> None:
            private_steps(model, lora_B, rows, mechanism, settings, steps=1)

        yield {"plain": plain, "private": private, **theirs}


def _rows(kind: Kind, vocabulary: int, config: DpStepCostRun) -> list[Row]:
    """Random rows of one length: a class each, or the last token to predict."""
    drawn = (randomness.uniform(config.seed, "rows", (config.batch, config.tokens)) * vocabulary).astype(int).tolist()
    if kind is Kind.CLASSIFIER:
        return [Row(tuple(row), (place % 2,)) for place, row in enumerate(drawn)]
    return [Row(tuple(row[:-1]), (row[-1],)) for row in drawn]


def _losses(model: nn.Module, kind: Kind, rows: Sequence[Row]) -> Float[Tensor, " examples"]:
    """What `summed_loss` adds up, for a model that Opacus wraps."""
    targets = torch.tensor([row.target[0] for row in rows])
    if kind is Kind.CLASSIFIER:
        tokens = torch.tensor([row.prompt for row in rows])
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    else:
        tokens = torch.tensor([row.prompt + row.target for row in rows])
        mask = torch.ones_like(tokens)
        positions = mask.cumsum(1) - 1
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, logits_to_keep=2, use_cache=False
        ).logits[:, 0]
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def _peak(arm: Arm) -> float | None:
    """The most resident bytes during a step beyond those before it; None where the kernel does not tell."""
    arm()  # the first one allocates what stays
    device = torch.device("cpu")
    if not forget_peak(device):
        return None
    before = peak_bytes(device)
    arm()
    return float(peak_bytes(device) - before)


def _seconds(arms: Mapping[str, Arm], rounds: int, base: str, progress: Progress) -> dict[str, float]:
    """Arm → median seconds of a step; arms take turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            times[name].append(time.perf_counter() - start)
        progress(f"{base}: rounds", turn + 1, rounds)
    return {name: median(values) for name, values in times.items()}


def _metrics(rows: Sequence[Mapping[str, object]]) -> dict[str, Metric]:
    """The worst of the bases."""

    def ratios(above: str, below: str) -> list[float]:
        return [float(row[above]) / float(row[below]) for row in rows]  # type: ignore[arg-type]

    return {
        "private_over_plain": Metric.against(max(ratios("private", "plain")), "1", at_most=1.05),
        "opacus_ghost_over_ours": Metric.against(min(ratios("opacus_ghost", "private")), "1", at_least=1.4),
        "opacus_hooks_over_ours": Metric.against(min(ratios("opacus_hooks", "private")), "1", at_least=1.0),
    }
