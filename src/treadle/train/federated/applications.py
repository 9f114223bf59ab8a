"""What a bundle for Flower's SuperLink must hold: the ServerApp of a run, and a ClientApp that no silo of ours runs."""

from collections.abc import Callable, Mapping

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp


def server_app(run: Callable[[Grid, Mapping[str, str]], None]) -> ServerApp:
    """The ServerApp that calls `run` with the grid and the run's own configuration."""
    app = ServerApp()

    @app.main()
    def _(grid: Grid, context: Context) -> None:
        run(grid, {name: str(value) for name, value in context.run_config.items()})

    return app


def unused_client_app() -> ClientApp:
    """The ClientApp that a bundle must name; silos answer by their own."""
    app = ClientApp()

    @app.query()
    def _(message: Message, context: Context) -> Message:
        raise NotImplementedError("silos answer by their own code: start them with `treadle federate silo`")

    return app
