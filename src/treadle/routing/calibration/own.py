"""Each adapter's own training text, as in the paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.errors import InputError
from treadle.routing.calibration.statistics import Method
from treadle.routing.calibration.text import check_passages


@dataclass(frozen=True)
class OwnCalibration:
    """Each adapter's norms over its own training text: a release that no ε accounts for.

    Reference: arXiv 2509.18093.

    Attributes:
        texts: adapter name → its passages.
        name: what the report calls them.
    """

    texts: Mapping[str, Sequence[str]]
    name: str = "own"

    def __post_init__(self) -> None:
        for adapter, texts in self.texts.items():
            check_passages(texts, adapter)

    @property
    def method(self) -> Method:
        """How the bank's files name it."""
        return "own"

    @property
    def source(self) -> str:
        """What is read."""
        return self.name

    def texts_of(self, adapter: str) -> Sequence[str]:
        """The adapter's own texts.

        Raises:
            InputError: there are none.
        """
        if not self.texts.get(adapter):
            raise InputError("no calibration text for this adapter", where=adapter, remedy="give its training text")
        return self.texts[adapter]
