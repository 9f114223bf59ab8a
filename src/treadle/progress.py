"""How long work reports its progress: through a callback, so that only the faces draw."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a one-line description, the units done and the units in all (0 where nobody can know)."""


def silent(description: str, done: int, total: int) -> None:
    """The progress of somebody who does not want to know."""


def part(progress: Progress, name: str) -> Progress:
    """The progress of a part, whose every line begins with its name."""
    return lambda description, done, total: progress(f"{name}: {description}", done, total)
