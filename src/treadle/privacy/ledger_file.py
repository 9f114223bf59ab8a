"""The SQLite file under a ledger: rows in a hash chain, their head, replies, a secret; and errors of one line.

    chain     number, body (JSON), hash        appended to, never changed
    head      number, hash                     of the last row
    secret    32 random bytes                  keys the digests of data
    replies   what was sent for which request  may be deleted

A transaction is on the disk when `writing` ends: journal_mode=DELETE with synchronous=EXTRA, which is FULL and also
syncs the folder after the journal is gone. With FULL alone a power cut could bring the journal back, and undo a debit.
"""

import contextlib
import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from treadle import files
from treadle.errors import FormatError, InputError, TreadleError, UnavailableError
from treadle.privacy.chain import START, Head, Row, linked

APPLICATION_ID = 0x7472646C  # "trdl", in the header of the file
FORMAT = 1
_BUSY_SECONDS = 60.0
_SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
    "CREATE TABLE chain (number INTEGER PRIMARY KEY, body BLOB NOT NULL, hash BLOB NOT NULL) STRICT",
    "CREATE TABLE head (one INTEGER PRIMARY KEY CHECK (one = 1), number INTEGER NOT NULL, hash BLOB NOT NULL) STRICT",
    "CREATE TABLE secret (one INTEGER PRIMARY KEY CHECK (one = 1), bytes BLOB NOT NULL) STRICT",
    """CREATE TABLE replies (data TEXT, run TEXT, server_round INTEGER, request TEXT, payload BLOB NOT NULL,
       sha256 BLOB NOT NULL, PRIMARY KEY (data, run, server_round, request)) STRICT""",
)
_DAMAGED = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT}


@dataclass(frozen=True)
class Wanted:
    """Which reply: the data set's name and the server's request."""

    data: str
    run: str
    server_round: int
    request: str

    @property
    def columns(self) -> tuple[str, str, int, str]:
        """The key's columns, in the table's order."""
        return (self.data, self.run, self.server_round, self.request)


def create(path: Path, secret: bytes, first: bytes) -> None:
    """Make a ledger whose only row is `first`: it is whole or it is not there.

    Raises:
        InputError: something is there already.
        UnavailableError: the disk refuses.
    """
    with locked(path):
        if path.exists():
            raise InputError("already exists", where=path, remedy="choose another file")
        with told(path):
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
            os.close(handle)
            try:
                with contextlib.closing(_open(Path(name))) as connection, _transaction(connection):
                    for statement in _SCHEMA:
                        connection.execute(statement)
                    connection.execute("INSERT INTO secret VALUES (1, ?)", (secret,))
                    connection.execute("INSERT INTO head VALUES (1, ?, ?)", (START.number, START.hash))
                    append(connection, first)
                os.replace(name, path)  # the mode stays mkstemp's 0600: the secret is in there
                files.sync_folder(path.parent)
            finally:
                Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger's file, open; the block sees one state of it and writes nothing.

    Raises:
        InputError: there is no such file.
        FormatError: it is no ledger, or it is damaged.
        UnavailableError: it cannot be read.
    """
    _check_there(path)
    with told(path), contextlib.closing(_checked(path)) as connection:
        connection.execute("BEGIN")
        yield connection
        connection.rollback()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger's file, open for the one writer; what the block writes is on the disk when it ends, or not at all.

    Raises:
        InputError: there is no such file.
        FormatError: it is no ledger, or it is damaged.
        UnavailableError: the disk refuses; the file is as it was.
    """
    _check_there(path)
    with locked(path), told(path), contextlib.closing(_checked(path)) as connection, _transaction(connection):
        yield connection


