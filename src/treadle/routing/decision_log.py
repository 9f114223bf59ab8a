"""The operator's record of decisions: who was served by which adapter, and never what was asked.

One JSON object a line, appended whole: neither text nor token ids are in it, only counts and names. How many adapters
were kept from the caller stands here and nowhere that the caller can see.
"""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from treadle import files
from treadle.errors import InputError, UnsupportedError
from treadle.routing.access import Permitted
from treadle.routing.policy import Request
from treadle.routing.routed import RoutedModel
from treadle.routing.trace import Trace


@dataclass(frozen=True)
class DecisionEntry:
    """What is written down of one request.

    Attributes:
        caller: who asked; None where nobody said.
        labels: of the request's data, sorted.
        bank: SHA-256 of the bank's `bank.json` (`bank_versions.bank_digest`); "" for a bank that is not on disk.
        policy: SHA-256 of the policy file, None where none was asked.
        scorer: of the routed model.
        granularity: likewise.
        choice: the adapter that acted on the whole request, None for the base or where each token had its own.
        runner_up: the permitted adapter that came next, likewise.
        margin: between the two; None where each token had its own.
        chance: of the best score among public prompts (`abstention`), where the scorer asks for it.
        shares: adapter → share of the decisions that it won; "base" is the base alone.
        decisions: how many that were.
        permitted: how many adapters the caller might use.
        excluded: how many it might not.
    """

    caller: str | None
    labels: tuple[str, ...]
    bank: str
    policy: str | None
    scorer: str
    granularity: str
    choice: str | None
    runner_up: str | None
    margin: float | None
    chance: float | None
    shares: Mapping[str, float]
    decisions: int
    permitted: int
    excluded: int


def append_decision(path: Path, entry: DecisionEntry, *, now: datetime | None = None) -> None:
    """Add the entry to the log in `path` under the present time (UTC); lines of several processes never mix.

    Raises:
        UnavailableError: the disk refuses.
    """
    time = (now or datetime.now(UTC)).isoformat(timespec="milliseconds")
    line = json.dumps({"time": time} | asdict(entry), ensure_ascii=False, allow_nan=False)
    files.append_line(path, line.encode())


@dataclass(frozen=True)
class LogContext:
    """What a log line says beside the decision.

    Attributes:
        file: the log.
        bank: as in `DecisionEntry`.
        policy: as in `DecisionEntry`.
    """

    file: Path
    bank: str = ""
    policy: str | None = None


@contextlib.contextmanager
def logged(
    model: RoutedModel, context: LogContext, requests: Sequence[Request], permitted: Permitted | None
) -> Iterator[Trace]:
    """A block whose calls of the routed model are traced, and written down one line a row when it ends.

    Args:
        model: routed.
        context: where to, and under which bank and policy.
        requests: one a row of the batch that the block runs.
        permitted: what the block passes to the model.

    Raises:
        InputError: as many requests as rows are needed, and as many permitted sets.
        UnavailableError: the disk refuses.
    """
    if permitted is not None and len(permitted) != len(requests):
        raise InputError(f"{len(permitted)} permitted sets for {len(requests)} requests", remedy="give one a row")
    if model.composition.mixes:
        raise UnsupportedError(
            "several adapters act at once, and a log cannot say which did what", remedy="log a scorer with top_k = 1"
        )
    with model.trace() as trace:
        yield trace
    for row, request in enumerate(requests):
        allowed = None if permitted is None else permitted[row]
        entry = entry_of(model, context, request, allowed, trace, row=row, rows=len(requests))
        append_decision(context.file, entry)


def entry_of(
    model: RoutedModel,
    context: LogContext,
    request: Request | None,
    permitted: Collection[str] | None,
    trace: Trace,
    *,
    row: int = 0,
    rows: int = 1,
) -> DecisionEntry:
    """The log entry of one row of a traced batch.

    Args:
        model: that was traced.
        context: bank and policy.
        request: of the row; None where nobody said who asks.
        permitted: the row's permitted set, None for all.
        trace: of the batch.
        row: of the batch.
        rows: of the batch, as the caller gave it; a row's beams are its own.
    """
    count = len(model.bank.names)
    allowed = count if permitted is None else len(frozenset(permitted))
    winners = [name for names in trace.winners(row, rows=rows).values() for name in names]
    choice = trace.choices[-1] if trace.choices and not winners else None
    return DecisionEntry(
        None if request is None else request.caller,
        () if request is None else tuple(sorted(request.labels)),
        context.bank,
        context.policy,
        model.scorer.name,
        model.granularity,
        None if choice is None else trace.name(int(choice.winner[row])),
        None if choice is None else trace.name(int(choice.runner_up[row])),
        None if choice is None else float(choice.margin[row]),
        None if choice is None or choice.chance is None else float(choice.chance[row]),
        {name or "base": share for name, share in trace.shares(row, rows=rows).items()},
        len(winners) if choice is None else 1,
        allowed,
        count - allowed,
    )
