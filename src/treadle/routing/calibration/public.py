"""One public text for all adapters."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from treadle.routing.calibration.statistics import Method
from treadle.routing.calibration.text import check_passages


@dataclass(frozen=True)
class PublicText(ABC):
    """A calibration that reads one public text, whoever it describes; costs no privacy.

    Attributes:
        texts: passages that none of the adapters' tasks were made from.
        name: what the report calls them.
    """

    texts: Sequence[str]
    name: str = "public"

    def __post_init__(self) -> None:
        check_passages(self.texts, self.name)

    @property
    @abstractmethod
    def method(self) -> Method:
        """How the bank's files name it."""

    @property
    def source(self) -> str:
        """What is read."""
        return self.name


@dataclass(frozen=True)
class PublicCalibration(PublicText):
    """Every adapter's norms over one public text; costs no privacy.

    Adding an adapter costs one run of the base over the text.
    """

    @property
    def method(self) -> Method:
        """How the bank's files name it."""
        return "public"
