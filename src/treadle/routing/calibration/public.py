"""One public text for all adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.routing.calibration.statistics import Method
from treadle.routing.calibration.text import check_passages


@dataclass(frozen=True)
class PublicCalibration:
    """Every adapter's norms over one public text; costs no privacy.

    Adding an adapter costs one run of the base over the text.

    Attributes:
        texts: passages that none of the adapters' tasks were made from.
        name: what the report calls them.
    """

    texts: Sequence[str]
    name: str = "public"

    def __post_init__(self) -> None:
        check_passages(self.texts, self.name)

    @property
    def method(self) -> Method:
        """How the bank's files name it."""
        return "public"

    @property
    def source(self) -> str:
        """What is read."""
        return self.name
