"""A chain of hashes over rows: whoever changes, drops or inserts a row without redoing all later ones is noticed.

hash_n = SHA-256(hash_(n−1) ‖ body_n), hash_0 = 32 zero bytes. The head, (number, hash) of the last row, stands beside
the rows, since the rows alone cannot tell that the last of them are gone.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from treadle.errors import FormatError, InputError


@dataclass(frozen=True)
class Head:
    """How far a chain reaches.

    Attributes:
        number: of its last row, counted from 1; 0 before the first.
        hash: of that row.
    """

    number: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.number}:{self.hash.hex()}"

    @classmethod
    def parse(cls, text: str) -> "Head":
        """The head that `str` wrote.

        Raises:
            InputError: it is no number, colon and 64 hex digits.
        """
        number, _, digits = text.partition(":")
        try:
            found = cls(int(number), bytes.fromhex(digits))
        except ValueError as error:
            raise _no_head(text) from error
        if not 0 <= found.number < 2**63 or len(found.hash) != len(START.hash):
            raise _no_head(text)
        return found


START = Head(0, bytes(32))


def _no_head(text: str) -> InputError:
    return InputError(
        f"{text!r} is no head of a ledger", remedy="give NUMBER:HASH as `treadle ledger verify` prints it"
    )


@dataclass(frozen=True)
class Row:
    """One row as it is stored."""

    number: int
    body: bytes
    hash: bytes


def linked(head: Head, body: bytes) -> Row:
    """The row that follows `head`."""
    return Row(head.number + 1, body, hashlib.sha256(head.hash + body).digest())


def checked(rows: Iterable[Row], *, after: Head, until: Head, where: object) -> Head:
    """`until`, if the rows lead to it from `after` one by one.

    Raises:
        FormatError: they do not; names the first row that is wrong.
    """
    reached = after
    for row in rows:
        expected = linked(reached, row.body)
        if row.number != expected.number:
            raise _broken(where, expected.number, "is missing")
        if row.hash != expected.hash:
            raise _broken(where, row.number, "was changed")
        reached = Head(row.number, row.hash)
    if reached.number < until.number:
        raise _broken(where, reached.number + 1, "is missing")
    if reached != until:
        raise _broken(where, until.number, "is not the last one that was written")
    return reached


def _broken(where: object, number: int, what: str) -> FormatError:
    return FormatError(
        f"row {number} {what}", where=where, remedy="release nothing until you know why; see docs/ledger.md"
    )
