"""Votes on which system answers an example: the majority, ties by a declared rule, and how far voters agree."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from treadle.errors import ConfigError

Tie = Literal["undecided", "first-system", "last-system", "first-voter"]
"""Who wins among the systems with most votes: nobody, the first or last of the declared order, or the one that the
first voter (in the run's order) of any of them voted for."""


@dataclass(frozen=True)
class System:
    """A way of answering: System 1 recalls, System 2 reasons; there may be more.

    Attributes:
        name: the label.
        description: what voters are told of it.
    """

    name: str
    description: str


@dataclass(frozen=True)
class VotingRule:
    """How votes become a label.

    Attributes:
        systems: their names, in order.
        voters: how many there are.
        tie: the rule for ties; None where none is declared, which leaves ties undecided.
        quorum: votes below which a row is undecided; more than half of the voters where it is None.

    Raises:
        ConfigError: fewer than two systems, no voter, a quorum that cannot be reached, or ties that no rule settles:
            an even number of voters, or more than two systems for more than one voter.
    """

    systems: tuple[str, ...]
    voters: int
    tie: Tie | None = None
    quorum: int | None = None

    def __post_init__(self) -> None:
        """Refuse a vote that could not be counted, before anybody is asked."""
        if len(self.systems) < 2 or len(set(self.systems)) < len(self.systems):
            raise ConfigError("key 'systems': two or more are needed, each of its own name")
        if self.voters < 1:
            raise ConfigError("key 'voters': nobody votes", remedy="declare one voter or more")
        if self.quorum is not None and not 1 <= self.quorum <= self.voters:
            raise ConfigError(f"key 'quorum': {self.quorum} votes of {self.voters} voters", remedy="lower it")
        if self.tie is None and self.voters > 1 and (self.voters % 2 == 0 or len(self.systems) > 2):
            raise ConfigError(
                f"key 'tie': {self.voters} voters on {len(self.systems)} systems can be split evenly",
                remedy='declare tie = "undecided", "first-system", "last-system" or "first-voter"',
            )

    @property
    def votes_needed(self) -> int:
        """The quorum, in votes."""
        return self.voters // 2 + 1 if self.quorum is None else self.quorum


@dataclass(frozen=True)
class Verdict:
    """What the votes on one row say.

    Attributes:
        system: the label; None where there is none.
        agreement: the share of the votes cast that went to the label, or to the strongest system; 0 without votes.
        tied: whether two systems or more had most votes.
        cast: how many voted.
    """

    system: str | None
    agreement: float
    tied: bool
    cast: int


def decide(votes: Sequence[str | None], rule: VotingRule) -> Verdict:
    """The verdict on one row.

    Args:
        votes: one a voter, in the run's order; None of one who did not vote.
        rule: how they are counted.

    Reference:
        arXiv 2507.20999 §3.1: the majority of several teacher models. Deviation: the article names no rule for ties
        or for answers that cannot be read.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    cast = counts.total()
    if cast == 0:
        return Verdict(None, 0.0, tied=False, cast=0)
    most = max(counts.values())
    strongest = [system for system in rule.systems if counts[system] == most]
    tied = len(strongest) > 1
    winner = _of_tie(strongest, votes, rule.tie) if tied else strongest[0]
    return Verdict(winner if cast >= rule.votes_needed else None, most / cast, tied, cast)


def _of_tie(strongest: Sequence[str], votes: Sequence[str | None], tie: Tie | None) -> str | None:
    """The winner among systems in their declared order."""
    match tie:
        case "first-system":
            return strongest[0]
        case "last-system":
            return strongest[-1]
        case "first-voter":
            return next(vote for vote in votes if vote in strongest)
        case _:
            return None


@dataclass(frozen=True)
class Kappa:
    """Agreement beyond chance, at most 1; 0 is what votes drawn from the same shares would give.

    Attributes:
        overall: Fleiss' κ; None where it is not defined: all votes are for one system, or no row has all voters.
        by_system: κ of each system against the others; None where nobody, or everybody, voted for it.
        rows: those on which every voter voted; only they count.
        voters: how many there are.
    """

    overall: float | None
    by_system: Mapping[str, float | None]
    rows: int
    voters: int


def fleiss_kappa(votes: Sequence[Sequence[str | None]], systems: Sequence[str]) -> Kappa:
    """Fleiss' κ of the rows on which all voters voted; rows with a missing vote are left out whole.

    Args:
        votes: rows × voters.
        systems: every name that may be voted for.

    Raises:
        ConfigError: rows of different numbers of voters.

    Reference:
        J. L. Fleiss, Measuring nominal scale agreement among many raters, Psychological Bulletin 76 (1971) 378–382:
        κ = (P̄ − P̄ₑ)/(1 − P̄ₑ), and for a category κⱼ = 1 − Σᵢ nᵢⱼ(n − nᵢⱼ) / (N n (n − 1) pⱼ (1 − pⱼ)).
    """
    if len({len(row) for row in votes}) > 1:
        raise ConfigError("rows have different numbers of voters", remedy="give None for one who did not vote")
    whole = [Counter(row) for row in votes if None not in row]
    voters = len(votes[0]) if votes else 0
    pairs = len(whole) * voters * (voters - 1)
    if pairs == 0:
        return Kappa(None, dict.fromkeys(systems), len(whole), voters)
    split: dict[str, int] = {}
    chance: dict[str, float] = {}
    for system in systems:
        share = sum(row[system] for row in whole) / (len(whole) * voters)
        split[system] = sum(row[system] * (voters - row[system]) for row in whole)
        chance[system] = share * (1.0 - share)
    # Σⱼ of the numerators over Σⱼ of the denominators is (P̄ − P̄ₑ)/(1 − P̄ₑ), and is exactly 1 for full agreement.
    return Kappa(
        _kappa(sum(split.values()), pairs * sum(chance.values())),
        {system: _kappa(split[system], pairs * chance[system]) for system in systems},
        len(whole),
        voters,
    )


def _kappa(split: int, by_chance: float) -> float | None:
    return None if by_chance == 0.0 else 1.0 - split / by_chance
