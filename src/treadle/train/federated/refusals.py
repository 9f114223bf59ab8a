"""Why a client sent no update, in codes and sentences that say nothing about its data."""

from enum import Enum


class Refusal(Enum):
    """A reason; the value is the code of Flower's Error, outside of Flower's own."""

    BUDGET = 1001
    ORDER = 1002
    SILO = 1003
    UNAVAILABLE = 1004
    FAILED = 1005

    @property
    def sentence(self) -> str:
        """What the server is told."""
        return _SENTENCES[self]


_SENTENCES = {
    Refusal.BUDGET: "its privacy budget is spent",
    Refusal.ORDER: "it refused the server's message",
    Refusal.SILO: "its configuration or data cannot be used; its own log says why",
    Refusal.UNAVAILABLE: "something it needs is missing there; its own log says what",
    Refusal.FAILED: "it failed; its own log says how",
}


def refusal_of(code: int) -> Refusal | None:
    """The refusal with this code, or None for one of Flower's own errors."""
    return Refusal(code) if any(code == refusal.value for refusal in Refusal) else None
