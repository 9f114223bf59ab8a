"""`treadle train`: one adapter of a family."""

import typer

from treadle.cli.console import working
from treadle.cli.options import Json, Run


def register(app: typer.Typer) -> None:
    """Add `train` to the command line."""
    app.command("train")(train_command)


def train_command(run: Run, json: Json = False) -> None:
    """Train the B of one adapter; a run that was killed continues where it stood.

    Example: treadle train sums.toml
    """
    from treadle.cli.tables import show_training
    from treadle.configs.toml import load_toml
    from treadle.configs.train import TrainRun
    from treadle.recipes.train import train_adapter

    config = load_toml(run, TrainRun)
    with working() as progress:
        trained = train_adapter(config, progress)
    show_training(trained, json=json)
