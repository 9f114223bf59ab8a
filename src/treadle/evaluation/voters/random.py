"""The voter `random`: a split drawn from a seed, the control that any other voter must beat."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from treadle import randomness
from treadle.errors import ConfigError
from treadle.evaluation.voters.voter import Ballots, Poll, Vote, Voter
from treadle.progress import Progress


@dataclass(frozen=True)
class RandomVoter:
    """A random split.

    Attributes:
        name: the voter's.
        seed: any integer.
        shares: of the systems, in order, together 1; equal where it is None.
    """

    kind: Literal["random"]
    name: str
    seed: int = 0
    shares: tuple[float, ...] | None = None
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse what cannot be shares."""
        shares = self.shares
        if shares is not None and not (min(shares, default=-1.0) >= 0.0 and abs(sum(shares) - 1.0) <= 1e-9):
            raise ValueError("shares must be 0 or more and add up to 1")


def random_voter(settings: RandomVoter, poll: Poll) -> Voter:
    """Votes in the given shares of the rows (rounded), dealt out in an order drawn from the seed.

    Raises:
        ConfigError: not as many shares as systems.
    """
    count, systems = len(poll.rows), len(poll.systems)
    shares = settings.shares or (1.0 / systems,) * systems
    if len(shares) != systems:
        raise ConfigError(
            f"{len(shares)} shares for {systems} systems", where=f"voter {settings.name!r}", remedy="give one each"
        )
    order = np.argsort(randomness.uniform(settings.seed, "random split", (count,)), kind="stable")
    ends = np.round(np.cumsum(shares) * count)
    places = np.searchsorted(ends[:-1], np.arange(count), side="right")
    votes = [Vote(None)] * count
    for index, place in zip(order, places, strict=True):
        votes[int(index)] = Vote(poll.names[int(place)])

    def cast(progress: Progress) -> Ballots:
        progress("drawing lots", count, count)
        return Ballots(tuple(votes))

    return cast
