"""Banks as folders: built, changed and calibrated, one process at a time.

The public text that a bank was calibrated with is kept beside it (`public-text-DIGEST.json`): a new adapter is then
calibrated with the very same passages, on any machine and under any release of Python. Each change is a new version;
see `routing.bank_versions`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle import files
from treadle.errors import InputError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.progress import Progress, silent
from treadle.recipes.calibration import (
    OwnSource,
    PublicSource,
    ReleasedSource,
    Source,
    TrafficSource,
    calibrated,
    calibration_of,
    collected_traffic,
)
from treadle.routing.access import Labels
from treadle.routing.bank import Access, AdapterBank
from treadle.routing.bank_files import kept_passages, load_bank, save_bank
from treadle.routing.bank_versions import sweep, versions
from treadle.routing.calibration import AnalyticCalibration, Calibration, PublicCalibration, PublicText, drift


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
        recalibrated: whether the change took statistics of adapters from text.
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
    source: PublicSource | OwnSource | None,
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
    _refuse_existing(folder)
    members = AdapterFamily.load(family)
    opened = [Adapter.load(path.folder, family=members, name=path.name) for path in adapters]
    bank = AdapterBank.build(members, opened, access=access)
    with _alone(folder, progress):
        _refuse_existing(folder)  # somebody else may have been quicker
        return _written(folder, bank, progress) if source is None else _stored(folder, bank, source, base, progress)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise InputError("already exists", where=folder, remedy="choose another folder, or add to this bank")


def add_adapters(
    folder: Path,
    adapters: Sequence[AdapterPath],
    *,
    labels: Labels = frozenset(),
    base: str | None = None,
    progress: Progress = silent,
) -> BankChange:
    """The bank in `folder` with more adapters at its end; their statistics are made as the others' were.

    Args:
        folder: of the bank.
        adapters: to add; the others' factors and statistics stay as they are, bit for bit.
        labels: that each of them carries.
        base: where the base model is, if its name does not say; read only where statistics need it.
        progress: told of the calibration.

    Raises:
        InputError: no bank, a file is missing, or a name is taken.
        MismatchError: an adapter of another family, or another base.
        FormatError: a file is damaged.
    """
    return _joined(folder, adapters, labels, base, progress, replacing=False)


def update_adapters(
    folder: Path,
    adapters: Sequence[AdapterPath],
    *,
    labels: Labels = frozenset(),
    base: str | None = None,
    progress: Progress = silent,
) -> BankChange:
    """The bank in `folder` with these adapters in the places of those of their names.

    Args:
        folder: of the bank.
        adapters: whose names are in the bank.
        labels: that each of them carries from now on; none leaves them those that the replaced ones carried.
        base: as in `add_adapters`.
        progress: told of the calibration.

    Raises:
        InputError: no bank, a file is missing, or no adapter of a name.
        MismatchError: an adapter of another family, or another base.
        FormatError: a file is damaged.
    """
    return _joined(folder, adapters, labels, base, progress, replacing=True)


def _joined(
    folder: Path,
    adapters: Sequence[AdapterPath],
    labels: Labels,
    base: str | None,
    progress: Progress,
    *,
    replacing: bool,
) -> BankChange:
    with _alone(folder, progress):
        bank = load_bank(folder)
        opened = [Adapter.load(path.folder, family=bank.family, name=path.name) for path in adapters]
        for adapter in opened:
            if replacing:
                bank.adapter(adapter.name)
            elif adapter.name in bank.names:
                raise InputError(
                    "this adapter name is taken", where=adapter.name, remedy="give it another name, or update it"
                )
        fresh = AdapterBank.build(bank.family, opened)
        for name in fresh.names if labels else ():
            fresh = fresh.labelled(name, labels)
        measured, read = _measured(folder, bank, fresh, base, progress)
        return _written(folder, bank.merge(measured, replacing=replacing), progress, recalibrated=read)


def merge_banks(folder: Path, other: Path, *, base: str | None = None, progress: Progress = silent) -> BankChange:
    """The bank in `folder` with all adapters of the bank in `other` at its end, their labels included.

    Statistics that the other bank took in another way are made anew, as this bank's were.

    Raises:
        InputError: a bank is missing, or both have an adapter of one name.
        MismatchError: banks of two families.
    """
    with _alone(folder, progress):
        bank, theirs = load_bank(folder), load_bank(other)
        bank.merge(theirs)  # refuses before anything is measured
        mine, found = bank.statistics, theirs.statistics
        if mine is None or (found is not None and mine.alike(found)):
            return _written(folder, bank.merge(theirs), progress)
        measured, read = _measured(folder, bank, theirs, base, progress)
        return _written(folder, bank.merge(measured), progress, recalibrated=read)


def label_adapter(folder: Path, name: str, labels: Labels, *, progress: Progress = silent) -> BankChange:
    """The bank in `folder`, in which this adapter carries these labels and no others.

    Raises:
        InputError: no bank, or no such adapter.
    """
    with _alone(folder, progress):
        return _written(folder, load_bank(folder).labelled(name, labels), progress)


def roll_back(folder: Path, to: int | None = None, *, progress: Progress = silent) -> BankChange:
    """The bank in `folder` as it was in an earlier version, the one before this if none is named; a new version.

    Raises:
        InputError: no bank, no such version, or none before this one.
        FormatError: a file of that version is damaged.
    """
    with _alone(folder, progress):
        kept = versions(folder)
        if to is None and len(kept) == 1:
            raise InputError("there is no earlier version", where=folder, remedy="see `treadle bank versions`")
        return _written(folder, load_bank(folder, version=kept[-2].number if to is None else to), progress)


def forget_versions(folder: Path, *, progress: Progress = silent) -> int:
    """How many earlier versions were deleted, with every file that only they named: nobody can go back to them.

    Raises:
        InputError: no bank.
    """
    with _alone(folder, progress):
        earlier = len(versions(folder)) - 1
        sweep(folder, keep=1)
        return earlier


def remove_adapters(folder: Path, names: Sequence[str], *, progress: Progress = silent) -> BankChange:
    """The bank in `folder` without these adapters; the others keep their statistics.

    Raises:
        InputError: no bank, an unknown name, or no adapter would be left.
    """
    with _alone(folder, progress):
        bank = load_bank(folder)
        for name in names:
            bank = bank.remove(name)
        return _written(folder, bank, progress)


def calibrate_bank(
    folder: Path,
    source: Source,
    *,
    if_stale: TrafficSource | None = None,
    base: str | None = None,
    progress: Progress = silent,
) -> BankChange:
    """The bank in `folder` with statistics from this source.

    Args:
        folder: of the bank.
        source: of the statistics.
        if_stale: traffic; unless it has left the present statistics (`routing.calibration.drift`), nothing is done.
        base: where the base model is, if its name does not say.
        progress: told of the calibration.

    Raises:
        InputError: no bank, no text, too little traffic, or an adapter without text of its own.
        MismatchError: another base.
    """
    with _alone(folder, progress):
        bank = load_bank(folder)
        seen = None if if_stale is None else collected_traffic(bank, if_stale, base, progress)
        if seen is not None and bank.statistics is not None and not drift(bank.statistics, seen, bank.adapters).stale:
            return BankChange(folder, bank, False, _uncalibrated(bank))
        if not isinstance(source, TrafficSource):
            return _stored(folder, bank, source, base, progress)
        if seen is None or source != if_stale:
            seen = collected_traffic(bank, source, base, progress)
        return _written(folder, bank.with_statistics(seen.statistics(bank.adapters)), progress, recalibrated=True)


def _stored(
    folder: Path,
    bank: AdapterBank,
    source: PublicSource | OwnSource | ReleasedSource,
    base: str | None,
    progress: Progress,
) -> BankChange:
    """Write the bank, calibrated by `source`."""
    calibration = calibration_of(source, bank.names)
    ready = calibrated(bank, calibration, base, progress)
    progress("writing the bank", 0, 0)
    store_bank(ready, folder, calibration)
    return BankChange(folder, ready, True, _uncalibrated(ready))


def _written(folder: Path, bank: AdapterBank, progress: Progress, *, recalibrated: bool = False) -> BankChange:
    progress("writing the bank", 0, 0)
    save_bank(bank, folder)
    return BankChange(folder, bank, recalibrated, _uncalibrated(bank))


def _measured(
    folder: Path, bank: AdapterBank, fresh: AdapterBank, base: str | None, progress: Progress
) -> tuple[AdapterBank, bool]:
    """A bank of new adapters with statistics made as those of `bank` were, and whether text was read for that.

    None is read for members of the family under `analytic`: the bank's own moments describe them when banks merge.
    """
    passages, found = kept_passages(folder, bank), bank.statistics
    unknown = set(fresh.names) & set(_uncalibrated(bank.merge(fresh, replacing=True)))
    if found is None or not passages or not unknown:
        return fresh, False
    kind = AnalyticCalibration if found.method == "analytic" else PublicCalibration
    return calibrated(fresh, kind(passages, name=found.source), base, progress), True


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
    save_bank(bank, folder, passages=calibration.texts if isinstance(calibration, PublicText) else ())


@contextlib.contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """A block in which no other process of treadle changes the bank in `folder`."""
    folder = folder.resolve()  # one bank, one lock, however its path is written
    lock = folder.parent / f".{folder.name}.lock"
    with files.locked(lock, lambda: progress("waiting for another process that changes this bank", 0, 0)):
        yield
