"""`treadle bank versions` and `treadle bank rollback`: what a bank was, and how to get back to it."""

from typing import Annotated

import typer

from treadle.cli.console import print_json, print_table, remark, working
from treadle.cli.options import Bank, Json


def versions_command(
    folder: Bank,
    forget: Annotated[bool, typer.Option("--forget", help="Delete all but the present one, files included.")] = False,
    json: Json = False,
) -> None:
    """List the versions that are kept, ten at most, the present one last.

    Example: treadle bank versions bank
    """
    from dataclasses import asdict

    from treadle.recipes.bank import forget_versions
    from treadle.routing.bank_versions import versions

    if forget:
        with working() as progress:
            gone = forget_versions(folder, progress=progress)
        remark(f"{gone} earlier versions deleted")
    rows = versions(folder)
    if json:
        print_json([asdict(row) for row in rows])
        return
    print_table(
        f"versions of bank {folder.resolve().name}",
        ("version", "written (UTC)", "changes", "adapters", "SHA-256"),
        [(r.number, r.written, ", ".join(r.changes) or None, len(r.adapters), r.digest[:12]) for r in rows],
    )


def rollback_command(
    folder: Bank,
    to: Annotated[int | None, typer.Option(metavar="N", help="A version; the one before this if not given.")] = None,
    json: Json = False,
) -> None:
    """Make the bank what it was; that is a new version, so a rollback can be rolled back.

    Example: treadle bank rollback bank --to 3
    """
    from treadle.cli.tables import show_bank_change
    from treadle.recipes.bank import roll_back

    with working() as progress:
        change = roll_back(folder, to, progress=progress)
    show_bank_change(change, json=json)
