"""Options that several commands share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]

Html = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page to this file.")]

Base = Annotated[
    str | None,
    typer.Option(
        "--base", help="Where the base model is, if its name does not say: a folder, catalogue name or hub id."
    ),
]

Run = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's configuration.")]
