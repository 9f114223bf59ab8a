"""The Strategy: whom a round asks, how long it waits, and what becomes of too few.

Flower's `Strategy.start` runs it, round by round. What a round makes is kept by a callback before the next one begins,
so a run that dies continues where it stood.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from treadle.errors import InputError, UnavailableError
from treadle.train.federated.aggregation import Update
from treadle.train.federated.collecting import Collecting
from treadle.train.federated.federation import Federation, Progressed, order_for
from treadle.train.federated.grid import wire_bytes
from treadle.train.federated.messages import TRAIN, array_record, order_records
from treadle.train.federated.monitors import cosines, mean_norm, noise_to_signal
from treadle.train.federated.roster import Roster, enrolled
from treadle.train.federated.standing import RoundReport
from treadle.train.federated.variants import Aggregate
from treadle.train.rows import shuffled

_LOG = logging.getLogger("treadle.federated")


class RunEnded(Exception):  # noqa: N818, an end and no error
    """The run is over before its last round, as configured; the message says why."""


class FederatedStrategy(Strategy):
    """The rounds of one federation from where it stands.

    Args:
        federation: what it is.
        progressed: how far it has come.
        keep: called when a round is done, before the next begins.
    """

    def __init__(
        self, federation: Federation, progressed: Progressed, keep: Callable[[Progressed, RoundReport], None]
    ) -> None:
        self.progressed = progressed
        self._federation, self._keep = federation, keep
        self._first, self._begun = progressed.server_round, 0.0
        self._roster = Roster()
        self._open: tuple[Collecting, Grid] | None = None

    def summary(self) -> None:
        """Say nothing: the faces of treadle tell."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The first messages of a round; `arrays` are not read, since a variant may keep more than one set of them.

        Raises:
            RunEnded: too few clients have a budget left.
        """
        rules, number = self._federation.rules, self._first + server_round
        left = [name for name in rules.clients if not self.progressed.member(name).exhausted]
        if len(left) < (rules.minimum or 1):
            raise RunEnded(f"{len(left)} clients have a budget left, a round needs {rules.minimum or 1}")
        # Where clients are private, whom a round asks must not hang on any of them: who is spent leaves a gap.
        pool = left if self._federation.client_privacy is None else list(rules.clients)
        drawn = sorted(shuffled(len(pool), rules.seed, f"round/{number}")[: rules.asked])
        self._begun = time.monotonic()
        collecting = Collecting(number, tuple(pool[place] for place in drawn if pool[place] in left))
        self._open = collecting, grid
        return self._messages(collecting, grid)

    def _messages(self, collecting: Collecting, grid: Grid) -> list[Message]:
        """Orders for the round's clients that are connected and have given no update yet."""
        federation, rules = self._federation, self._federation.rules
        collecting.attempts += 1
        self._roster = enrolled(self._roster, grid, federation.family, rules.clients, timeout=rules.timeout)
        messages: list[Message] = []
        for client in collecting.missing():
            if client not in self._roster.seats:
                collecting.note(client, "absent", "it is not connected")
                continue
            self._weight(client)  # nobody pays for an update that could not be weighed
            order = order_for(federation, self.progressed, collecting.number, client)
            node, group = self._roster.seats[client].node, str(collecting.number)
            message = Message(order_records(order), node, TRAIN, group_id=group)
            collecting.orders[client] = order
            collecting.note(client, "silent", "nothing came in time", down=wire_bytes(message))
            messages.append(message)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """B after the round, once enough clients have given a sound update; missing ones are asked again.

        Raises:
            UnavailableError: too few have, and the rules say abort or patience is at its end.
            RunEnded: a budget is spent and the rules end the run there, or too few have one left for a round.
        """
        if self._open is None:
            raise InputError("no round is open", remedy="call configure_train first")
        (collecting, grid), rules = self._open, self._federation.rules
        self._take(collecting, replies)
        while len(collecting.updates) < (needed := collecting.needed(rules.minimum)):
            short = f"round {collecting.number}: {len(collecting.updates)} of {needed} updates"
            self._fill_up(collecting, needed)
            if len(collecting.updates) + len(collecting.missing()) < needed:
                raise RunEnded(f"{short}, and nobody else has a budget left")
            if rules.too_few == "abort" or collecting.attempts >= rules.patience:
                raise UnavailableError(
                    f"{short} ({collecting.reasons()})", remedy="mend those clients, then resume the run"
                )
            _LOG.warning("%s; asking again in %g s", short, rules.pause)
            time.sleep(rules.pause)
            self._take(collecting, grid.send_and_receive(self._messages(collecting, grid), timeout=rules.timeout))
        if not collecting.updates:
            raise RunEnded("no client of the round has a budget left")
        self._close(collecting)
        return array_record(self.progressed.state.lora_B), None

    def _fill_up(self, collecting: Collecting, needed: int) -> None:
        """Let clients that were not drawn step in for those of the round whose budget is spent, in a drawn order.

        Nobody steps in where clients are private: one client's budget would decide about another's update.
        """
        rules = self._federation.rules
        if self._federation.client_privacy is not None:
            return
        others = [
            name
            for name in rules.clients
            if name not in collecting.asked and not self.progressed.member(name).exhausted
        ]
        order = shuffled(len(others), rules.seed, f"round/{collecting.number}/instead")
        short = max(0, needed - len(collecting.updates) - len(collecting.missing()))
        collecting.asked += tuple(others[place] for place in order[:short])

    def _take(self, collecting: Collecting, replies: Iterable[Message]) -> None:
        clients = {seat.node: name for name, seat in self._roster.seats.items()}
        for message in replies:
            client = clients.get(message.metadata.src_node_id)
            if client is None or client not in collecting.orders:
                _LOG.warning("a reply from node %s, which was not asked", message.metadata.src_node_id)
                continue
            collecting.take(client, message, self._federation, self.progressed, self._weight(client))
        spent = [row.client for row in collecting.rows.values() if row.outcome == "exhausted"]
        for client in spent:
            member = replace(self.progressed.member(client), exhausted=True)
            self.progressed = self.progressed.with_member(client, member)
        if spent and self._federation.rules.exhausted == "end":
            raise RunEnded(f"the privacy budget of {', '.join(spent)} is spent")

    def _weight(self, client: str) -> float:
        """What the client's update counts.

        Raises:
            InputError: records weigh, and the client keeps their number to itself.
        """
        if self._federation.rules.weighting == "uniform":
            return 1.0
        records = self._roster.seats[client].records
        if records is None:
            raise InputError(
                f"client {client!r} does not declare how many records it has",
                remedy="set share_records = true there, or weighting = 'uniform' here",
            )
        return float(records)

    def _close(self, collecting: Collecting) -> None:
        """Join the updates and hand the round over."""
        joined = self._joined(list(collecting.updates.values()), collecting.number)
        after = replace(self.progressed, server_round=collecting.number, state=joined.state)
        for client, reply in collecting.replies.items():
            known = after.member(client)
            member = replace(known, rounds=known.rounds + 1, epsilon=reply.epsilon, delta=reply.delta)
            after = replace(after.with_member(client, member), task_type=reply.task_type, transposed=reply.transposed)
        for row in collecting.rows.values():
            if row.client not in collecting.replies and row.epsilon is not None:  # it paid, and counts for nothing
                member = replace(after.member(row.client), epsilon=row.epsilon, delta=row.delta)
                after = after.with_member(row.client, member)
        changes = [collecting.changes[client] for client in sorted(collecting.changes)]
        report = RoundReport(
            server_round=collecting.number,
            clients=tuple(collecting.rows[name] for name in collecting.asked),
            attempts=collecting.attempts,
            seconds=time.monotonic() - self._begun,
            family_bytes=self._roster.family_bytes,
            mean_norm=mean_norm(changes),
            cosines=cosines(changes),
            noise_to_signal=noise_to_signal(changes),
            missed=joined.deviation.relative,
        )
        self._keep(after, report)
        self.progressed, self._open = after, None

    def _joined(self, updates: Sequence[Update], server_round: int) -> Aggregate:
        variant, privacy, state = self._federation.variant, self._federation.client_privacy, self.progressed.state
        if privacy is not None:
            return privacy.joined(variant, state, updates, server_round=server_round)
        return variant.aggregate(state, updates, server_round=server_round)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: accuracies of clients are releases that no ε accounts for."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing."""
        return None
