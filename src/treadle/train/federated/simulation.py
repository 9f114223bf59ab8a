"""Flower's simulation: the same ServerApp and ClientApp, silos answering in Ray's worker processes."""

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import TypeVar

from flwr.app import Context
from flwr.serverapp import Grid

from treadle.errors import UnavailableError
from treadle.train.federated.applications import server_app
from treadle.train.federated.client import Silo, client_app

Made = TypeVar("Made")


def simulated(run: Callable[[Grid], Made], silo_of: Callable[[int], Silo], silos: int) -> Made:
    """What `run` makes of a grid whose nodes are simulated, a process for as many of them as there are cores.

    Args:
        run: the server's work; called in a thread of this process.
        silo_of: the silo of a number below `silos`; called in the workers, to which it is sent.
        silos: how many.

    Raises:
        UnavailableError: Ray is not installed, or the simulation ended before `run` did.
    """
    if importlib.util.find_spec("ray") is None:
        raise UnavailableError(
            "Flower's simulation needs Ray, which is not installed",
            remedy="pip install 'treadle[simulation]', or leave `grid` out",
        )
    from flwr.simulation import run_simulation

    made: list[Made] = []
    failed: list[Exception] = []

    def serve(grid: Grid, _: object) -> None:
        try:
            made.append(run(grid))
        except Exception as error:
            failed.append(error)

    def at(context: Context) -> Silo:
        return silo_of(int(context.node_config["partition-id"]))

    logging.getLogger("flwr").setLevel(logging.ERROR)  # it calls this function of its own deprecated; no other is left
    run_simulation(
        server_app(serve),
        client_app(at),
        num_supernodes=silos,
        backend_config={
            "init_args": {"num_cpus": os.cpu_count() or 1, "include_dashboard": False},
            "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
        },
    )
    if failed:
        raise failed[0]
    if not made:
        raise UnavailableError("the simulation ended before its run", remedy="leave `grid` out, or see Ray's log")
    return made[0]
