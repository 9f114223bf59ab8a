"""`treadle federate pilot` and `probe`: what to know before private rows are spent."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import working
from treadle.cli.options import Json


def register(group: typer.Typer) -> None:
    """Add `pilot` and `probe` to `federate`."""
    group.command("pilot")(pilot_command)


def pilot_command(
    pilot: Annotated[Path, typer.Argument(metavar="PILOT.toml", help="What is tried, and what must be reached.")],
    json: Json = False,
) -> None:
    """Find a run's settings on public rows, say go or no go, and write its RUN.toml; 1 is the exit code of "no go".

    Example: treadle federate pilot triage-pilot.toml
    """
    from treadle.cli.pilot_tables import show_pilot
    from treadle.configs.pilot import PilotRun
    from treadle.configs.toml import load_toml
    from treadle.recipes.pilot import pilot as tried

    config = load_toml(pilot, PilotRun)
    with working() as progress:
        found = tried(config, progress)
    show_pilot(found, json=json)
    if not found.go:
        raise typer.Exit(1)
