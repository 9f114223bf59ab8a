"""What was spent on which data: a silo's own record, which pays before anything is released and refuses over budget.

A ledger is one SQLite file a silo. Data sets have names from the silo's own configuration, which no server sets. Every
row is linked to the one before it, so that a changed or missing row is noticed; what nobody can notice from the file
alone is an older copy put back in its place (a restored backup): note the head that `Ledger.verify` returns, and
compare.
"""

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import Connection

from treadle import files
from treadle.errors import FormatError, InputError, MismatchError
from treadle.privacy import chain, ledger_file
from treadle.privacy.accounting import MechanismEvent
from treadle.privacy.accounts import Account, Accounts
from treadle.privacy.chain import START, Head
from treadle.privacy.entries import Allowed, Budget, Created, Debited, Edited, Entry, Registered, ReleaseKey
from treadle.privacy.entries import decoded as _decoded
from treadle.privacy.entries import encoded as _encoded
from treadle.privacy.sources import source_of

REPLIES_KEPT = 16
"""Of a run and data set: a server that resumes asks again for its last few rounds."""


@dataclass(frozen=True)
class Release:
    """What may leave the silo.

    Attributes:
        payload: the bytes.
        resent: whether they are those of an earlier answer to the same request, which cost nothing again.
    """

    payload: bytes
    resent: bool


@dataclass(frozen=True)
class RunSpending:
    """What one run was given.

    Attributes:
        run: the server's id.
        releases: that were paid for.
        repeated: of those, paid for again, since the silo died before it had kept the reply.
    """

    run: str
    releases: int
    repeated: int


@dataclass(frozen=True)
class Statement:
    """One data set's account.

    Attributes:
        data: its name.
        budget: what the silo allows.
        spent: ε of everything ever released, at the budget's δ; inf once anything was released without noise.
        unaccounted: releases without noise.
        runs: in the order of their first release.
        replies: kept for retries.
        reply_bytes: of those.
        since: when it was registered (UTC, ISO 8601).
        last: when anything about it was last written.
    """

    data: str
    budget: Budget
    spent: float
    unaccounted: int
    runs: tuple[RunSpending, ...]
    replies: int
    reply_bytes: int
    since: str
    last: str


