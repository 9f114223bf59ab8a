"""`treadle inspect`: what stands in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import remark, working
from treadle.cli.options import Base, Html, Json


def register(app: typer.Typer) -> None:
    """Add `inspect` to the command line."""
    app.command("inspect")(inspect_command)


def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="FOLDER", help="An adapter (ours or PEFT's), a family, or a bank.")],
    base: Base = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """Show what an adapter, a family or a bank is, and where it changes the model.

    Example: treadle inspect adapters/sums --html sums.html
    """
    from treadle.cli.tables import show_inspection
    from treadle.recipes.inspect import inspect

    with working() as progress:
        found = inspect(path, base=base, progress=progress)
    if html is not None:
        from treadle.reports.pages import inspection_page, write_page

        write_page(html, inspection_page(found))
        remark(f"page: {html}")
    show_inspection(found, json=json)
