"""A bank that changes while it serves: each request is answered by one version of it, from beginning to end."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import monotonic

from treadle.errors import FormatError, TreadleError
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_present
from treadle.routing.bank_versions import METADATA, bank_digest
from treadle.routing.routed import RoutedModel

_PAUSE = 5.0  # seconds before a version that could not be opened is tried again


@dataclass
class _Serving:
    """One version, and how many requests it is answering."""

    model: RoutedModel
    digest: str
    requests: int = 0


@dataclass(frozen=True)
class Served:
    """What answers one request.

    Attributes:
        model: routed by one version of the bank.
        digest: of that version (`bank_versions.bank_digest`), for logs and for the keys of prefix caches.
    """

    model: RoutedModel
    digest: str


class LiveBank:
    """The newest version of the bank in a folder, over a base model that is loaded once.

    Whoever changes the folder (`treadle bank add`, in any process) changes what the next request gets; requests that
    have begun end on the version that they began with, whose hooks go when the last of them has ended. A version that
    cannot be opened is left aside: the one before goes on serving, `failure` says why, and it is tried again.

    Args:
        folder: of the bank.
        wrap: bank → routed model, over the same base each time: `lambda bank: RoutedModel(model, bank)`.

    Raises:
        TreadleError: the bank cannot be opened at all.
    """

    def __init__(self, folder: Path, wrap: Callable[[AdapterBank], RoutedModel]) -> None:
        self._folder, self._wrap = folder, wrap
        self._refreshing, self._counting = Lock(), Lock()
        self._seen, self._tried = self._signature(), monotonic()
        self._now = self._opened()
        self.failure: TreadleError | None = None

    @contextlib.contextmanager
    def request(self) -> Iterator[Served]:
        """What answers one request, until the block ends; looks for a newer version first.

        One thread opens the newer version; the others meanwhile begin on the present one.
        """
        if self._outdated() and self._refreshing.acquire(blocking=False):
            try:
                self._refresh()
            finally:
                self._refreshing.release()
        with self._counting:
            serving = self._now
            serving.requests += 1
        try:
            yield Served(serving.model, serving.digest)
        finally:
            with self._counting:
                serving.requests -= 1
                done = serving is not self._now and serving.requests == 0
            if done:
                serving.model.unwrap()

    def close(self) -> None:
        """Give the base model back, without a trace of the bank; requests must have ended."""
        self._now.model.unwrap()

    def _refresh(self) -> None:
        """Put the newest version in the place of the present one, if there is one and it is whole."""
        signature = self._signature()  # before reading: what changes meanwhile is found the next time
        try:
            if bank_digest(self._folder) != self._now.digest:
                fresh = self._opened()
                try:
                    fresh.model.prefetch(self._now.model.wins())  # or the first requests would wait for the disk again
                except Exception:
                    fresh.model.unwrap()
                    raise
                with self._counting:
                    old, self._now = self._now, fresh
                    idle = old.requests == 0
                if idle:
                    old.model.unwrap()
            self.failure = None
        except TreadleError as error:
            self.failure = error
        except Exception as error:  # whatever is wrong with it, the one before goes on serving
            self.failure = FormatError(
                f"{type(error).__name__}: {error}", where=self._folder, remedy="restore the bank"
            )
        self._seen, self._tried = signature, monotonic()

    def _outdated(self) -> bool:
        """Whether to look: `bank.json` is another one, or was not whole a while ago and may be by now."""
        if self._signature() != self._seen:
            return True
        return self.failure is not None and monotonic() - self._tried >= _PAUSE

    def _opened(self) -> _Serving:
        """The newest version, wrapped."""
        bank, digest = load_present(self._folder)
        return _Serving(self._wrap(bank), digest)

    def _signature(self) -> tuple[int, int, int]:
        """What changes whenever `bank.json` is replaced, at the price of one look."""
        try:
            found = (self._folder / METADATA).stat()
        except OSError:  # gone: opening it will say so
            return (0, 0, 0)
        return found.st_mtime_ns, found.st_ino, found.st_size
