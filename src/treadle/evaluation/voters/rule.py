"""The voter `rule`: the length of the reference reasoning decides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from treadle.data.prompts import value_of
from treadle.errors import ConfigError
from treadle.evaluation.voters.voter import Ballots, Poll, Vote, Voter
from treadle.models.loading import load_tokenizer
from treadle.progress import Progress


@dataclass(frozen=True)
class RuleVoter:
    """Lengths up to the first limit belong to the first system, up to the second to the second, and so on.

    Attributes:
        name: the voter's.
        field: the column with the reference reasoning.
        thresholds: the limits, ascending, one fewer than there are systems; or
        quantiles: shares in (0, 1) of the rows, whose lengths are the limits.
        unit: "words", as white space parts them, or "tokens" of `tokenizer`.
        tokenizer: a catalogue name, folder or hub id.
    """

    kind: Literal["rule"]
    name: str
    field: str
    thresholds: tuple[float, ...] | None = None
    quantiles: tuple[float, ...] | None = None
    unit: Literal["words", "tokens"] = "words"
    tokenizer: str | None = None
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse a rule that says nothing, or two things."""
        if (self.thresholds is None) == (self.quantiles is None):
            raise ValueError("give either thresholds or quantiles")
        limits = self.thresholds if self.thresholds is not None else self.quantiles or ()
        if list(limits) != sorted(set(limits)) or not all(map(math.isfinite, limits)):
            raise ValueError("the limits must be numbers that ascend")
        if self.quantiles is not None and not all(0.0 < share < 1.0 for share in self.quantiles):
            raise ValueError("quantiles must lie between 0 and 1")
        if (self.unit == "tokens") != (self.tokenizer is not None):
            raise ValueError('unit = "tokens" and a tokenizer belong together')


def rule_voter(settings: RuleVoter, poll: Poll) -> Voter:
    """The votes by length.

    A quantile is a length that occurs: the smallest that this share of the rows does not exceed.

    Raises:
        ConfigError: the limits are not one fewer than the systems.
        InputError: a row lacks the field, or there is no such tokenizer.
        UnavailableError: the tokenizer must be fetched and cannot be.
    """
    limits = settings.thresholds if settings.thresholds is not None else settings.quantiles or ()
    if len(limits) != len(poll.systems) - 1:
        raise ConfigError(
            f"{len(limits)} limits part {len(limits) + 1} systems, not {len(poll.systems)}",
            where=f"voter {settings.name!r}",
            remedy="give one limit fewer than there are systems",
        )
    texts = [value_of(row, settings.field, where=poll.place(index)) for index, row in enumerate(poll.rows)]
    lengths = _lengths(texts, settings)
    if settings.quantiles is not None:
        limits = [float(limit) for limit in np.quantile(lengths, settings.quantiles, method="inverted_cdf")]
    places = np.searchsorted(np.array(limits), np.array(lengths), side="left")
    votes = tuple(Vote(poll.names[int(place)]) for place in places)
    remark = f"limits in {settings.unit}: {', '.join(f'{limit:g}' for limit in limits)}"

    def cast(progress: Progress) -> Ballots:
        progress(f"measuring {settings.field}", len(votes), len(votes))
        return Ballots(votes, remarks=(remark,))

    return cast


def _lengths(texts: Sequence[str], settings: RuleVoter) -> list[int]:
    if settings.tokenizer is None:
        return [len(text.split()) for text in texts]
    tokenizer = load_tokenizer(settings.tokenizer)
    return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
