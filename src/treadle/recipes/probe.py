"""A probe: what this client can do, measured on made-up rows, and what a federation had better ask of it.

It opens neither the silo's rows nor its ledger, so that nothing private can be in what it says.

rows        of random tokens, all as long as a row may be: the most that a row can cost
micro-batch doubled until memory or the batch ends, or it no longer helps; the one with the least time a row
rank        the largest whose B crosses within a tenth of a round; fixed where there is a family
steps       as many as a round has time for
"""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treadle.configs.federate import FederateRun, SiloRun
from treadle.errors import ConfigError, InputError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes, trainable_factors
from treadle.family.plan import RankPlan
from treadle.models.loading import load_model
from treadle.models.positions import positions_of
from treadle.privacy.noise import SeededRandomness, SystemRandomness, noised
from treadle.privacy.plan import PrivacySettings
from treadle.progress import Progress, silent
from treadle.recipes.bases import loaded_base
from treadle.recipes.footprint import forget_peak, peak_bytes
from treadle.train.federated.bandwidth import Transfer, on_this_machine, to_superlink
from treadle.train.objectives import Kind, kind_of
from treadle.train.private import private_steps
from treadle.train.rows import Row
from treadle.train.settings import PrivateSettings

RANKS = (4, 8, 16, 32, 64)
MOST_LOCAL_STEPS = 10
"""More of them let clients drift apart between two averages; a pilot may show that it does no harm."""

_ANSWER, _BATCH, _LENGTH = 8, 32, 128
_CROSSING, _MARGIN, _LEAST_DEADLINE = 0.1, 3.0, 10.0
_REPEATS = 2
_GAIN = 0.95
"""Time a row, as a share of what it was, above which two doublings were for nothing."""


@dataclass(frozen=True)
class Measured:
    """Private steps of one rank and micro-batch.

    Attributes:
        rank: of the modules, their mean where a plan's ranks differ.
        micro_batch: rows in one forward pass.
        row_seconds: for the clipped gradient of one row.
        peak: bytes that the process (on a GPU: torch) held at most.
    """

    rank: float
    micro_batch: int
    row_seconds: float
    peak: int


@dataclass(frozen=True)
class Proposal:
    """What a federation had better ask of this client.

    Attributes:
        rank: of all modules; the family's mean where there is a family.
        rank_is_given: whether a family fixes it.
        micro_batch: rows in one forward pass.
        local_steps: private steps a round.
        deadline: seconds for a round: three times what it is expected to take.
    """

    rank: float
    rank_is_given: bool
    micro_batch: int
    local_steps: int
    deadline: float


@dataclass(frozen=True)
class Probed:
    """What a probe found; none of it hangs on the silo's rows.

    Attributes:
        base: the base model's label.
        device: of the client.
        tokens: of a row.
        expected_batch: rows of a step.
        memory_limit: bytes that the proposal stays within.
        measured: the micro-batches, then the ranks.
        transfer: how fast bytes go, and on which way.
        step_seconds: of one private step as proposed, noise included.
        noise_seconds: of its noise alone.
        round_bytes: of B, up and down together.
        round_seconds: that a round as proposed is expected to take.
        proposal: what follows.
        asked: seconds that the run's own local steps are expected to take in a round; None without a run.
        asked_fits: whether that is within the run's own time-out.
    """

    base: str
    device: str
    tokens: int
    expected_batch: int
    memory_limit: int
    measured: tuple[Measured, ...]
    transfer: Transfer
    step_seconds: float
    noise_seconds: float
    round_bytes: int
    round_seconds: float
    proposal: Proposal
    asked: float | None
    asked_fits: bool | None


@dataclass(frozen=True)
class _Subject:
    """What is measured."""

    model: PreTrainedModel
    base: str
    plan: RankPlan | None
    tokens: int
    expected_batch: int
    memory_limit: int

    @property
    def ranks(self) -> list[int]:
        """Those to choose among: none where a family fixes them, and none that a module has no room for."""
        shapes = linear_shapes(self.model).values()
        room = min((min(shape.in_features, shape.out_features) for shape in shapes), default=0)
        return [] if self.plan else [rank for rank in RANKS if rank <= room]

    def planned(self, rank: int) -> RankPlan:
        """The family's plan, or one rank for all."""
        return self.plan or RankPlan.uniform(linear_shapes(self.model), rank=rank)


