"""`treadle bank`: libraries of adapters, ready to be routed."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from treadle.cli.console import print_json, print_table, working
from treadle.cli.options import Base, Json
from treadle.errors import InputError

commands = typer.Typer(
    help="Libraries of adapters: built, changed and calibrated on disk.", no_args_is_help=True, rich_markup_mode=None
)

Folder = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder.")]
Adapters = Annotated[
    list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders; NAME=FOLDER gives one another name.")
]
Calibrate = Annotated[
    str,
    typer.Option(
        "--calibrate",
        metavar="TEXT",
        help="Public text for the statistics: pydoc (every Python has it), a .txt, .jsonl or .csv file, or none.",
    ),
]
Own = Annotated[
    list[str] | None,
    typer.Option(
        "--own",
        metavar="NAME=FILE",
        help="An adapter's own text instead of public text, for every adapter; the fleet's ε is then none.",
    ),
]
TextField = Annotated[str, typer.Option("--field", help="The field that holds the text in a row.")]


def register(app: typer.Typer) -> None:
    """Add `bank` to the command line."""
    app.add_typer(commands, name="bank")


@commands.command("build")
def build_command(
    folder: Folder,
    adapters: Adapters,
    family: Annotated[Path, typer.Option(help="The family's folder.")],
    calibrate: Calibrate = "pydoc",
    own: Own = None,
    field: TextField = "text",
    access: Annotated[
        Literal["open", "required"], typer.Option(help="required: every request names its permitted adapters.")
    ] = "open",
    base: Base = None,
    json: Json = False,
) -> None:
    """Build a bank of adapters of one family, foreign adapters of the same base among them.

    Example: treadle bank build bank adapters/sums adapters/families --family family
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import AdapterPath, OwnSource, PublicSource, build_bank

    paths = [AdapterPath(*_named(text)) for text in adapters]
    public = None if calibrate == "none" else PublicSource(calibrate, field=field)
    source = OwnSource(_own_texts(own), field=field) if own else public
    with working() as progress:
        change = build_bank(folder, family, paths, source=source, access=access, base=base, progress=progress)
    show_bank_change(change, json=json)


@commands.command("add")
def add_command(folder: Folder, adapters: Adapters, base: Base = None, json: Json = False) -> None:
    """Add adapters at the end; statistics from public text are made anew with the same passages.

    Example: treadle bank add bank adapters/colours
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import AdapterPath, add_adapters

    paths = [AdapterPath(*_named(text)) for text in adapters]
    with working() as progress:
        change = add_adapters(folder, paths, base=base, progress=progress)
    show_bank_change(change, json=json)


@commands.command("remove")
def remove_command(
    folder: Folder,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of `treadle bank list`.")],
    json: Json = False,
) -> None:
    """Take adapters out; the others keep their statistics.

    Example: treadle bank remove bank colours
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import remove_adapters

    with working() as progress:
        change = remove_adapters(folder, names, progress=progress)
    show_bank_change(change, json=json)


@commands.command("calibrate")
def calibrate_command(
    folder: Folder,
    calibrate: Annotated[
        str, typer.Option("--text", metavar="TEXT", help="pydoc, or a .txt, .jsonl or .csv file of public text.")
    ] = "pydoc",
    own: Own = None,
    field: TextField = "text",
    base: Base = None,
    json: Json = False,
) -> None:
    """Make the statistics of all adapters anew.

    Example: treadle bank calibrate bank --text encyclopedia.jsonl
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import OwnSource, PublicSource, calibrate_bank

    source = OwnSource(_own_texts(own), field=field) if own else PublicSource(calibrate, field=field)
    with working() as progress:
        change = calibrate_bank(folder, source, base=base, progress=progress)
    show_bank_change(change, json=json)


@commands.command("list")
def list_command(folder: Folder, json: Json = False) -> None:
    """List the adapters, in the order that settles ties.

    Example: treadle bank list bank
    """
    from treadle.recipes.inspect import inspect_bank
    from treadle.routing.bank_files import load_bank

    found = inspect_bank(load_bank(folder), folder.resolve().name)
    rows = [
        {
            "name": member.name,
            "path": member.path,
            "method": member.method,
            "data": member.data,
            "epsilon": "none" if member.epsilon is None else member.epsilon,
            "base": member.base,
            "calibrated": member.calibrated,
        }
        for member in found.members
    ]
    if json:
        print_json({"bank": found.name, "calibration": found.facts["calibration"], "adapters": rows})
        return
    columns = ("name", "path", "method", "data", "epsilon", "base", "calibrated")
    print_table(
        f"bank {found.name}, calibration: {found.facts['calibration']}",
        columns,
        [[("yes" if row[c] else "no") if c == "calibrated" else row[c] for c in columns] for row in rows],
    )


def _named(text: str) -> tuple[Path, str | None]:
    """FOLDER or NAME=FOLDER."""
    name, equals, folder = text.partition("=")
    return (Path(folder), name) if equals and not Path(text).is_dir() else (Path(text), None)


def _own_texts(own: list[str]) -> dict[str, str]:
    """Adapter name → file, of NAME=FILE."""
    texts: dict[str, str] = {}
    for pair in own:
        name, equals, file = pair.partition("=")
        if not equals or not file:
            raise InputError(f"{pair!r} is not NAME=FILE", where="--own", remedy="write --own sums=sums.jsonl")
        texts[name] = file
    return texts
