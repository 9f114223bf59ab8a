"""Options that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]


def _writable(page: Path | None) -> Path | None:
    """The path, if a page can be written there once the work is done."""
    from treadle.files import refuse_unwritable

    if page is not None:
        refuse_unwritable(page)
    return page


Html = Annotated[
    Path | None, typer.Option("--html", callback=_writable, help="Write one self-contained page to this file.")
]

Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="Where the base model is, if its name does not say: a folder, catalogue name or hub id."
    ),
]

Bank = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder.")]

Policy = Annotated[Path, typer.Option("--policy", metavar="FILE", help="The policy that says who may use what.")]

Caller = Annotated[str, typer.Option("--caller", metavar="NAME", help="Who asks, as the service knows them.")]

Data = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="What the request's data are; repeat it.")
]

# Spelled out, since help must not wait for torch; a test holds them to what the library knows.
ScorerName = Literal[
    "seqr",
    "seqr-qr",
    "norm",
    "ratio",
    "arrow",
    "arrow-parameters",
    "spectr",
    "lag",
    "mean",
    "perplexity",
    "linear",
]

GranularityName = Literal["sequence", "evidence", "token", "layer"]


def _read(path: Path | None) -> Path | None:
    """The path, once its file can be read: whoever mistypes it need not wait for torch."""
    if path is not None:
        from treadle.toml import read_toml

        read_toml(path)
    return path


Run = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's configuration.", callback=_read)]

OptionalRun = Annotated[
    Path | None, typer.Argument(metavar="[RUN.toml]", help="The run's configuration.", callback=_read)
]
