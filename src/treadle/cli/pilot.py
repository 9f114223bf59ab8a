"""`treadle federate pilot` and `probe`: what to know before private rows are spent."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import working
from treadle.cli.options import Json


def register(group: typer.Typer) -> None:
    """Add `pilot` and `probe` to `federate`."""
    group.command("pilot")(pilot_command)
    group.command("probe")(probe_command)


def pilot_command(
    pilot: Annotated[Path, typer.Argument(metavar="PILOT.toml", help="What is tried, and what must be reached.")],
    json: Json = False,
) -> None:
    """Find a run's settings on public rows, say go or no go, and write its RUN.toml; 1 is the exit code of "no go".

    Example: treadle federate pilot triage-pilot.toml
    """
    from treadle.cli.pilot_tables import show_pilot
    from treadle.configs.pilot import PilotRun
    from treadle.recipes.pilot import pilot as tried
    from treadle.toml import load_toml

    config = load_toml(pilot, PilotRun)
    with working(pilot) as progress:
        found = tried(config, progress)
    show_pilot(found, json=json)
    if not found.go:
        raise typer.Exit(1)


def probe_command(
    silo: Annotated[Path, typer.Argument(metavar="SILO.toml", help="The silo's own configuration.")],
    run: Annotated[Path | None, typer.Argument(metavar="RUN.toml", help="The run's, if it is written.")] = None,
    round_seconds: Annotated[float, typer.Option("--round-seconds", help="What a round may take this client.")] = 60.0,
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GB", help="What it may hold; else most of what is free.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure what this client can do, on made-up rows, and propose rank, micro-batch, local steps and deadline.

    Example: treadle federate probe north.toml triage.toml
    """
    from treadle.cli.pilot_tables import show_probe
    from treadle.configs.federate import FederateRun, SiloRun
    from treadle.recipes.probe import probe
    from treadle.toml import load_toml

    config = load_toml(silo, SiloRun)
    federation = None if run is None else load_toml(run, FederateRun)
    limit = None if memory is None else int(memory * 1e9)
    with working(silo) as progress:
        found = probe(config, federation, round_seconds=round_seconds, memory=limit, progress=progress)
    show_probe(found, json=json)
