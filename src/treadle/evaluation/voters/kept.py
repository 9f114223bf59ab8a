"""Answers that cost something, kept on disk as they come: one line an exchange, failed ones too, for they cost as well.

A line holds a key, the answer, and the tokens; the key is a digest of what was asked, so neither prompts nor API keys
are in the file. What a kill tore off is asked again.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

from treadle import files
from treadle.errors import FormatError, InputError
from treadle.evaluation.voters.voter import Cost


def digest(content: object) -> str:
    """The SHA-256 of its canonical JSON, as 64 hex digits."""
    return hashlib.sha256(files.canonical_json(content)).hexdigest()


class KeptAnswers:
    """The answers in one file, and what they cost; safe for several threads of one process.

    Raises:
        FormatError: a line that is JSON, but no exchange.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._answers: dict[str, str] = {}
        self._cost = Cost()
        for number, row in files.json_lines(path):
            match row:
                case {"key": str(key), "answer": str() | None as answer, "tokens": [int(prompt), int(completion)]}:
                    self._count(key, answer, (prompt, completion))
                case _:
                    raise FormatError("no exchange", where=f"{path}, line {number}", remedy="delete the line")

    def _count(self, key: str, answer: str | None, tokens: tuple[int, int]) -> None:
        if answer is not None:
            self._answers[key] = answer
        cost = self._cost
        self._cost = Cost(cost.requests + 1, cost.prompt_tokens + tokens[0], cost.completion_tokens + tokens[1])

    @property
    def cost(self) -> Cost:
        """Of all exchanges in the file."""
        return self._cost

    def answer(self, key: str) -> str | None:
        """The answer to what has this key, None where there is none yet."""
        return self._answers.get(key)

    def add(self, key: str, answer: str | None, tokens: tuple[int, int]) -> None:
        """Keep an exchange: its answer, or None where it failed; its tokens, read and written.

        Raises:
            UnavailableError: the disk refuses.
        """
        line = json.dumps({"key": key, "answer": answer, "tokens": tokens})
        with self._lock:
            files.append_line(self._path, line.encode())
            self._count(key, answer, tokens)


@contextlib.contextmanager
def kept_answers(folder: Path, settings: object, *, voter: str) -> Iterator[KeptAnswers]:
    """The answers under these settings in `folder`; nobody else asks under them meanwhile.

    Args:
        folder: of the answers.
        settings: all that an answer hangs on beside the prompt; JSON.
        voter: who asks, for errors.

    Raises:
        InputError: another process asks.
        FormatError: the file is damaged.
    """

    def refuse() -> None:
        raise InputError("another process asks this voter", where=f"voter {voter!r}", remedy="wait for it")

    path = folder / f"{digest(settings)[:16]}.jsonl"
    with files.locked(path.with_suffix(".lock"), refuse):
        yield KeptAnswers(path)
