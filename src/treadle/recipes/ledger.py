"""A silo's ledger, seen and kept by people: what was spent on which data, whether the chain holds, what is allowed."""

from dataclasses import dataclass
from pathlib import Path

from treadle.privacy.chain import Head
from treadle.privacy.ledger import Budget, Ledger, Statement


@dataclass(frozen=True)
class LedgerView:
    """What stands in a ledger.

    Attributes:
        path: the file.
        head: of its chain, every row of which was checked.
        statements: a data set each, in the order of registration.
    """

    path: Path
    head: Head
    statements: tuple[Statement, ...]


def show_ledger(path: Path) -> LedgerView:
    """The ledger's accounts.

    Raises:
        InputError: there is no ledger.
        FormatError: it is damaged, or a row is broken.
        UnavailableError: it cannot be read, or dp-accounting is not installed.
    """
    ledger = Ledger.open(path)
    return LedgerView(path, ledger.verify(), ledger.statements())


def verify_ledger(path: Path, noted: str | None = None) -> Head:
    """The head of a ledger whose every row was checked.

    Args:
        path: the file.
        noted: a head that was noted down earlier, "NUMBER:HASH".

    Raises:
        InputError: there is no ledger, or `noted` is no head.
        FormatError: it is damaged, a row is broken, or the noted head is not in it.
    """
    head = None if noted is None else Head.parse(noted)
    return Ledger.open(path).verify(head)


def new_ledger(path: Path) -> Path:
    """The path of a new, empty ledger.

    Raises:
        InputError: something is there already.
        UnavailableError: the disk refuses.
    """
    return Ledger.create(path).path


def allow(path: Path, data: str, budget: Budget, *, reason: str) -> LedgerView:
    """The ledger, once a data set's budget was changed on the record.

    Raises:
        InputError: no such ledger or data set, or no reason.
    """
    Ledger.open(path).allow(data, budget, reason=reason)
    return show_ledger(path)


def forget_replies(path: Path, run: str) -> int:
    """How many replies of a run that has ended were deleted; what was spent stays spent.

    Raises:
        InputError: no such ledger.
    """
    return Ledger.open(path).forget_replies(run)
