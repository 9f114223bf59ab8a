"""What `treadle classify` found, as tables for people.

Imported inside the command, since the recipe's types bring torch with them.
"""

from pathlib import Path

from treadle.cli.console import print_table, say
from treadle.recipes.classify import Classified
from treadle.recipes.voter_accuracy import VoterAccuracy

_SHOWN = 5  # disagreements that are printed; the summary lists all of them


def show_classified(found: Classified, summary: Path) -> None:
    """Print counts, voters, agreement, accuracy where it is known, and the first disagreements."""
    counts = ", ".join(f"{count} {system}" for system, count in found.counts.items())
    say(f"{found.out}: {found.rows} rows: {counts}, {len(found.undecided)} without a label")
    _show_voters(found)
    if found.kappa is not None:
        parts = ", ".join(f"{system} {_shown(value)}" for system, value in found.kappa.by_system.items())
        say(f"Fleiss' κ {_shown(found.kappa.overall)} on {found.kappa.rows} rows with all votes ({parts})")
    if found.accuracy is not None:
        _show_accuracy(found.accuracy)
    split = [index for index, verdict in enumerate(found.verdicts) if 0.0 < verdict.agreement < 1.0]
    for index in split[:_SHOWN]:
        votes = ", ".join(f"{name} {vote.system or '–'}" for name, vote in found.votes_on(index).items())
        say(f"row {index + 1} is disputed: {votes}")
    if len(split) > _SHOWN:
        say(f"… and {len(split) - _SHOWN} more in {summary}")


def _show_voters(found: Classified) -> None:
    rows: list[tuple[object, ...]] = []
    for name, ballots in found.ballots.items():
        voted = [sum(vote.system == system for vote in ballots.votes) for system in found.counts]
        cost = ballots.cost
        tokens = cost.prompt_tokens + cost.completion_tokens
        rows.append((name, *voted, found.rows - sum(voted), found.agreement_with_majority(name), cost.requests, tokens))
    print_table("voters", ("voter", *found.counts, "no vote", "with majority", "requests", "tokens"), rows)


def _show_accuracy(found: VoterAccuracy) -> None:
    known = {"labels": found.labels, **found.voters}
    print_table(
        "right, of all rows",
        ("", "share", "from", "to"),
        [(name, interval.estimate, interval.low, interval.high) for name, interval in known.items()],
    )
    for size, panels in found.panels.items():
        say(f"panels of {size}: {panels.mean:.3f} on average ({panels.worst:.3f} to {panels.best:.3f})")


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
