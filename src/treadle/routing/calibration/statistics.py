"""A finished calibration: numbers, where they come from, and whose lora_B they describe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from torch import Tensor

from treadle.errors import MismatchError
from treadle.family.adapter import Adapter
from treadle.routing.calibration.moments import LatentMoments
from treadle.routing.calibration.prompts import PromptStatistics

Method = Literal["own", "public", "analytic", "traffic", "private"]

_READ: Mapping[Method, str] = {
    "own": "the adapters' own data",
    "public": "public",
    "analytic": "public",
    "traffic": "callers' prompts",
    "private": "numbers that silos released",
}


def utc_day() -> str:
    """Today's date in UTC, ISO 8601."""
    return datetime.now(UTC).date().isoformat()


@dataclass(frozen=True)
class Statistics:
    """A finished calibration: module → (adapters,) mean and std of ‖B A x‖ over the tokens that count.

    Attributes:
        mean: float64, NaN where an adapter lacks the module or nothing is known of it yet.
        std: float64, NaN in the same places.
        method: how they were made.
        source: what was read, by name; "traffic:TENANT" for traffic.
        digest: SHA-256 of the texts if they are public, of the aggregates if they are traffic, "" otherwise.
        tokens: how many tokens were counted, an adapter; 0 where that is private.
        ignored_tokens: token ids left out here, and therefore when prompts are scored.
        B_digests: `Adapter.digest` of the lora_B that each row describes, "" for a row of which nothing is known.
        moments: module → moments of the family's z = A·x under `analytic`, from which adapters to come are described.
        prompts: what public prompts say about layers, under `public`; None under the others.
        date: the UTC day of the reading; no part of what makes two calibrations equal.
        epsilon: what the statistics of an adapter cost its own data at most, beside its training, under `private`;
            None where nothing was spent or nothing accounts for it.
        delta: belongs to epsilon; 0 where that is None.
    """

    mean: Mapping[str, Tensor]
    std: Mapping[str, Tensor]
    method: Method
    source: str
    digest: str
    tokens: int
    ignored_tokens: tuple[int, ...]
    B_digests: tuple[str, ...]
    moments: Mapping[str, LatentMoments] = field(default_factory=dict[str, LatentMoments])
    prompts: PromptStatistics | None = None
    date: str = field(default_factory=utc_day, compare=False)
    epsilon: float | None = None
    delta: float = 0.0

    @property
    def spends_privacy(self) -> bool:
        """Whether the adapters' own training data went in: a release that no ε of theirs accounts for."""
        return self.method == "own" or (self.method == "private" and self.epsilon is None)

    @property
    def text_read(self) -> str:
        """Whose text was read, in words."""
        return _READ[self.method]

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Return if every row that says anything was made for the lora_B of the adapter in its place.

        Raises:
            MismatchError: a row is of another lora_B, or there are too many or too few of them.
        """
        if len(self.B_digests) != len(adapters):
            raise MismatchError(
                f"the calibration describes {len(self.B_digests)} adapters, the bank has {len(adapters)}",
                remedy="run `treadle bank calibrate`",
            )
        for place, (adapter, digest) in enumerate(zip(adapters, self.B_digests, strict=True)):
            known = not all(bool(mean[place].isnan()) for mean in self.mean.values())
            if (known or digest) and digest != adapter.digest:
                raise MismatchError(
                    "its statistics were made for another lora_B",
                    where=adapter.name,
                    remedy="run `treadle bank calibrate`",
                )

    def alike(self, other: "Statistics") -> bool:
        """Whether the two were made in one way from one source, so that their rows may stand side by side."""
        return (self.method, self.source, self.digest, self.ignored_tokens) == (
            other.method,
            other.source,
            other.digest,
            other.ignored_tokens,
        )
