"""Questions with answers from reasoning-gym, drawn by seed: the one importer of that library."""

import difflib
import importlib
from collections.abc import Mapping
from types import ModuleType

from treadle.errors import ConfigError, InputError, UnavailableError

STRIDE = 1_000_000
"""How far apart neighbouring seeds begin; also the largest number of questions that one seed has."""


def draw_questions(
    generator: str, *, size: int, seed: int, parameters: Mapping[str, object] | None = None, start: int = 0
) -> list[dict[str, object]]:
    """Questions `start` to `start + size` of the generator's stream for this seed: rows of `question` and `answer`.

    reasoning-gym draws question i of its own seed s from Random(s + i), so that its neighbouring seeds give the same
    questions, shifted by one. Here seed s begins at s·1,000,000: two seeds never share a draw (two draws may still
    be equal, where a generator knows few questions).

    Raises:
        InputError: no such generator; size, start or seed out of range.
        ConfigError: a parameter that the generator does not take, or refuses.
        UnavailableError: reasoning-gym is not installed.
    """
    where = f"reasoning-gym:{generator}"
    if size < 1 or start < 0 or start + size > STRIDE or seed < 0:
        raise InputError(
            f"size {size}, start {start}, seed {seed} are out of range",
            where=where,
            remedy=f"ask for 1 to {STRIDE:,} questions of a seed of 0 or more",
        )
    gym = _gym(where)
    known = generators()
    if generator not in known:
        near = difflib.get_close_matches(generator, known, n=3)
        raise InputError("no such generator", where=where, remedy=f"did you mean {' or '.join(near) or known[0]}?")
    settings = dict(parameters or {}) | {"size": size, "seed": seed * STRIDE + start}
    try:
        drawn = list(gym.create_dataset(generator, **settings))
    except (TypeError, ValueError, AssertionError, LookupError, AttributeError) as error:
        given = ", ".join(parameters or {}) or "none"
        raise ConfigError(
            f"the generator refuses its parameters ({error})", where=where, remedy=f"mend them (given: {given})"
        ) from error
    return [{"question": str(item["question"]).strip(), "answer": str(item["answer"]).strip()} for item in drawn]


def generators() -> list[str]:
    """The names of reasoning-gym's generators, sorted.

    Raises:
        UnavailableError: reasoning-gym is not installed.
    """
    _gym("reasoning-gym")
    return sorted(importlib.import_module("reasoning_gym.factory").DATASETS)


def _gym(where: str) -> ModuleType:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise UnavailableError(
            "reasoning-gym is not installed", where=where, remedy="pip install 'treadle[demo]'"
        ) from error