@contextlib.contextmanager
def locked(path: Path, name: str = "") -> Iterator[None]:
    """A block that one process and thread at a time is in, by a lock file beside the ledger.

    Raises:
        UnavailableError: the folder cannot be written to.
    """
    file = path.with_name(f"{path.name}.{name}.lock" if name else f"{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(file, lambda: None))
        except OSError as error:
            raise _refused(path, error.strerror or str(error)) from error
        yield


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise InputError("no such ledger", where=path, remedy="check the path, or make one with `treadle ledger new`")


def _checked(path: Path) -> sqlite3.Connection:
    """The file, open, if it is a ledger of this format."""
    connection = _open(path)
    try:
        if connection.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise FormatError("is not a ledger", where=path, remedy="name the file that `treadle ledger new` made")
        if connection.execute("PRAGMA user_version").fetchone() != (FORMAT,):
            raise FormatError(f"is not of format {FORMAT}", where=path, remedy="use the treadle that made it")
    except BaseException:
        connection.close()
        raise
    return connection


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=_BUSY_SECONDS
    )
    try:
        for setting in ("journal_mode = DELETE", "synchronous = EXTRA", "fullfsync = ON", "trusted_schema = OFF"):
            connection.execute(f"PRAGMA {setting}").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """A block whose errors from SQLite and the disk become one line about `path`."""
    try:
        yield
    except TreadleError:
        raise
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _DAMAGED:
            raise FormatError(f"is damaged, or no ledger ({error})", where=path, remedy="restore it") from error
        raise _refused(path, str(error)) from error
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error


def _refused(path: Path, why: str) -> UnavailableError:
    return UnavailableError(
        f"cannot be used ({why}); nothing may be released without it",
        where=path,
        remedy="free space, or mend the folder's rights",
    )


def head(connection: sqlite3.Connection) -> Head:
    """How far the file says that its chain reaches."""
    found = connection.execute("SELECT number, hash FROM head").fetchone()
    return START if found is None else Head(*found)


def rows_after(connection: sqlite3.Connection, number: int) -> Iterable[Row]:
    """The rows behind row `number`, in order."""
    found = connection.execute("SELECT number, body, hash FROM chain WHERE number > ? ORDER BY number", (number,))
    return (Row(*row) for row in found)


def row_at(connection: sqlite3.Connection, number: int) -> Row | None:
    """The row of this number."""
    found = connection.execute("SELECT number, body, hash FROM chain WHERE number = ?", (number,)).fetchone()
    return None if found is None else Row(*found)


def append(connection: sqlite3.Connection, body: bytes) -> None:
    """Put one more row behind the last."""
    row = linked(head(connection), body)
    connection.execute("INSERT INTO chain VALUES (?, ?, ?)", (row.number, row.body, row.hash))
    connection.execute("UPDATE head SET number = ?, hash = ?", (row.number, row.hash))


def secret(connection: sqlite3.Connection) -> bytes:
    """The 32 bytes that key the digests of data."""
    found = connection.execute("SELECT bytes FROM secret").fetchone()
    return b"" if found is None else bytes(found[0])


def reply(connection: sqlite3.Connection, wanted: Wanted, *, where: object) -> bytes | None:
    """What was sent for the request; None if nothing is kept.

    Raises:
        FormatError: the bytes are not those that were kept.
    """
    found = connection.execute(
        "SELECT payload, sha256 FROM replies WHERE (data, run, server_round, request) = (?, ?, ?, ?)", wanted.columns
    ).fetchone()
    if found is None:
        return None
    if hashlib.sha256(found[0]).digest() != found[1]:
        raise FormatError(
            f"the reply kept for round {wanted.server_round} of run {wanted.run!r} was changed",
            where=where,
            remedy=f"`treadle ledger forget` run {wanted.run!r}; another reply costs another debit",
        )
    return bytes(found[0])


def keep(connection: sqlite3.Connection, wanted: Wanted, payload: bytes, *, at_most: int) -> None:
    """Keep a reply, and of the same run and data set the newest ones up to that number."""
    digest = hashlib.sha256(payload).digest()
    connection.execute("INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?)", (*wanted.columns, payload, digest))
    mine = (wanted.data, wanted.run)
    connection.execute(
        """DELETE FROM replies WHERE data = ? AND run = ? AND rowid NOT IN
           (SELECT rowid FROM replies WHERE data = ? AND run = ? ORDER BY rowid DESC LIMIT ?)""",
        (*mine, *mine, at_most),
    )


def forget(connection: sqlite3.Connection, run: str) -> int:
    """Delete the run's replies; how many there were."""
    return connection.execute("DELETE FROM replies WHERE run = ?", (run,)).rowcount


def kept(connection: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    """Data set → how many replies are kept, and their bytes together."""
    found = connection.execute("SELECT data, count(*), sum(length(payload)) FROM replies GROUP BY data")
    return {data: (count, size) for data, count, size in found}
