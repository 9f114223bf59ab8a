"""How often voters are right, alone and together, where the true labels are known."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

from treadle.data.voting import Tie, VotingRule, decide
from treadle.evaluation.intervals import Interval, wilson_interval


@dataclass(frozen=True)
class Panels:
    """The accuracies of all panels of one size: the worst, the mean and the best, and how many panels there are."""

    worst: float
    mean: float
    best: float
    count: int

    @staticmethod
    def of(hits: Sequence[Sequence[bool]]) -> "Panels":
        """The figures of `panel_hits`."""
        shares = [sum(of_panel) / len(of_panel) for of_panel in hits]
        return Panels(min(shares), sum(shares) / len(shares), max(shares), len(shares))


@dataclass(frozen=True)
class VoterAccuracy:
    """Shares of all rows; a row without a vote, or without a label, counts as wrong.

    Attributes:
        labels: of the run's own labels.
        voters: of each voter.
        panels: odd size → of the majorities of all panels of so many of the voters.
    """

    labels: Interval
    voters: Mapping[str, Interval]
    panels: Mapping[int, Panels]

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return {
            "labels": asdict(self.labels),
            "voters": {name: asdict(interval) for name, interval in self.voters.items()},
            "panels": {size: asdict(panels) for size, panels in self.panels.items()},
        }


def voter_accuracy(
    labels: Sequence[str | None],
    votes: Mapping[str, Sequence[str | None]],
    truth: Sequence[str],
    systems: tuple[str, ...],
) -> VoterAccuracy:
    """How often labels, voters and panels of voters agree with the truth; Wilson's 95% intervals.

    Args:
        labels: one a row.
        votes: voter → one vote a row.
        truth: the right system of each row; at least one row.
        systems: their names.
    """
    columns = list(votes.values())
    return VoterAccuracy(
        wilson_interval(_right(labels, truth), len(truth)),
        {name: wilson_interval(_right(column, truth), len(truth)) for name, column in votes.items()},
        {size: Panels.of(panel_hits(columns, truth, systems, size=size)) for size in range(1, len(columns) + 1, 2)},
    )


def _right(found: Sequence[str | None], truth: Sequence[str]) -> int:
    return sum(label == right for label, right in zip(found, truth, strict=True))


def panel_hits(
    columns: Sequence[Sequence[str | None]], truth: Sequence[str], systems: tuple[str, ...], *, size: int
) -> list[list[bool]]:
    """For every panel of so many voters, row by row, whether its majority is right; a tie is not.

    Args:
        columns: one sequence of votes a voter, at least `size` of them.
        truth: the right system of each row.
        systems: their names.
        size: of a panel, odd.
    """
    undecided: Tie = "undecided"
    rule = VotingRule(systems, size, undecided)
    return [
        [decide(row, rule).system == right for row, right in zip(zip(*panel, strict=True), truth, strict=True)]
        for panel in combinations(columns, size)
    ]
