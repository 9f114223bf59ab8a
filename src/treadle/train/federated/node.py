"""The process that answers one message for a silo, in place of the one that would run a server's code.

A SuperNode starts a `flwr-clientapp` process a message, which runs the ClientApp that came with the server's bundle:
whoever may start a run could then read a silo's rows. A silo of ours puts this process in that place: it takes the
message, never unpacks the bundle, and answers by the code that is installed at the silo.

Nothing heavy is imported before Flower's own heartbeat runs: a process that is silent for 30 s is started again.
"""

from collections.abc import Callable

from flwr.clientapp import ClientApp
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

__all__ = ["PROCESS", "ClientApp", "answer_by"]

PROCESS = "flwr-clientapp"
"""The command that a SuperNode looks up and starts for every message."""


def answer_by(app_of: Callable[[], ClientApp]) -> None:
    """Do what `flwr-clientapp` does with the process's arguments, by this app; ends the process.

    Args:
        app_of: makes the silo's ClientApp; called once a message is there.
    """

    def nothing(*_: object, **__: object) -> None:
        return None

    def loader(*_: object, **__: object) -> Callable[..., ClientApp]:
        return lambda *_: app_of()

    run_clientapp.install_from_fab = nothing
    run_clientapp.get_load_client_app_fn = loader
    flwr_clientapp()