def probe(
    silo: SiloRun,
    run: FederateRun | None = None,
    *,
    round_seconds: float = 60.0,
    memory: int | None = None,
    progress: Progress = silent,
) -> Probed:
    """What this client measured, and what it proposes.

    Args:
        silo: its configuration; of it only device, base, family and the way to the server are used.
        run: of the federation, if it is written already: gives family, batch and length of rows.
        round_seconds: that a round may take this client, above 0.
        memory: bytes that it may hold; None for four fifths of what is free now.
        progress: told of everything.

    Raises:
        ConfigError: neither a family nor a base is named, or a limit is out of its range.
        InputError: they cannot be used, or not even one row fits into the memory.
        UnavailableError: the server does not answer.
    """
    if round_seconds <= 0 or (memory is not None and memory <= 0):
        raise ConfigError("a limit is not above 0", where="probe", remedy="give seconds and bytes above 0")
    subject = _opened(silo, run, memory, progress)
    micro = _micro_batches(subject, progress)
    best = min(micro, key=lambda row: row.row_seconds)
    progress("the way to the server", 0, 0)
    node = silo.supernode
    transfer = on_this_machine() if node is None else to_superlink(node.superlink, node.root_certificates)
    ranks: list[Measured] = []
    plan = subject.planned(RANKS[0])
    for rank in subject.ranks:
        wider = subject.planned(rank)
        if 2 * _bytes_of(wider) / transfer.bytes_per_second > _CROSSING * round_seconds:
            break
        progress(f"rank {rank}", 0, 0)
        measured = _measured(subject, wider, best.micro_batch)
        if measured.peak > subject.memory_limit:
            break
        ranks.append(measured)
        plan, best = wider, measured
    return _proposed(subject, plan, best, transfer, (*micro, *ranks), run, round_seconds)


def _opened(silo: SiloRun, run: FederateRun | None, memory: int | None, progress: Progress) -> _Subject:
    folder = run.family if run is not None else silo.family
    if folder is not None:
        family = AdapterFamily.load(folder)
        model, _ = loaded_base(family.base, silo.base, device=silo.device, progress=progress)
        base, plan = family.base.name, family.plan
    elif silo.base is not None:
        model, base, plan = load_model(silo.base, device=silo.device), Path(silo.base).name, None
    else:
        raise ConfigError("neither a family nor a base is named", where="probe", remedy="name RUN.toml or the base")
    kind_of(model)
    tokens = _LENGTH if run is None else run.work.max_length
    tokens = min(tokens, positions_of(model) or tokens)
    limit = memory if memory is not None else peak_of_now(model.device) + int(0.8 * free_bytes(model.device))
    return _Subject(model, base, plan, tokens, _BATCH if run is None else run.work.expected_batch, limit)


def peak_of_now(device: torch.device) -> int:
    """What is held now, as a peak that has just begun."""
    forget_peak(device)
    return peak_bytes(device)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; of a machine, what its kernel could hand out without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = Path("/proc/meminfo")
    for line in known.read_text().splitlines() if known.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _micro_batches(subject: _Subject, progress: Progress) -> list[Measured]:
    """Micro-batches of 1, 2, 4, … rows, as far as memory and batch reach and it helps.

    Raises:
        InputError: not even one row fits.
    """
    plan, found, size = subject.planned(RANKS[0]), list[Measured](), 1
    held = peak_of_now(subject.model.device)
    while size <= subject.expected_batch:
        progress(f"micro-batch {size}", 0, 0)
        row = _measured(subject, plan, size)
        if row.peak > subject.memory_limit:
            break
        found.append(row)
        if row.peak + (row.peak - held) > subject.memory_limit:  # the next one is twice as large
            break
        if len(found) > 2 and min(later.row_seconds for later in found[-2:]) > _GAIN * found[-3].row_seconds:
            break
        size *= 2
    if not found:
        raise InputError(
            f"not even one row of {subject.tokens} tokens fits into {subject.memory_limit:,} bytes",
            remedy="allow more memory, shorter rows or a smaller base",
        )
    return found


