"""Banks as folders: built, changed and calibrated, one process at a time.

The public text that a bank was calibrated with is kept beside it (`public-text-DIGEST.json`): a new adapter is then
calibrated with the very same passages, on any machine and under any release of Python.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle import files
from treadle.data.public_text import public_texts
from treadle.errors import InputError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.models.loading import load_model, load_tokenizer
from treadle.progress import Progress, silent
from treadle.recipes.bases import base_folder
from treadle.routing.bank import Access, AdapterBank
from treadle.routing.bank_files import load_bank, save_bank
from treadle.routing.calibration import Calibration, OwnCalibration, PublicCalibration

_KEPT = "public-text"


@dataclass(frozen=True)
class PublicSource:
    """One public text for every adapter.

    Attributes:
        text: "pydoc", the language reference that every Python carries; a .txt file; or a source of `read_rows`.
        limit: passages at most.
        words: of a passage, at most.
        seed: of the choice of passages.
        field: that holds the text in a row.
    """

    text: str = "pydoc"
    limit: int = 200
    words: int = 60
    seed: int = 0
    field: str = "text"


@dataclass(frozen=True)
class OwnSource:
    """Each adapter's own training text, by adapter name; what it makes is a release that no ε accounts for."""

    texts: Mapping[str, str]
    limit: int = 200
    words: int = 60
    seed: int = 0
    field: str = "text"


Source = PublicSource | OwnSource


@dataclass(frozen=True)
class AdapterPath:
    """An adapter's folder, and the name it shall have in the bank (None: its own)."""

    folder: Path
    name: str | None = None


@dataclass(frozen=True)
class BankChange:
    """A bank after a change, as it now stands in its folder.

    Attributes:
        folder: of the bank.
        bank: as stored.
        recalibrated: whether the change calibrated it anew.
        uncalibrated: adapters that z-scores cannot choose, because no statistics describe them.
    """

    folder: Path
    bank: AdapterBank
    recalibrated: bool
    uncalibrated: tuple[str, ...]


def build_bank(
    folder: Path,
    family: Path,
    adapters: Sequence[AdapterPath],
    *,
    source: Source | None,
    access: Access = "open",
    base: str | None = None,
    progress: Progress = silent,
) -> BankChange:
    """A new bank in `folder`.

    Args:
        folder: to make.
        family: the family's folder.
        adapters: members of the family, or foreign PEFT adapters of the same base.
        source: where calibration text comes from; None leaves the bank uncalibrated.
        access: "required" insists on a permitted set for every row.
        base: where the base model is, if its name does not say.
        progress: told of the calibration.

    Raises:
        InputError: the folder exists, a file is missing, no adapter, or two of one name.
        MismatchError: an adapter of another family, or another base.
        FormatError: a file is damaged.
    """
    if folder.exists():
        raise InputError("already exists", where=folder, remedy="choose another folder, or add to this bank")
    members = AdapterFamily.load(family)
    opened = [Adapter.load(path.folder, family=members, name=path.name) for path in adapters]
    bank = AdapterBank.build(members, opened, access=access)
    with _alone(folder, progress):
        return _stored(folder, bank, source, base, progress)


def add_adapters(
    folder: Path, adapters: Sequence[AdapterPath], *, base: str | None = None, progress: Progress = silent
) -> BankChange:
    """The bank in `folder` with more adapters at its end, calibrated anew if its statistics came from public text.

    Raises:
        InputError: no bank, a file is missing, or a name is taken.
        MismatchError: an adapter of another family, or another base.
        FormatError: a file is damaged.
    """
    with _alone(folder, progress):
        bank = load_bank(folder)
        for path in adapters:
            bank = bank.add(Adapter.load(path.folder, family=bank.family, name=path.name))
        kept = _kept_texts(folder, bank)
        if kept is None:
            return _stored(folder, bank, None, base, progress)
        return _calibrated(folder, bank, kept, base, progress)


def remove_adapters(folder: Path, names: Sequence[str], *, progress: Progress = silent) -> BankChange:
    """The bank in `folder` without these adapters; the others keep their statistics.

    Raises:
        InputError: no bank, an unknown name, or no adapter would be left.
    """
    with _alone(folder, progress):
        bank = load_bank(folder)
        for name in names:
            bank = bank.remove(name)
        return _stored(folder, bank, None, None, progress)


