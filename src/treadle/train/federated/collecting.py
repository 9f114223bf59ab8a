"""One round while its replies come in: what every client was asked, and what came of it."""

import logging
from dataclasses import dataclass, field, replace

from flwr.app import Message

from treadle.errors import FormatError, MismatchError
from treadle.train.federated.acceptance import accepted_update, checked_change, norm_of
from treadle.train.federated.aggregation import Update
from treadle.train.federated.federation import Federation, Progressed
from treadle.train.federated.grid import wire_bytes
from treadle.train.federated.messages import Order, Reply, reply_of
from treadle.train.federated.monitors import Change
from treadle.train.federated.refusals import Refusal, refusal_of
from treadle.train.federated.standing import ClientRow, Outcome

_LOG = logging.getLogger("treadle.federated")


@dataclass
class Collecting:
    """A round's replies so far.

    Attributes:
        number: of the round.
        asked: the clients that take part in it.
        attempts: how often missing ones were asked.
        orders: what each was asked last.
        rows: what came of it.
        updates: those that count.
        changes: what they change.
        replies: they themselves.
    """

    number: int
    asked: tuple[str, ...]
    attempts: int = 0
    orders: dict[str, Order] = field(default_factory=dict[str, Order])
    rows: dict[str, ClientRow] = field(default_factory=dict[str, ClientRow])
    updates: dict[str, Update] = field(default_factory=dict[str, Update])
    changes: dict[str, Change] = field(default_factory=dict[str, Change])
    replies: dict[str, Reply] = field(default_factory=dict[str, Reply])

    def missing(self) -> list[str]:
        """The clients that may still give an update."""
        return [name for name in self.asked if name not in self.updates and not self._exhausted(name)]

    def needed(self, minimum: int | None) -> int:
        """How many updates the round needs: the minimum, or one of each client that is asked and has a budget."""
        return sum(not self._exhausted(name) for name in self.asked) if minimum is None else minimum

    def _exhausted(self, client: str) -> bool:
        return client in self.rows and self.rows[client].outcome == "exhausted"

    def note(self, client: str, outcome: Outcome, reason: str, *, down: int = 0, up: int = 0) -> None:
        """Write down what came of asking a client; bytes add up over attempts."""
        row = self.rows.get(client, ClientRow(client, outcome))
        self.rows[client] = replace(row, outcome=outcome, reason=reason, down=row.down + down, up=row.up + up)

    def reasons(self) -> str:
        """Why clients are missing, in one line."""
        return "; ".join(f"{row.client}: {row.reason}" for row in self.rows.values() if row.reason)

    def take(
        self, client: str, message: Message, federation: Federation, progressed: Progressed, weight: float
    ) -> None:
        """Sort one client's message into updates and reasons."""
        size = wire_bytes(message)
        if client in self.updates:
            self.note(client, "accepted", "a second reply was refused", up=size)
            _LOG.warning("round %d, client %s: a second reply was refused", self.number, client)
            return
        if message.has_error():
            self._refused(client, message.error.code, message.error.reason or "", size)
            return
        try:
            reply = reply_of(message)
            if (reply.client, reply.run) == (client, self.orders[client].run):  # paid, averaged or not
                self.rows[client] = replace(self.rows[client], epsilon=reply.epsilon, delta=reply.delta)
            self._accept(client, reply, federation, progressed, weight)
            self.note(client, "accepted", "", up=size)
        except (FormatError, MismatchError) as error:
            self.note(client, "rejected", error.what, up=size)
            _LOG.warning("round %d, client %s: rejected: %s", self.number, client, error.what)

    def _refused(self, client: str, code: int, reason: str, size: int) -> None:
        refusal = refusal_of(code)
        # Only a treadle client's sentences are known to hold nothing private; Flower's own may quote a traceback.
        told = "it failed; its own log says how" if refusal is None else reason
        self.note(client, "exhausted" if refusal is Refusal.BUDGET else "refused", told, up=size)
        _LOG.warning("round %d, client %s: %s", self.number, client, told)

    def _accept(self, client: str, reply: Reply, federation: Federation, progressed: Progressed, weight: float) -> None:
        kinds = {(other.task_type, other.transposed) for other in self.replies.values()}
        if progressed.server_round > 0:
            kinds.add((progressed.task_type, progressed.transposed))
        if kinds - {(reply.task_type, reply.transposed)}:
            raise MismatchError(f"its model is of kind {reply.task_type}, the others' is not", where=client)
        update = accepted_update(reply, self.orders[client], client=client, weight=weight)
        change = checked_change(
            update,
            self.orders[client],
            progressed.state,
            federation.variant.work(self.number),
            max_update_norm=federation.rules.max_update_norm,
        )
        self.updates[client], self.changes[client], self.replies[client] = update, change, reply
        self.rows[client] = replace(self.rows[client], update_norm=norm_of(change))