def _measured(subject: _Subject, plan: RankPlan, micro_batch: int) -> Measured:
    """Private steps of one micro-batch; the first of them warms up."""
    model, rows = subject.model, [_row(subject, place) for place in range(micro_batch)]
    # Every row is drawn, and no noise: that is measured by itself, since it does not grow with the batch.
    settings = PrivacySettings(
        math.inf, 1e-9, micro_batch, micro_batch, rounds=1 + _REPEATS, local_steps=1, max_grad_norm=1.0
    )
    mechanism = settings.plan().mechanism(micro_batch, SeededRandomness(0))
    work = PrivateSettings(learning_rate=1e-3, micro_batch=micro_batch, max_length=subject.tokens)
    lora_A, lora_B = _factors(plan)
    forget_peak(model.device)
    with trainable_factors(model, lora_A, lora_B, train_A=(), train_B=lora_B) as (_, moving):
        private_steps(model, moving, rows, mechanism, work, steps=1)
        begun = time.perf_counter()
        private_steps(model, moving, rows, mechanism, work, steps=_REPEATS)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds = time.perf_counter() - begun
    return Measured(_mean_rank(plan), micro_batch, seconds / (_REPEATS * micro_batch), peak_bytes(model.device))


def _row(subject: _Subject, place: int) -> Row:
    """Random tokens, as many as a row may have."""
    kind, draw = kind_of(subject.model), torch.Generator().manual_seed(place)
    vocabulary = subject.model.config.get_text_config().vocab_size
    tokens = tuple(torch.randint(0, vocabulary, (subject.tokens,), generator=draw).tolist())
    if kind is Kind.CLASSIFIER:
        return Row(tokens, (0,))
    answer = min(_ANSWER, max(1, subject.tokens // 2))
    prompt = tokens[:-answer] if kind is Kind.CAUSAL else tokens
    return Row(prompt or tokens[:1], tokens[-answer:])


def _factors(plan: RankPlan) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    lora_A = {
        name: torch.randn(row.rank, row.in_features, generator=draw) * row.in_features**-0.5
        for name, row in plan.modules.items()
    }
    return lora_A, {name: torch.zeros(row.out_features, row.rank) for name, row in plan.modules.items()}


def _mean_rank(plan: RankPlan) -> float:
    return sum(row.rank for row in plan.modules.values()) / len(plan.modules)


def _bytes_of(plan: RankPlan) -> int:
    """B in float32."""
    return 4 * plan.count().lora_B


def _noise_seconds(plan: RankPlan) -> float:
    """What drawing a step's noise takes, by the generator that production uses."""
    total = torch.zeros(plan.count().lora_B, dtype=torch.float64)
    noised(total[:2], 1.0, SystemRandomness())
    begun = time.perf_counter()
    noised(total, 1.0, SystemRandomness())
    return time.perf_counter() - begun


def _proposed(
    subject: _Subject,
    plan: RankPlan,
    best: Measured,
    transfer: Transfer,
    measured: tuple[Measured, ...],
    run: FederateRun | None,
    round_seconds: float,
) -> Probed:
    noise = _noise_seconds(plan)
    step = subject.expected_batch * best.row_seconds + noise
    crossing = 2 * transfer.seconds(_bytes_of(plan))
    steps = min(MOST_LOCAL_STEPS, max(1, math.floor((round_seconds - crossing) / step)))
    expected = steps * step + crossing
    asked = None if run is None else run.work.local_steps * step + crossing
    return Probed(
        base=subject.base,
        device=str(subject.model.device),
        tokens=subject.tokens,
        expected_batch=subject.expected_batch,
        memory_limit=subject.memory_limit,
        measured=measured,
        transfer=transfer,
        step_seconds=step,
        noise_seconds=noise,
        round_bytes=2 * _bytes_of(plan),
        round_seconds=expected,
        proposal=Proposal(
            rank=best.rank,
            rank_is_given=subject.plan is not None,
            micro_batch=best.micro_batch,
            local_steps=steps,
            deadline=max(_LEAST_DEADLINE, float(math.ceil(_MARGIN * expected))),
        ),
        asked=asked,
        asked_fits=None if run is None or asked is None else asked <= run.rules.timeout,
    )
