"""A voter's requests to its endpoint: several at a time, tried again where that may help, stopped where it cannot."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from treadle.errors import TreadleError, UnavailableError
from treadle.evaluation.voters.chat import Reply, Trouble, open_chat
from treadle.evaluation.voters.endpoint_settings import EndpointVoter
from treadle.evaluation.voters.gate import Gate
from treadle.evaluation.voters.kept import KeptAnswers
from treadle.progress import Progress

_OF_THE_PROMPT = {400, 413, 422}


class Asking:
    """One run's requests to one endpoint.

    Args:
        settings: of the voter.
        key: for the endpoint; "" for none.
        form: of the reply, as a `response_format`; None for any.
        kept: where answers are.
        patience: prompts in a row whose every attempt fails, before the endpoint is taken to be down.
    """

    def __init__(
        self,
        settings: EndpointVoter,
        key: str,
        form: Mapping[str, object] | None,
        kept: KeptAnswers,
        *,
        patience: int,
    ) -> None:
        self._settings, self._kept = settings, kept
        self._form = form
        self._chat = open_chat(settings.url, key=key, timeout=settings.timeout)
        self._gate = Gate(settings.limits, lambda: kept.cost)
        self._troubles: list[str] = []
        self._patience, self._in_a_row = patience, 0
        self._lock = threading.Lock()
        self._error: TreadleError | None = None

    def remarks(self) -> tuple[str, ...]:
        """What went wrong on the way and was mended."""
        unstructured = self._settings.structured and self._form is None
        said = ["the endpoint takes no response_format; replies were read as text"] if unstructured else []
        troubles = [f"{reason} {count} times" for reason, count in sorted(Counter(self._troubles).items())]
        return (*said, *([f"tried again after: {', '.join(troubles)}"] if troubles else []))

    def all(self, bodies: Mapping[str, Mapping[str, object]], progress: Progress) -> dict[str, str]:
        """The prompts that got no answer, each with the reason; the others' answers are kept.

        Args:
            bodies: digest → body of the request.
            progress: told of every prompt.

        Raises:
            UnavailableError: see `endpoint_voter`.
        """
        failures: dict[str, str] = {}
        with self._chat.client:
            try:
                # After an error the gate is closed, and what is under way, which may be paid for, is waited for.
                results = parallel(lambda key: self._work(key, bodies[key]), list(bodies), self._settings.parallel)
                for done, (key, trouble) in enumerate(results, start=1):
                    progress(f"asking {self._settings.name}", done, len(bodies))
                    if trouble is not None:
                        failures[key] = trouble.reason
            finally:
                self._gate.close()
        if self._error is not None:
            done = sum(self._kept.answer(key) is not None for key in bodies)
            raise UnavailableError(
                f"{self._error.what}; {done} of the {len(bodies)} answers that it lacked came and are kept",
                where=f"voter {self._settings.name!r}",
                remedy=self._error.remedy,
            ) from self._error
        return failures

    def _work(self, key: str, body: Mapping[str, object]) -> Trouble | None:
        """None once the answer is kept, or why this prompt gets none; the first error closes the gate."""
        try:
            trouble = self._answer(key, body)
            with self._lock:
                self._in_a_row = self._in_a_row + 1 if trouble is not None and trouble.passing else 0
                if trouble is not None and self._in_a_row >= self._patience:
                    raise UnavailableError(f"the endpoint does not answer ({trouble.reason})", remedy="run again")
        except TreadleError as error:
            if self._error is None:
                self._error = error
            self._gate.close()
            return Trouble("stopped", passing=False)
        return trouble

    def _answer(self, key: str, body: Mapping[str, object]) -> Trouble | None:
        """None once the answer is kept, or why this prompt gets none."""
        settings, pause = self._settings, self._settings.backoff
        for left in reversed(range(settings.attempts)):
            outcome = self._asked(key, body)
            if isinstance(outcome, Reply):
                return None
            if not outcome.passing:
                self._check(outcome)
                return outcome
            if left == 0:
                return replace(outcome, reason=f"{outcome.reason}, {settings.attempts} times")
            self._troubles.append(outcome.reason)
            self._rest(outcome, pause)
            pause = min(2.0 * pause, settings.longest_wait)
        return None

    def _asked(self, key: str, body: Mapping[str, object]) -> Reply | Trouble:
        """One request; a second one without a form for the reply, where the endpoint may have refused that."""
        form = self._form
        if form is None:
            return self._exchange(key, body)
        outcome = self._exchange(key, {**body, "response_format": form})
        if isinstance(outcome, Trouble) and outcome.status in _OF_THE_PROMPT:
            plain = self._exchange(key, body)
            if isinstance(plain, Reply):
                self._form = None
            return plain
        return outcome

    def _exchange(self, key: str, body: Mapping[str, object]) -> Reply | Trouble:
        """One request through the gate, counted and kept."""
        self._gate.enter()
        outcome = Trouble("not asked", passing=True)
        try:
            outcome = self._chat.exchange(body)
        finally:
            answer = outcome.text if isinstance(outcome, Reply) else None
            tokens = (outcome.tokens or (0, 0)) if isinstance(outcome, Reply) else (0, 0)
            self._gate.leave(lambda: self._kept.add(key, answer, tokens))
        if isinstance(outcome, Reply) and outcome.tokens is None and self._settings.token_limit is not None:
            raise UnavailableError(
                "the endpoint does not count tokens, so token_limit cannot be kept", remedy="set request_limit instead"
            )
        return outcome

    def _check(self, trouble: Trouble) -> None:
        """Raise where not the prompt but the endpoint, the model or the key is refused."""
        if trouble.status in _OF_THE_PROMPT:
            return
        remedy = "check url and model"
        if trouble.status in (401, 403):
            remedy = f"check the key in {self._settings.api_key_env}" if self._chat.key else "name a key in api_key_env"
        raise UnavailableError(f"the endpoint refuses ({trouble.reason})", remedy=remedy)

    def _rest(self, trouble: Trouble, pause: float) -> None:
        """Wait before the next attempt: all threads, and no shorter, if the endpoint says how long, else this one."""
        longest = self._settings.longest_wait
        if trouble.after is not None and trouble.after > longest:
            raise UnavailableError(
                f"the endpoint asks to wait {trouble.after:.0f} s ({trouble.reason})",
                remedy="run again then, or raise longest_wait",
            )
        if trouble.after is not None:
            self._gate.pause(max(trouble.after, min(pause, longest)))
        else:
            self._gate.sleep(min(pause, longest))


def parallel(
    work: Callable[[str], Trouble | None], items: Sequence[str], threads: int
) -> Iterator[tuple[str, Trouble | None]]:
    """Each item with what `work` made of it, as they end.

    The threads do not keep the process alive: Ctrl-C need not wait for a slow endpoint.
    """
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str, Trouble | None] | Exception] = queue.SimpleQueue()
    for item in items:
        todo.put(item)

    def loop() -> None:
        while True:
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((item, work(item)))
            except Exception as error:  # whatever it is, it must not die with its thread
                done.put(error)

    for _ in range(min(threads, len(items))):
        threading.Thread(target=loop, daemon=True).start()
    for _ in items:
        result = done.get()
        if isinstance(result, Exception):
            raise result
        yield result
