"""What the commands print: tables and JSON on standard output, progress and remarks on standard error."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from treadle.progress import Progress

_SECONDS_BETWEEN_LINES = 10.0


def say(line: str) -> None:
    """Print one line for a human on standard output."""
    Console(soft_wrap=True, highlight=False).print(escape(line))


def remark(line: str) -> None:
    """Print one line on standard error."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def print_json(content: object) -> None:
    """Print `content` as JSON on standard output; NaN and infinities become null."""
    sys.stdout.write(json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n")


def _finite(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {"base" if key is None else str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple | set | frozenset):
        return [_finite(value) for value in content]
    return content if content is None or isinstance(content, str | int | bool) else str(content)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table under its title; columns whose every cell is a number or a dash stand on the right."""
    table = Table(header_style="bold")
    for place, column in enumerate(columns):
        numeric = all(not isinstance(row[place], str) or row[place] == "–" for row in rows)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    say(title)
    # Where the output is no terminal, rows keep their width: whoever reads it wraps it.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def working(run: Path | None = None) -> Iterator[Progress]:
    """A block of long work, with the callback that tells of it; what libraries print goes to standard error.

    A terminal shows a bar, which is gone afterwards; anything else gets its first line at once, and one every ten
    seconds at most.

    Args:
        run: the TOML file that the work follows; errors about what it names say by which key.
    """
    from treadle.toml import naming_keys

    console = Console(stderr=True)
    naming = contextlib.nullcontext() if run is None else naming_keys(run)
    with contextlib.redirect_stdout(sys.stderr), naming:
        if not console.is_terminal:
            yield _lines()
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, console=console, transient=True) as bars:
            yield _bar(bars)


def _bar(bars: Bars) -> Progress:
    task = bars.add_task("", total=None)

    def show(description: str, done: int, total: int) -> None:
        bars.update(task, description=escape(description), completed=done, total=total or None)

    return show


def _lines() -> Progress:
    started, said = time.monotonic(), -math.inf

    def show(description: str, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < _SECONDS_BETWEEN_LINES:
            return
        said = now
        remark(f"[{now - started:.0f} s] {description}" + (f" ({done}/{total})" if total else ""))

    return show
