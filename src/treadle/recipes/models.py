"""The base models that treadle knows by name, and base folders with a classifier head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle.data.prompts import value_of
from treadle.data.sources import read_rows
from treadle.errors import InputError
from treadle.models.catalogue import CATALOGUE, entry
from treadle.models.fetch import fetched_folder, is_whole
from treadle.progress import Progress, silent


@dataclass(frozen=True)
class ModelRow:
    """One model of the catalogue.

    Attributes:
        name: what a caller types.
        summary: what it is.
        licence: of its weights.
        megabytes: of the download.
        fetched: whether the cache holds it, undamaged.
        folder: where it is, or would be.
        identity: SHA-256 of its weights.
    """

    name: str
    summary: str
    licence: str
    megabytes: int
    fetched: bool
    folder: Path
    identity: str


def list_models() -> list[ModelRow]:
    """Every model of the catalogue, in its order."""
    return [
        ModelRow(
            name=known.name,
            summary=known.summary,
            licence=known.licence,
            megabytes=known.download_megabytes,
            fetched=is_whole(known, fetched_folder(known.name)),
            folder=fetched_folder(known.name),
            identity=known.identity,
        )
        for known in CATALOGUE.values()
    ]


def model_path(name: str) -> Path:
    """The folder of a model that is there already: a catalogue name that has been fetched, or a local folder.

    Raises:
        InputError: there is no such model, or it has not been fetched.
    """
    folder = Path(name).expanduser()
    if name not in CATALOGUE and folder.is_dir():
        return folder.resolve()
    known = entry(name)
    folder = fetched_folder(known.name)
    if not is_whole(known, folder):
        raise InputError("not fetched yet", where=name, remedy=f"run: treadle models fetch {name}")
    return folder


@dataclass(frozen=True)
class HeadExamples:
    """Public examples to fit a head on: a source of `read_rows`, and the fields that hold text and label."""

    source: str
    text: str = "text"
    label: str = "label"


def make_head(
    base: str,
    out: Path,
    *,
    labels: Sequence[str],
    seed: int = 0,
    fit: HeadExamples | None = None,
    progress: Progress = silent,
) -> Path:
    """The new base folder `out`: `base` with a frozen classifier head, drawn from `seed` or fitted on public examples.

    Raises:
        InputError: `out` exists, no such model or file, or a row lacks a field.
        ConfigError: labels that are too few or repeated, or that the examples do not have.
        UnsupportedError: an architecture without a classifier.
    """
    from treadle.models.heads import with_head  # the other commands of models need no torch

    pairs = None if fit is None else _pairs(fit)
    return with_head(base, out, labels=labels, seed=seed, fit=pairs, progress=progress)


def _pairs(fit: HeadExamples) -> list[tuple[str, str]]:
    return [
        (value_of(row, fit.text, where=where), value_of(row, fit.label, where=where))
        for number, row in enumerate(read_rows(fit.source), start=1)
        for where in (f"{fit.source}, row {number}",)
    ]
