"""What a ledger's rows say: five kinds of entry, and how each is written as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from treadle import files
from treadle.errors import FormatError, InputError
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.sources import Source


@dataclass(frozen=True)
class ReleaseKey:
    """What a server asked for; the same request is answered with the same bytes.

    Attributes:
        run: the server's id of the run.
        server_round: counted by the server.
        request: SHA-256 of the global B and of whatever else decides the work.
    """

    run: str
    server_round: int
    request: str


@dataclass(frozen=True)
class Budget:
    """What a silo allows for a data set, over all runs ever.

    Attributes:
        epsilon: above 0; inf allows releases without noise.
        delta: between 0 and 1, at which ε is computed.

    Raises:
        InputError: out of range.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise InputError(f"epsilon is {self.epsilon}", where="budget", remedy="give a number above 0, or inf")
        epsilon_of((), delta=self.delta)  # refuses a δ that is out of the accountant's range

    def __str__(self) -> str:
        return f"ε = {shown(self.epsilon)} at δ = {self.delta:g}"


def shown(epsilon: float) -> str:
    """ε as people read it: "none" where nothing bounds it."""
    return "none" if math.isinf(epsilon) else f"{epsilon:.4g}"


@dataclass(frozen=True)
class Created:
    """A new ledger; the digest of its secret, so that a secret exchanged later is noticed."""

    secret_sha256: str


@dataclass(frozen=True)
class Registered:
    """A data set got its name, its budget and its identity."""

    data: str
    budget: Budget
    source: Source


@dataclass(frozen=True)
class Edited:
    """The file behind the name was edited or moved; what was spent stays spent."""

    data: str
    source: Source


@dataclass(frozen=True)
class Allowed:
    """The silo changed a budget, and said why."""

    data: str
    budget: Budget
    reason: str


@dataclass(frozen=True)
class Debited:
    """A release was paid for; `event` is None for one that no ε accounts for."""

    data: str
    key: ReleaseKey
    event: MechanismEvent | None


Entry = Created | Registered | Edited | Allowed | Debited


def encoded(entry: Entry, *, time: str) -> bytes:
    """The row's body."""
    return files.canonical_json({"time": time, "kind": type(entry).__name__.lower(), **_fields(entry)})


def _fields(entry: Entry) -> dict[str, object]:
    match entry:
        case Created(secret):
            return {"secret_sha256": secret}
        case Registered(data, budget, source):
            return {"data": data, **_of_budget(budget), **_of_source(source)}
        case Edited(data, source):
            return {"data": data, **_of_source(source)}
        case Allowed(data, budget, reason):
            return {"data": data, **_of_budget(budget), "reason": reason}
        case Debited(data, key, event):
            asked = {"run": key.run, "server_round": key.server_round, "request": key.request}
            return {"data": data, **asked, "event": None if event is None else event.to_json()}


def _of_budget(budget: Budget) -> dict[str, object]:
    return {"epsilon": None if math.isinf(budget.epsilon) else budget.epsilon, "delta": budget.delta}


def _of_source(source: Source) -> dict[str, object]:
    return {"content": source.content, "place": source.place}


def decoded(body: bytes, *, where: object) -> tuple[str, Entry]:
    """When a row was written (UTC, ISO 8601), and what it says.

    Raises:
        FormatError: it is no row of a ledger of this format.
    """
    try:
        content = json.loads(body)
        return _text(content, "time"), _entry(content)
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise FormatError(f"is no row of a ledger ({error})", where=where, remedy="restore the ledger") from error


def _entry(content: Mapping[str, object]) -> Entry:
    match content["kind"]:
        case "created":
            return Created(_text(content, "secret_sha256"))
        case "registered":
            return Registered(_text(content, "data"), _budget(content), _source(content))
        case "edited":
            return Edited(_text(content, "data"), _source(content))
        case "allowed":
            return Allowed(_text(content, "data"), _budget(content), _text(content, "reason"))
        case "debited":
            key = ReleaseKey(_text(content, "run"), _whole(content, "server_round"), _text(content, "request"))
            return Debited(_text(content, "data"), key, _event(content["event"]))
        case kind:
            raise ValueError(f"unknown kind {kind!r}")


def _text(content: Mapping[str, object], key: str) -> str:
    value = content[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is no text")
    return value


def _number(content: Mapping[str, object], key: str) -> float:
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key} is no number")
    return float(value)


def _whole(content: Mapping[str, object], key: str) -> int:
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key} is no whole number")
    return value


def _budget(content: Mapping[str, object]) -> Budget:
    return Budget(math.inf if content["epsilon"] is None else _number(content, "epsilon"), _number(content, "delta"))


def _source(content: Mapping[str, object]) -> Source:
    return Source(_text(content, "content"), _text(content, "place"))


def _event(content: object) -> MechanismEvent | None:
    if content is None:
        return None
    if not isinstance(content, dict):
        raise TypeError("event is no object")
    return MechanismEvent.of_json({str(key): value for key, value in content.items()})
