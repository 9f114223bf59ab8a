"""`treadle family`: what all adapters of a fleet share."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import working
from treadle.cli.options import Json, Run

commands = typer.Typer(
    help="Families: a base, a rank plan, and one frozen A a layer.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    """Add `family` to the command line."""
    app.add_typer(commands, name="family")


@commands.command("new")
def new_command(run: Run, json: Json = False) -> None:
    """Make the frozen A of every planned layer and store the family under one fingerprint.

    Example: treadle family new family.toml
    """
    from treadle.cli.tables import show_family
    from treadle.configs.family import FamilyRun
    from treadle.recipes.family import new_family
    from treadle.toml import load_toml

    config = load_toml(run, FamilyRun)
    with working(run) as progress:
        family = new_family(config, progress)
    show_family(family, config.out, json=json)


@commands.command("resize")
def resize_command(
    folder: Annotated[Path, typer.Argument(metavar="FAMILY", help="The family's folder.")],
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="The plan whose ranks it shall have.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new folder for the family and the adapters.")],
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", metavar="FOLDER", help="Bring this adapter along; repeat it.")
    ] = None,
    alone: Annotated[
        bool,
        typer.Option("--alone", help="Cut each adapter by its own best truncation; it then belongs to no family."),
    ] = False,
    json: Json = False,
) -> None:
    """Give a family another plan's ranks. Adapters grow without loss; what shrinking loses is said.

    Example: treadle family resize family plan-16/plan.json --adapter adapters/sums --out resized
    """
    from treadle.cli.tables import show_resized
    from treadle.recipes.resize import resize

    with working() as progress:
        made = resize(folder, plan, out=out, adapters=adapter or [], alone=alone, progress=progress)
    show_resized(made, json=json)