class Ledger:
    """A silo's ledger, open; every call reads what other processes have written meanwhile.

    Make one with `Ledger.create`, once, and `Ledger.open` it from then on: a ledger that is not where it should be is
    an error, never a new one in which nothing has been spent. Release by `release`, which binds paying, making and
    keeping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._accounts = Accounts()
        self._head = START
        self._reading = threading.RLock()

    @classmethod
    def create(cls, path: Path) -> "Ledger":
        """A new, empty ledger at `path`, readable by its owner only.

        Raises:
            InputError: something is there already.
            UnavailableError: the disk refuses.
        """
        secret = secrets.token_bytes(32)
        ledger_file.create(path, secret, _encoded(Created(hashlib.sha256(secret).hexdigest()), time=_now()))
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "Ledger":
        """The ledger at `path`, its chain walked.

        Raises:
            InputError: there is none.
            FormatError: it is something else, damaged, or a row is broken; names the first one.
            UnavailableError: it cannot be read.
        """
        ledger = cls(path)
        ledger.verify()
        return ledger

    def register(self, data: str, *, budget: Budget, source: Path | bytes) -> None:
        """Give a data set its name, budget and identity; again at every start, where only an edit is noted.

        Args:
            data: the name in the silo's configuration, under which all spending on these data is kept for good.
            budget: what the silo allows.
            source: the file, or bytes where the data are in no file. A keyed digest is kept, of content and place.

        Raises:
            InputError: the name is no name, or the file cannot be read.
            MismatchError: another name stands for these data, or the budget is not the one in the ledger.
        """
        files.checked_name(data, where="data set")
        with self._writing() as connection:
            found = source_of(source, ledger_file.secret(connection))
            self._accounts.refuse_twin(data, found)
            account = self._accounts.by_data.get(data)
            if account is None:
                self._append(connection, Registered(data, budget, found))
                return
            if account.budget != budget:
                raise MismatchError(
                    f"its budget in the ledger is {account.budget}, in the configuration {budget}",
                    where=f"data set {data!r}",
                    remedy="`treadle ledger allow` changes it, on the record",
                )
            if account.source != found:
                self._append(connection, Edited(data, found))

    def allow(self, data: str, budget: Budget, *, reason: str) -> None:
        """Change what the silo allows for a data set: an act that stays on record.

        Raises:
            InputError: no such data set, or no reason.
        """
        if not reason.strip():
            raise InputError("no reason", where=f"data set {data!r}", remedy="say why; it stays on record")
        with self._writing() as connection:
            self._account(data)
            self._append(connection, Allowed(data, budget, reason))

    def check(self, data: str, event: MechanismEvent | None) -> None:
        """Return if a run of its own could pay for this release now; nothing is written.

        Raises:
            InputError: no such data set.
            BudgetError: it would cost more than the silo allows.
        """
        with self._caught_up():
            self._account(data).refuse_if_over(event)

    def debit(self, data: str, key: ReleaseKey, event: MechanismEvent | None, *, at_most: int | None = None) -> None:
        """Pay for one release: when this returns, the debit is on the disk.

        Args:
            data: the data set.
            key: the request that is answered.
            event: the mechanism that the release will be made by; None if no ε accounts for it.
            at_most: steps of the mechanism that the run may take in all; None for as many as the budget allows.

        Raises:
            InputError: no such data set.
            BudgetError: it would cost more than the silo allows, all in all or for this run; nothing was written.
            MismatchError: the run began with other noise or another rate; nothing was written.
            UnavailableError: the disk refuses; nothing was written.
        """
        with self._writing() as connection:
            account = self._account(data)
            account.refuse_other_noise(key.run, event)
            if at_most is not None:
                account.refuse_more_steps(key.run, event, at_most)
            account.refuse_if_over(event)
            self._append(connection, Debited(data, key, event))

    def reply(self, data: str, key: ReleaseKey) -> bytes | None:
        """What was released for this very request, if it is kept.

        Raises:
            FormatError: it was changed since.
        """
        with self._caught_up() as connection:
            return ledger_file.reply(connection, _wanted(data, key), where=self.path)

    def keep(self, data: str, key: ReleaseKey, payload: bytes) -> None:
        """Keep what is about to be released, for retries; of a run the newest 16 are.

        Raises:
            InputError: nothing was paid for this request, or its reply is kept already.
            UnavailableError: the disk refuses.
        """
        with self._writing() as connection:
            wanted = _wanted(data, key)
            if not self._account(data).debits[key]:
                raise InputError("no debit stands for this reply", where=self.path, remedy="use treadle's `release`")
            if ledger_file.reply(connection, wanted, where=self.path) is not None:
                raise InputError("another reply to this request is kept", where=self.path, remedy="send that one")
            ledger_file.keep(connection, wanted, payload, at_most=REPLIES_KEPT)

    def forget_replies(self, run: str) -> int:
        """Delete the replies kept for a run that has ended; how many there were. What was spent stays spent."""
        with self._writing() as connection:
            return ledger_file.forget(connection, run)

    def spent(self, data: str) -> float:
        """ε of all that was ever released of these data, at their budget's δ; inf once anything went without noise.

        Raises:
            InputError: no such data set.
        """
        with self._caught_up():
            return self._account(data).spent()

    def statements(self) -> tuple[Statement, ...]:
        """Every data set's account, in the order of registration."""
        with self._caught_up() as connection:
            kept = ledger_file.kept(connection)
            return tuple(
                Statement(
                    account.data,
                    account.budget,
                    account.spent(),
                    account.unaccounted,
                    _runs(account),
                    *kept.get(account.data, (0, 0)),
                    account.since,
                    account.last,
                )
                for account in self._accounts.by_data.values()
            )

    def verify(self, noted: Head | None = None) -> Head:
        """The chain's head, once every row has been checked from the first.

        Args:
            noted: a head that was noted down earlier: a ledger that no longer leads there is not the one it was.

        Raises:
            FormatError: a row is broken, and which is the first; or the noted head is not in the chain.
        """
        with self._reading:
            self._accounts, self._head = Accounts(), START
        with self._caught_up() as connection:
            if noted is not None and noted != START:
                row = ledger_file.row_at(connection, noted.number)
                if row is None or row.hash != noted.hash:
                    raise FormatError(
                        f"row {noted.number} is not the one that was noted, or is missing: an older copy was put back",
                        where=self.path,
                        remedy="release nothing until the newest copy is found; what it spent since is not in this one",
                    )
            return self._head

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with ledger_file.writing(self.path) as connection, self._reading:
            self._catch_up(connection)
            yield connection

    @contextmanager
    def _caught_up(self) -> Iterator[Connection]:
        with ledger_file.reading(self.path) as connection, self._reading:
            self._catch_up(connection)
            yield connection

    def _catch_up(self, connection: Connection) -> None:
        """Check and enter the rows that were written since the last call."""
        until = ledger_file.head(connection)
        seen = ledger_file.row_at(connection, self._head.number)
        if self._head != START and (seen is None or seen.hash != self._head.hash):
            raise FormatError(
                f"row {self._head.number} is not what it was a moment ago: another copy was put in its place",
                where=self.path,
                remedy="release nothing until you know why",
            )
        rows = list(ledger_file.rows_after(connection, self._head.number))
        chain.checked(rows, after=self._head, until=until, where=self.path)
        for row in rows:
            where = f"{self.path}: row {row.number}"
            time, entry = _decoded(row.body, where=where)
            self._accounts.add(entry, time=time, where=where)
            self._head = Head(row.number, row.hash)
        if hashlib.sha256(ledger_file.secret(connection)).hexdigest() != self._accounts.secret_sha256:
            raise FormatError("its secret was exchanged", where=self.path, remedy="restore the ledger")

    def _append(self, connection: Connection, entry: Entry) -> None:
        """Write a row; it counts from the next catching up, so never before it is on the disk."""
        body = _encoded(entry, time=_now())
        _decoded(body, where=self.path)  # a row that could not be read again would be the ledger's last
        ledger_file.append(connection, body)

    def _account(self, data: str) -> Account:
        account = self._accounts.by_data.get(data)
        if account is None:
            known = ", ".join(self._accounts.by_data) or "nothing yet"
            raise InputError(f"no data set {data!r}", where=self.path, remedy=f"register it; the ledger knows {known}")
        return account


