"""`treadle inspect`: what stands in a folder, or in a file of regions."""

from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import remark, working
from treadle.cli.options import Base, Html, Json


def register(app: typer.Typer) -> None:
    """Add `inspect` to the command line."""
    app.command("inspect")(inspect_command)


def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="An adapter (ours or PEFT's), a family, a bank, or a file of regions."),
    ],
    base: Base = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """Show what an adapter, a family or a bank is, and where it changes the model; or whose parameters are whose.

    Example: treadle inspect adapters/sums --html sums.html

    Example: treadle inspect adapters/sums.regions.safetensors --html regions.html
    """
    if path.is_file():
        _regions(path, html, json=json)
        return
    from treadle.cli.tables import show_inspection
    from treadle.recipes.inspect import inspect

    with working() as progress:
        found = inspect(path, base=base, progress=progress)
    if html is not None:
        from treadle.reports.pages import inspection_page, write_page

        write_page(html, inspection_page(found))
        remark(f"page: {html}")
    show_inspection(found, json=json)


def _regions(path: Path, html: Path | None, *, json: bool) -> None:
    from treadle.cli.stage_tables import show_regions
    from treadle.partition.region_files import load_regions

    regions = load_regions(path)
    if html is not None:
        from treadle.reports.pages import write_page
        from treadle.reports.stages import regions_page

        write_page(html, regions_page(path.name, regions))
        remark(f"page: {html}")
    show_regions(path.name, regions, json=json)
