"""What stands between a voter and an endpoint: its pace, its limits, and pauses that all its threads keep."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from treadle.errors import UnavailableError
from treadle.evaluation.voters.voter import Cost


@dataclass(frozen=True)
class Limits:
    """What a voter may ask for.

    Attributes:
        requests_per_minute: begun at even distances; None for no limit.
        requests: over all runs; None for no limit.
        tokens: read and written, over all runs; requests under way may end above it.
    """

    requests_per_minute: float | None = None
    requests: int | None = None
    tokens: int | None = None


class Gate:
    """Lets requests through one by one; safe for several threads.

    Args:
        limits: to keep.
        spent: tells what has been spent so far.
        now: seconds of a clock that never goes back.
        wait: sleeps so many seconds, or less if the gate closes; None for real sleep.
    """

    def __init__(
        self,
        limits: Limits,
        spent: Callable[[], Cost],
        *,
        now: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._limits, self._spent, self._now = limits, spent, now
        self._closed = threading.Event()
        self._wait = self._closed.wait if wait is None else wait
        self._lock = threading.Lock()
        self._next, self._paused, self._under_way = 0.0, 0.0, 0

    def enter(self) -> None:
        """Return when a request may begin.

        Raises:
            UnavailableError: a limit is reached, or the gate is closed.
        """
        with self._lock:
            self._check()
            self._under_way += 1
        begin = -math.inf
        while begin < self._paused:  # also where a pause was called while this request was waiting for its turn
            begin = self._turn()
            self._sleep_until(begin)

    def _turn(self) -> float:
        """When the next request may begin."""
        with self._lock:
            begin = max(self._now(), self._next)
            if self._limits.requests_per_minute is not None:
                self._next = begin + 60.0 / self._limits.requests_per_minute
            return begin

    def leave(self, count: Callable[[], None]) -> None:
        """Say that a request has ended; `count` adds it to what is spent, so that at no moment it counts twice."""
        with self._lock:
            self._under_way -= 1
            count()

    def _check(self) -> None:
        spent, limits = self._spent(), self._limits
        tokens = spent.prompt_tokens + spent.completion_tokens
        if limits.requests is not None and spent.requests + self._under_way >= limits.requests:
            raise UnavailableError(f"request_limit = {limits.requests} is reached", remedy="raise it and run again")
        if limits.tokens is not None and tokens >= limits.tokens:
            raise UnavailableError(
                f"token_limit = {limits.tokens} is reached, {tokens} are spent", remedy="raise it and run again"
            )

    def sleep(self, seconds: float) -> None:
        """Wait so long; others may go on.

        Raises:
            UnavailableError: the gate is closed.
        """
        self._sleep_until(self._now() + seconds)

    def pause(self, seconds: float) -> None:
        """Let no request begin for so long, and wait oneself.

        Raises:
            UnavailableError: the gate is closed.
        """
        with self._lock:
            until = self._now() + seconds
            self._next, self._paused = max(self._next, until), max(self._paused, until)
        self._sleep_until(until)

    def _sleep_until(self, moment: float) -> None:
        while not self._closed.is_set() and (left := moment - self._now()) > 0.0:
            self._wait(left)
        if self._closed.is_set():
            raise UnavailableError("stopped")

    def close(self) -> None:
        """Wake whoever waits, and let nobody through any more."""
        self._closed.set()
