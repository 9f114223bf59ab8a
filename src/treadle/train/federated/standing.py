"""What the server knows of its clients, and how it saw a round."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from treadle.errors import FormatError

Outcome = Literal["accepted", "rejected", "refused", "exhausted", "silent", "absent"]
"""What came of asking a client: an update that is averaged, one that is not, a refusal of its own, the end of its
budget, nothing before the time-out, or no connection."""


@dataclass(frozen=True)
class Member:
    """What is known of a client that has taken part.

    Attributes:
        rounds: how many of its updates were averaged.
        epsilon: what its data have spent in all, as it said last; None where nothing is accounted.
        delta: belongs to epsilon.
        exhausted: whether its budget is spent, so that it is not asked again.
    """

    rounds: int = 0
    epsilon: float | None = None
    delta: float | None = None
    exhausted: bool = False


@dataclass(frozen=True)
class ClientRow:
    """One client in one round.

    Attributes:
        client: its name.
        outcome: what came of asking it.
        reason: in words, where something was amiss.
        down: bytes sent to it, families apart.
        up: bytes received.
        update_norm: of what it sent, noise included; None where nothing was accepted.
        epsilon: spent by its data so far, as it says, whether its update is averaged or not.
        delta: belongs to epsilon.
    """

    client: str
    outcome: Outcome
    reason: str = ""
    down: int = 0
    up: int = 0
    update_norm: float | None = None
    epsilon: float | None = None
    delta: float | None = None


@dataclass(frozen=True)
class RoundReport:
    """One round as the server saw it: nothing in it costs ε, since all of it comes from noised replies.

    Attributes:
        server_round: from 1.
        clients: those that were asked.
        attempts: how often missing clients were asked, at least 1.
        seconds: that it took.
        family_bytes: start-up transfers of A and plan so far in this process, all clients together.
        mean_norm: of the mean of the accepted changes.
        cosines: between the accepted clients' changes, in the order of their names.
        noise_to_signal: see `monitors.noise_to_signal`.
        missed: how far the new updates are from the mean of the clients', relative; 0 where aggregation is exact.
        accuracy: after it, on the server's public rows; None where it has none.
    """

    server_round: int
    clients: tuple[ClientRow, ...]
    attempts: int
    seconds: float
    family_bytes: int
    mean_norm: float
    cosines: tuple[tuple[float, ...], ...]
    noise_to_signal: float | None
    missed: float
    accuracy: float | None = None

    def to_json(self) -> dict[str, object]:
        """The report as a JSON object."""
        return asdict(self)

    @staticmethod
    def of_json(content: Mapping[str, object], *, where: object = None) -> "RoundReport":
        """The report in a JSON object that `to_json` wrote.

        Raises:
            FormatError: it is none.
        """
        row = dict(content)
        try:
            clients = tuple(ClientRow(**client) for client in row.pop("clients"))  # type: ignore[attr-defined]
            cosines = tuple(tuple(line) for line in row.pop("cosines"))  # type: ignore[attr-defined]
            return RoundReport(clients=clients, cosines=cosines, **row)  # type: ignore[arg-type]
        except (KeyError, TypeError) as error:
            raise FormatError(f"not a round's report ({error})", where=where, remedy="restore the file") from error


@dataclass(frozen=True)
class ClientTotals:
    """One client over all rounds so far.

    Attributes:
        client: its name.
        accepted: rounds in which its update was averaged.
        missing: rounds in which it was asked and was not.
        down: bytes sent to it, families apart.
        up: bytes received.
        epsilon: spent by its data, as it said last; None where nothing is accounted.
        delta: belongs to epsilon.
        reason: why its update was missing, the last time.
    """

    client: str
    accepted: int = 0
    missing: int = 0
    down: int = 0
    up: int = 0
    epsilon: float | None = None
    delta: float | None = None
    reason: str = ""

    @property
    def stated_epsilon(self) -> float | str:
        """What it says that it has spent: a number, "none" for no bound, "–" where it has said nothing yet."""
        if self.epsilon is not None:
            return self.epsilon
        return "none" if self.accepted else "–"


def totals(reports: Sequence[RoundReport]) -> list[ClientTotals]:
    """Every client that was ever asked, in the order in which it was first."""
    found: dict[str, ClientTotals] = {}
    for row in (row for report in reports for row in report.clients):
        known, counts = found.get(row.client, ClientTotals(row.client)), row.outcome == "accepted"
        found[row.client] = ClientTotals(
            row.client,
            known.accepted + counts,
            known.missing + (not counts),
            known.down + row.down,
            known.up + row.up,
            row.epsilon if row.epsilon is not None or counts else known.epsilon,
            row.delta if row.delta is not None or counts else known.delta,
            known.reason if counts else row.reason,
        )
    return list(found.values())
