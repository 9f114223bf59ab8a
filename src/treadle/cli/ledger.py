"""`treadle ledger`: what has been spent on which data, and what is allowed."""

from dataclasses import asdict
from math import isinf
from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.console import print_json, print_table, remark, say
from treadle.cli.options import Json
from treadle.privacy.entries import Budget, shown
from treadle.recipes.ledger import LedgerView, allow, forget_replies, new_ledger, show_ledger, verify_ledger

commands = typer.Typer(
    help="A silo's ledger: what has been spent on which data, over all runs ever.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Ledger = Annotated[Path, typer.Argument(metavar="LEDGER", help="The silo's ledger, a file.")]
_BACKUP = "an older copy put back in its place would look just as sound: note the head, and give it to verify --head"


def register(app: typer.Typer) -> None:
    """Add `ledger` to the command line."""
    app.add_typer(commands, name="ledger")


@commands.command("new")
def new_command(ledger: Ledger, json: Json = False) -> None:
    """Make an empty ledger, once a silo; keep it where its data are kept, and never a second one for the same data.

    Example: treadle ledger new silo.ledger
    """
    path = new_ledger(ledger)
    if json:
        print_json({"ledger": path})
        return
    say(str(path))


@commands.command("show")
def show_command(ledger: Ledger, json: Json = False) -> None:
    """Show every data set's budget, what all runs together have spent of it, and which runs they were.

    Example: treadle ledger show silo.ledger
    """
    _show(show_ledger(ledger), json=json)


@commands.command("verify")
def verify_command(
    ledger: Ledger,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="NUMBER:HASH", help="A head that was noted earlier: it must still be there."),
    ] = None,
    json: Json = False,
) -> None:
    """Walk the chain of rows and name the first one that is broken; print the head, to be noted elsewhere.

    Example: treadle ledger verify silo.ledger
    """
    found = verify_ledger(ledger, head)
    if json:
        print_json({"ledger": ledger, "rows": found.number, "head": str(found), "noted": head})
        return
    say(f"{found.number} rows, none broken; head {found}")
    if head is None:
        remark(_BACKUP)


@commands.command("allow")
def allow_command(
    ledger: Ledger,
    data: Annotated[str, typer.Argument(metavar="DATA", help="The data set's name in the silo's configuration.")],
    epsilon: Annotated[
        float, typer.Option(help="What all runs together may spend; inf allows releases without noise.")
    ],
    delta: Annotated[float, typer.Option(help="At which ε is computed; below 1 / number of records.")],
    reason: Annotated[str, typer.Option(help="Why, and who says so; it stays on record.")],
    json: Json = False,
) -> None:
    """Change a data set's budget, on the record.

    Example: treadle ledger allow silo.ledger ward --epsilon 8 --delta 1e-6 --reason "ethics board, 3 May"
    """
    _show(allow(ledger, data, Budget(epsilon, delta), reason=reason), json=json)


@commands.command("forget")
def forget_command(
    ledger: Ledger,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The server's id of a run that has ended.")],
    json: Json = False,
) -> None:
    """Delete the replies kept for a run's retries; what was spent stays spent.

    Example: treadle ledger forget silo.ledger 7f3a
    """
    gone = forget_replies(ledger, run)
    if json:
        print_json({"ledger": ledger, "run": run, "replies": gone})
        return
    say(f"{gone} replies deleted")


def _show(found: LedgerView, *, json: bool) -> None:
    """Print a ledger's accounts."""
    if json:
        print_json(_content(found))
        return
    rows = [
        (
            statement.data,
            shown(statement.spent),
            shown(statement.budget.epsilon),
            f"{statement.budget.delta:g}",
            sum(run.releases for run in statement.runs),
            sum(run.repeated for run in statement.runs),
            statement.unaccounted,
            len(statement.runs),
            statement.last,
        )
        for statement in found.statements
    ]
    columns = ("data set", "ε spent", "of", "at δ", "releases", "paid twice", "without noise", "runs", "last (UTC)")
    print_table(f"{found.path}: {found.head.number} rows, none broken", columns, rows)
    runs = [
        (statement.data, run.run, run.releases, run.repeated)
        for statement in found.statements
        for run in statement.runs
    ]
    if runs:
        print_table("by run", ("data set", "run", "releases", "paid twice"), runs)
    say(f"head {found.head}")
    remark(_BACKUP)


def _content(found: LedgerView) -> dict[str, object]:
    """What `--json` prints of a ledger; ε is "none" where nothing bounds it."""
    return {
        "ledger": found.path,
        "rows": found.head.number,
        "head": str(found.head),
        "data": [
            asdict(statement) | {"spent": _number(statement.spent), "budget": _budget(statement.budget)}
            for statement in found.statements
        ],
    }


def _budget(budget: Budget) -> dict[str, object]:
    return {"epsilon": _number(budget.epsilon), "delta": budget.delta}


def _number(epsilon: float) -> float | str:
    return "none" if isinf(epsilon) else epsilon
