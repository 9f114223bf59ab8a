"""Which node is which client: asked once of every node, since nodes come back under other numbers."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from treadle.errors import FormatError, InputError
from treadle.family.family import AdapterFamily
from treadle.train.federated.grid import wire_bytes
from treadle.train.federated.messages import FAMILY, WELCOME, Welcome, family_records, welcome_of, welcome_question

_LOG = logging.getLogger("treadle.federated")


@dataclass(frozen=True)
class Seat:
    """A connected client.

    Attributes:
        node: its number in the grid.
        records: how many records it declares public; None where it does not.
    """

    node: int
    records: int | None


@dataclass(frozen=True)
class Roster:
    """The connected clients, and what it took to give them the family.

    Attributes:
        seats: by name.
        strangers: numbers of nodes that are no client of this run, so that nobody asks them again.
        family_bytes: of all transfers of the family so far.
    """

    seats: Mapping[str, Seat] = field(default_factory=dict[str, Seat])
    strangers: Collection[int] = ()
    family_bytes: int = 0


def enrolled(roster: Roster, grid: Grid, family: AdapterFamily, clients: Collection[str], *, timeout: float) -> Roster:
    """The roster of who is connected now; every client in it holds the family.

    Nodes that are known are not asked again. One that does not answer in time may be asked again later.

    Raises:
        InputError: two nodes call themselves by one name.
    """
    connected = set(grid.get_node_ids())
    seats = {name: seat for name, seat in roster.seats.items() if seat.node in connected}
    strangers = set(roster.strangers) & connected
    new = connected - strangers - {seat.node for seat in seats.values()}
    question = welcome_question(family.fingerprint)
    replies = grid.send_and_receive([Message(question, node, WELCOME) for node in sorted(new)], timeout=timeout)
    lacking: dict[int, str] = {}
    for node, welcome in _welcomes(replies).items():
        if welcome.client not in clients:
            _LOG.warning("node %s calls itself %r, which is no client of this run", node, welcome.client)
            strangers.add(node)
        elif welcome.client in seats:
            raise InputError(
                f"two nodes call themselves {welcome.client!r}", remedy="give every silo a name and a key of its own"
            )
        else:
            seats[welcome.client] = Seat(node, welcome.records)
            if not welcome.has_family:
                lacking[node] = welcome.client
    sent = 0
    if lacking:
        messages = [Message(family_records(family), node, FAMILY) for node in sorted(lacking)]
        sent = sum(wire_bytes(message) for message in messages)
        holders = _welcomes(grid.send_and_receive(messages, timeout=timeout))
        for node, name in lacking.items():
            if node not in holders:
                del seats[name]
    return Roster(seats, frozenset(strangers), roster.family_bytes + sent)


def _welcomes(replies: Iterable[Message]) -> dict[int, Welcome]:
    """Node → its answer, for those that gave a sound one."""
    found: dict[int, Welcome] = {}
    for reply in replies:
        node = reply.metadata.src_node_id
        if reply.has_error():
            _LOG.warning("node %s: %s", node, reply.error.reason)
            continue
        try:
            found[node] = welcome_of(reply)
        except FormatError as error:
            _LOG.warning("node %s: %s", node, error)
    return found