def release(
    ledger: Ledger,
    data: str,
    key: ReleaseKey,
    event: MechanismEvent | None,
    make: Callable[[], bytes],
    *,
    at_most: int | None = None,
) -> Release:
    """What may leave the silo for this request: the one way to release anything.

    The same request gets the same bytes, free of charge. Otherwise the debit is on the disk before `make` begins, and
    the reply is kept before it is returned. If the process dies in between, or `make` fails, the debit stands; the
    retry pays again and draws fresh noise. Releases of one data set wait for one another, so that a retry never
    overtakes the answer it asks for.

    Args:
        ledger: the silo's.
        data: the data set's name in it.
        key: what is asked.
        event: the mechanism that `make` applies; None if no ε accounts for it.
        make: draws, computes, clips, noises; never called without a debit.
        at_most: steps of the mechanism that the run may take in all; None for as many as the budget allows.

    Raises:
        InputError: no such data set.
        BudgetError: the silo allows no more; `make` was not called.
        MismatchError: the run began with other noise or another rate; `make` was not called.
        UnavailableError: the disk refuses; nothing may leave.
    """
    files.checked_name(data, where="data set")
    with ledger_file.locked(ledger.path, data):
        kept = ledger.reply(data, key)
        if kept is not None:
            return Release(kept, resent=True)
        ledger.debit(data, key, event, at_most=at_most)
        payload = make()
        ledger.keep(data, key, payload)
        return Release(payload, resent=False)


def _runs(account: Account) -> tuple[RunSpending, ...]:
    found: dict[str, tuple[int, int]] = {}
    for key, times in account.debits.items():
        releases, repeated = found.get(key.run, (0, 0))
        found[key.run] = (releases + times, repeated + times - 1)
    return tuple(RunSpending(run, *counts) for run, counts in found.items())


def _wanted(data: str, key: ReleaseKey) -> ledger_file.Wanted:
    return ledger_file.Wanted(data, key.run, key.server_round, key.request)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
