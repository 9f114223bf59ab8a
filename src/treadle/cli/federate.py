"""`treadle federate`: one adapter from rows that stay where they are."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli import pilot
from treadle.cli.console import print_json, working
from treadle.cli.options import Json, Run


def register(app: typer.Typer) -> None:
    """Add `federate` to the command line."""
    group = typer.Typer(help="Train one adapter over silos whose rows stay where they are.", no_args_is_help=True)
    group.command("run")(run_command)
    group.command("resume")(resume_command)
    group.command("watch")(watch_command)
    group.command("serve")(serve_command)
    group.command("admit")(admit_command)
    group.command("silo")(silo_command)
    pilot.register(group)
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


def watch_command(
    run: Run,
    once: Annotated[bool, typer.Option("--once", help="Show how it stands, and stop.")] = False,
    json: Json = False,
) -> None:
    """Watch a run from another terminal: rounds, clients, bytes, ε.

    Example: treadle federate watch triage.toml
    """
    from treadle.cli.federation_tables import show_watched, watch
    from treadle.configs.federate import FederateRun
    from treadle.recipes.federate import watched
    from treadle.toml import load_toml

    config = load_toml(run, FederateRun)
    if not (once or json):
        watch(lambda: watched(config))
    show_watched(watched(config), json=json)


def serve_command(run: Run, json: Json = False) -> None:
    """Start the server that the run's silos connect to, and keep it until Ctrl-C.

    Example: treadle federate serve triage.toml
    """
    from treadle.configs.federate import FederateRun
    from treadle.recipes.superlink import superlink_command
    from treadle.toml import load_toml

    config = load_toml(run, FederateRun)
    command = superlink_command(config)
    if json and config.superlink is not None:
        print_json({"serves": f"{config.superlink.host}:{config.superlink.port}"})
    raise typer.Exit(command.run())


def admit_command(
    run: Run,
    key: Annotated[Path, typer.Argument(metavar="KEY.pub", help="The silo's public key.")],
    json: Json = False,
) -> None:
    """Let a silo in by its public key; the server must be running.

    Example: treadle federate admit triage.toml north.pub
    """
    from treadle.configs.federate import FederateRun
    from treadle.recipes.superlink import admit
    from treadle.toml import load_toml

    admit(load_toml(run, FederateRun), key)
    if json:
        print_json({"admitted": key})


def silo_command(
    silo: Annotated[Path, typer.Argument(metavar="SILO.toml", help="The silo's own configuration.")],
    json: Json = False,
) -> None:
    """Start a silo, and keep it until Ctrl-C; its rows, its key and its ledger stay here.

    Example: treadle federate silo north.toml
    """
    from treadle.configs.federate import SiloRun
    from treadle.recipes.silo import check_rows, silo_client
    from treadle.recipes.superlink import serve_silo
    from treadle.toml import load_toml

    config = load_toml(silo, SiloRun)
    with working(silo) as progress:
        silo_client(config)  # what is wrong with rows, ledger or terms is said before anybody connects
        check_rows(config, progress)
    if json:
        print_json({"silo": config.name})
    raise typer.Exit(serve_silo(config, silo))


def _federate(run: Path, *, json: bool, resume: bool) -> None:
    from treadle.cli.federation_tables import page_of, show_federation
    from treadle.configs.federate import FederateRun
    from treadle.recipes.federate import federate_in_process, federate_simulated
    from treadle.toml import load_toml

    config = load_toml(run, FederateRun)
    with working(run) as progress:
        if config.superlink is None:
            federated = federate_simulated if config.grid == "simulation" else federate_in_process
            made = federated(config, resume=resume, progress=progress, seen=page_of(config.page))
        else:
            from treadle.recipes.superlink import submit

            made = submit(config, run, resume=resume, progress=progress, seen=page_of(config.page))
    show_federation(made, json=json)
