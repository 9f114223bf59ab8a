"""What a voter is: something that says, for each example, which system answers it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle.data.prompts import Row
from treadle.data.voting import System
from treadle.progress import Progress


@dataclass(frozen=True)
class Question:
    """What voters who read are shown of a row; `answer` is None where the run shows no answer."""

    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Poll:
    """What all voters of a run are asked.

    Attributes:
        rows: the data.
        questions: one a row.
        systems: to choose among, in order.
        target: the name of the model that voters play; None where they play none.
        cache: the folder in which answers that cost something are kept.
        source: what the rows are called in errors.
    """

    rows: Sequence[Row]
    questions: Sequence[Question]
    systems: tuple[System, ...]
    target: str | None
    cache: Path
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """The systems' names, in order."""
        return tuple(system.name for system in self.systems)

    def place(self, index: int) -> str:
        """Where row `index` (from 0) stands, for errors."""
        return f"{self.source}, row {index + 1}"


@dataclass(frozen=True)
class Vote:
    """A system's name, or None and the reason why there is none."""

    system: str | None
    reason: str = ""


@dataclass(frozen=True)
class Cost:
    """What a voter has cost over all runs with this cache.

    Attributes:
        requests: sent to an endpoint, failed ones included; of a local model, prompts.
        prompt_tokens: read, as the endpoint counts them.
        completion_tokens: written, likewise.
        kept: answers that this run found in the cache.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Ballots:
    """One voter's votes.

    Attributes:
        votes: one a row.
        cost: what they cost.
        remarks: what a reader should know of how they came about.
    """

    votes: tuple[Vote, ...]
    cost: Cost = Cost()
    remarks: tuple[str, ...] = ()


Voter = Callable[[Progress], Ballots]
"""A voter whose settings have been held against the poll: whatever can be known to be wrong has been said before."""
