"""A federation from its start, or from where it stands, to its end."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.serverapp import Grid

from treadle.errors import InputError
from treadle.train.federated.checkpoint import RunFolder
from treadle.train.federated.client import Silo, client_app
from treadle.train.federated.factors import GlobalState
from treadle.train.federated.federation import Federation, Progressed
from treadle.train.federated.grid import InProcessGrid
from treadle.train.federated.messages import array_record
from treadle.train.federated.standing import RoundReport
from treadle.train.federated.strategy import FederatedStrategy, RunEnded

FIRST_NODE = 100
"""Far from the number that Flower gives to the server."""

__all__ = ["FIRST_NODE", "Finished", "Grid", "Message", "federate", "in_process_grid"]


@dataclass(frozen=True)
class Finished:
    """What a run made.

    Attributes:
        progressed: where it stands.
        why: it ended before its last round; "" if it did not.
    """

    progressed: Progressed
    why: str


def federate(
    federation: Federation,
    grid: Grid,
    folder: RunFolder,
    told: Callable[[RoundReport], None],
    judged: Callable[[GlobalState], float | None] = lambda state: None,
) -> Finished:
    """The federation after its last round, its state kept in `folder` after each.

    Args:
        federation: what it is.
        grid: reaches the clients: in this process, or a SuperLink's.
        folder: a run that has begun there goes on.
        told: called after every round.
        judged: the accuracy of a state on public rows, for the round's report.

    Raises:
        UnavailableError: too few clients answered, or the disk refuses; the rounds before are kept.
        MismatchError: the folder holds another run.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if folder.exists:
        progressed = folder.load(federation).asking_everybody()
    else:
        progressed = Progressed(secrets.token_hex(16), 0, GlobalState.start(federation.family))
        folder.save_state(progressed)  # before anybody is asked: replies are kept under the run's name

    def keep(after: Progressed, report: RoundReport) -> None:
        report = replace(report, accuracy=judged(after.state))
        folder.save(after, report)
        told(report)

    strategy = FederatedStrategy(federation, progressed, keep)
    left = federation.work.rounds - progressed.server_round
    why = ""
    if left > 0:
        try:
            strategy.start(
                grid, array_record(progressed.state.lora_B), num_rounds=left, timeout=federation.rules.timeout
            )
        except RunEnded as ended:
            why = str(ended)
            folder.save_state(strategy.progressed)
    return Finished(strategy.progressed, why)


def in_process_grid(
    silos: Sequence[Silo], delivered: Callable[[Sequence[Message]], Sequence[Message]] = lambda replies: replies
) -> Grid:
    """A grid whose nodes are these silos, in this process.

    Args:
        silos: numbered from `FIRST_NODE` on, in their order.
        delivered: see `InProcessGrid`.

    Raises:
        InputError: two have one name.
    """
    names = [silo.name for silo in silos]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two silos are called {name!r}", remedy="give every silo a name of its own")
    by_node = dict(enumerate(silos, start=FIRST_NODE))
    app = client_app(lambda context: by_node[context.node_id])
    return InProcessGrid(app, {node: {} for node in by_node}, delivered)
