"""The voter `field`: labels that the rows already have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from treadle.data.prompts import value_of
from treadle.errors import ConfigError, InputError
from treadle.evaluation.voters.voter import Ballots, Poll, Vote, Voter
from treadle.progress import Progress


@dataclass(frozen=True)
class FieldVoter:
    """A column of the data.

    Attributes:
        name: the voter's.
        field: the column.
        labels: its value → the system's name; without it the values are the names.
    """

    kind: Literal["field"]
    name: str
    field: str
    labels: Mapping[str, str] | None = None
    __pydantic_config__: ClassVar = {"extra": "forbid"}


def field_voter(settings: FieldVoter, poll: Poll) -> Voter:
    """The votes that stand in the rows; an empty cell is no vote.

    Raises:
        ConfigError: `labels` names a system that there is not.
        InputError: no row has the field, or one has a value that is no system; names the first.
    """
    labels = dict(settings.labels or {name: name for name in poll.names})
    strangers = sorted(set(labels.values()) - set(poll.names))
    if strangers:
        raise ConfigError(
            f"its labels name {strangers[0]!r}, which is no system",
            where=f"voter {settings.name!r}",
            remedy=f"choose among {', '.join(poll.names)}",
        )
    if not any(settings.field in row for row in poll.rows):
        value_of(poll.rows[0], settings.field, where=f"{poll.place(0)} for voter {settings.name!r}")
    votes = tuple(_vote(settings.field, labels, poll, index) for index in range(len(poll.rows)))

    def cast(progress: Progress) -> Ballots:
        progress(f"reading {settings.field}", len(votes), len(votes))
        return Ballots(votes)

    return cast


def _vote(field: str, labels: Mapping[str, str], poll: Poll, index: int) -> Vote:
    row = poll.rows[index]
    if row.get(field) in (None, ""):
        return Vote(None, f"no {field}")
    value = value_of(row, field, where=poll.place(index))
    if value not in labels:
        raise InputError(
            f"{field} is {value!r}, which is none of {', '.join(labels)}",
            where=poll.place(index),
            remedy="mend the row, or say what the value means under the voter's labels",
        )
    return Vote(labels[value])