def calibrate_bank(folder: Path, source: Source, *, base: str | None = None, progress: Progress = silent) -> BankChange:
    """The bank in `folder` with statistics from this source.

    Raises:
        InputError: no bank, no text, or an adapter without text of its own.
        MismatchError: another base.
    """
    with _alone(folder, progress):
        return _stored(folder, load_bank(folder), source, base, progress)


def _stored(folder: Path, bank: AdapterBank, source: Source | None, base: str | None, progress: Progress) -> BankChange:
    """Write the bank, calibrated by `source` if there is one."""
    if source is not None:
        return _calibrated(folder, bank, _calibration(source, bank.names), base, progress)
    progress("writing the bank", 0, 0)
    save_bank(bank, folder)
    return BankChange(folder, bank, False, _uncalibrated(bank))


def _calibrated(
    folder: Path, bank: AdapterBank, calibration: Calibration, base: str | None, progress: Progress
) -> BankChange:
    place = str(base_folder(bank.family.base, base, progress=progress))
    progress("loading the base model", 0, 0)
    model, tokenizer = load_model(place), load_tokenizer(place)
    ready = bank.calibrate(calibration, model=model, tokenizer=tokenizer, progress=progress)
    progress("writing the bank", 0, 0)
    store_bank(ready, folder, calibration)
    return BankChange(folder, ready, True, _uncalibrated(ready))


def _calibration(source: Source, names: Sequence[str]) -> Calibration:
    if isinstance(source, PublicSource):
        found = public_texts(source.text, limit=source.limit, words=source.words, seed=source.seed, field=source.field)
        return PublicCalibration(found.passages, name=_label(source.text))
    missing = [name for name in names if name not in source.texts]
    if missing:
        raise InputError(f"no text of its own for adapter {missing[0]!r}", remedy=f"pass --own {missing[0]}=FILE")
    unknown = [name for name in source.texts if name not in names]
    if unknown:
        raise InputError(f"no adapter {unknown[0]!r} in the bank", remedy=f"choose among {', '.join(names)}")
    # The same reader cuts any text into passages; nothing here becomes public by it.
    return OwnCalibration(
        {
            name: public_texts(
                text, limit=source.limit, words=source.words, seed=source.seed, field=source.field
            ).passages
            for name, text in source.texts.items()
        }
    )


def _label(text: str) -> str:
    """What the bank calls the text: a file's own name, never its path."""
    return Path(text).name if Path(text).exists() else text


def _uncalibrated(bank: AdapterBank) -> tuple[str, ...]:
    """The adapters that no statistics describe at any layer."""
    if bank.statistics is None:
        return bank.names
    means = bank.statistics.mean.values()
    return tuple(name for place, name in enumerate(bank.names) if all(bool(m[place].isnan()) for m in means))


def store_bank(bank: AdapterBank, folder: Path, calibration: Calibration) -> None:
    """Write the bank with, if it is public, the text that it was calibrated on, so that additions use the same.

    Raises:
        InputError: the folder holds a bank of another family, or something else than a bank.
        UnavailableError: the disk refuses.
    """
    save_bank(bank, folder)
    for old in folder.glob(f"{_KEPT}-*.json"):
        old.unlink()
    if isinstance(calibration, PublicCalibration) and bank.statistics is not None:
        content = {"source": calibration.name, "passages": list(calibration.texts)}
        files.write_json(_kept_file(folder, bank.statistics.digest), content)


def _kept_texts(folder: Path, bank: AdapterBank) -> PublicCalibration | None:
    """The public passages that the bank's statistics came from; None if they came from elsewhere or are lost."""
    if bank.statistics is None or bank.statistics.spends_privacy:
        return None
    path = _kept_file(folder, bank.statistics.digest)
    if not path.exists():
        return None
    passages = files.read_json(path).get("passages")
    if not isinstance(passages, list) or not passages:
        return None
    return PublicCalibration([str(passage) for passage in passages], name=bank.statistics.source)


def _kept_file(folder: Path, digest: str) -> Path:
    return folder / f"{_KEPT}-{digest[:16]}.json"


@contextlib.contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """A block in which no other process of treadle changes the bank in `folder`."""
    lock = folder.parent / f".{folder.name}.lock"
    with files.locked(lock, lambda: progress("waiting for another process that changes this bank", 0, 0)):
        yield
