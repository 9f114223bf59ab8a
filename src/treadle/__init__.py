"""Fleets of LoRA adapters over one frozen base model: planned, trained, banked and routed.

Importing treadle imports no torch: each name below is looked up in its own module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker and an editor see; at run time `__getattr__` does this work
    from treadle.errors import TreadleError as TreadleError

__version__ = "0.1.0"

_HOMES = {
    "TreadleError": "treadle.errors",
}

__all__ = [
    "TreadleError",
    "__version__",
]


def __getattr__(name: str) -> object:
    """The public name's value, from the module that defines it."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'treadle' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
