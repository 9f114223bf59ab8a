"""The command line's one entrance, and the one place where errors become a line and an exit code.

0    done
1    failed: something outside is missing, or treadle is wrong
2    bad input: a file, a key, an argument
130  interrupted
"""

import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from treadle import __version__
from treadle.cli import (
    audit,
    bank,
    bench,
    classify,
    demo,
    eval,
    family,
    federate,
    inspect,
    ledger,
    models,
    plan,
    route,
    train,
)
from treadle.errors import InputError, TreadleError

HELP = """Fleets of LoRA adapters over one frozen base model: planned, trained, banked and routed.

\b
    treadle demo --quick                       all of it, small, on real parts
    treadle inspect FOLDER                     what an adapter, a family or a bank is
    treadle route BANK "some text"             which adapter acts where, and why
"""

ORDER = (
    *("models", "plan", "family", "classify", "train", "federate", "ledger", "audit"),
    *("inspect", "bank", "route", "eval", "demo", "bench"),
)


class _Help(click.HelpFormatter):
    r"""Help pages without the `\[` that typer writes for `[` wherever rich is installed."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write names and what is said of them, in two columns."""
        super().write_dl([(name, text.replace("\\[", "[")) for name, text in rows], col_max, col_spacing)


click.Context.formatter_class = _Help  # the one place from which typer's commands of every depth take it


class Commands(TyperGroup):
    """The group whose commands end in an exit code, never in a traceback that nobody asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the work."""
        return list(ORDER)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """What stands before a command, parsed.

        Raises:
            typer.Exit: with code 2, after one line on standard error, or the help where nothing was given.
        """
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _refused(error) from error

    def invoke(self, ctx: click.Context) -> object:
        """What the command returns.

        Raises:
            typer.Exit: with code 1, 2 or 130, after one line on standard error.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            _print_error("interrupted; what was saved before is whole")
            raise typer.Exit(130) from stopped
        except click.UsageError as error:
            raise _refused(error) from error
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except TreadleError as error:
            _explain(ctx)
            _print_error(str(error))
            raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
        except Exception as error:
            _explain(ctx)
            kind = type(error).__name__
            _print_error(f"{kind}: {' '.join(str(error).split())[:300]}; treadle --debug … shows where")
            raise typer.Exit(1) from error


def _refused(error: click.UsageError) -> typer.Exit:
    """The end of a command line that cannot be parsed, once it is explained."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
    else:
        path = error.ctx.command_path if error.ctx else "treadle"
        _print_error(f"{error.format_message().rstrip('.')}; see {path} --help")
    return typer.Exit(2)


def _explain(ctx: click.Context) -> None:
    """Print the traceback if `--debug` asked for it."""
    if ctx.params.get("debug"):
        traceback.print_exc()


def _print_error(line: str) -> None:
    sys.stderr.write(f"treadle: {line}\n")


app = typer.Typer(
    cls=Commands,
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click suggests them too
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"treadle {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Take the options that stand before a command."""


for module in (
    *(models, plan, family, classify, train, federate, ledger, audit),
    *(inspect, bank, route, eval, demo, bench),
):
    module.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and leave Python with its exit code.

    Args:
        arguments: None for those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # --debug is welcome behind the command too, where people append it after an error.
    asked = "--debug" in given[: given.index("--")] if "--" in given else "--debug" in given
    app(["--debug", *(a for a in given if a != "--debug")] if asked else given, prog_name="treadle")
