"""`treadle family`: what all adapters of a fleet share."""

import typer

from treadle.cli.console import working
from treadle.cli.options import Json, Run

commands = typer.Typer(
    help="Families: a base, a rank plan, and one frozen A a layer.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Add `family` to the command line."""
    app.add_typer(commands, name="family")


@commands.callback()
def group() -> None:
    """Keep `new` a command of its own, though it is the only one."""


@commands.command("new")
def new_command(run: Run, json: Json = False) -> None:
    """Make the frozen A of every planned layer and store the family under one fingerprint.

    Example: treadle family new family.toml
    """
    from treadle.cli.tables import show_family
    from treadle.configs.family import FamilyRun
    from treadle.configs.toml import load_toml
    from treadle.recipes.family import new_family

    config = load_toml(run, FamilyRun)
    with working() as progress:
        family = new_family(config, progress)
    show_family(family, config.out, json=json)
