"""`treadle federate`: one adapter from rows that stay where they are."""

import typer

from treadle.cli.console import working
from treadle.cli.options import Json, Run


def register(app: typer.Typer) -> None:
    """Add `federate` to the command line."""
    group = typer.Typer(help="Train one adapter over silos whose rows stay where they are.", no_args_is_help=True)
    group.command("run")(run_command)
    group.command("resume")(resume_command)
    app.add_typer(group, name="federate")


def run_command(run: Run, json: Json = False) -> None:
    """Train the adapter that RUN.toml describes.

    Example: treadle federate run triage.toml
    """
    _federate(run, json=json, resume=False)


def resume_command(run: Run, json: Json = False) -> None:
    """Go on with a run that died, from its last finished round.

    Example: treadle federate resume triage.toml
    """
    _federate(run, json=json, resume=True)


def _federate(run: Run, *, json: bool, resume: bool) -> None:
    from treadle.cli.federation_tables import show_federation
    from treadle.configs.federate import FederateRun
    from treadle.configs.toml import load_toml
    from treadle.recipes.federate import federate_in_process

    config = load_toml(run, FederateRun)
    with working() as progress:
        made = federate_in_process(config, resume=resume, progress=progress)
    show_federation(made, json=json)
