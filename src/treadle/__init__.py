"""Fleets of LoRA adapters over one frozen base model: planned, trained, banked and routed.

Importing treadle imports no torch: each name below is looked up in its own module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker and an editor see; at run time `__getattr__` does this work
    from treadle.data.public_text import public_texts as public_texts
    from treadle.errors import TreadleError as TreadleError
    from treadle.family.adapter import Adapter as Adapter
    from treadle.family.family import AdapterFamily as AdapterFamily
    from treadle.family.injection import linear_shapes as linear_shapes
    from treadle.family.plan import RankPlan as RankPlan
    from treadle.models.loading import load_model as load_model
    from treadle.models.loading import load_tokenizer as load_tokenizer
    from treadle.routing.bank import AdapterBank as AdapterBank
    from treadle.routing.calibration import AnalyticCalibration as AnalyticCalibration
    from treadle.routing.calibration import OwnCalibration as OwnCalibration
    from treadle.routing.calibration import PublicCalibration as PublicCalibration
    from treadle.routing.routed import RoutedModel as RoutedModel

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "treadle.family.adapter",
    "AdapterBank": "treadle.routing.bank",
    "AdapterFamily": "treadle.family.family",
    "AnalyticCalibration": "treadle.routing.calibration",
    "OwnCalibration": "treadle.routing.calibration",
    "PublicCalibration": "treadle.routing.calibration",
    "RankPlan": "treadle.family.plan",
    "RoutedModel": "treadle.routing.routed",
    "TreadleError": "treadle.errors",
    "linear_shapes": "treadle.family.injection",
    "load_model": "treadle.models.loading",
    "load_tokenizer": "treadle.models.loading",
    "public_texts": "treadle.data.public_text",
}

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterFamily",
    "AnalyticCalibration",
    "OwnCalibration",
    "PublicCalibration",
    "RankPlan",
    "RoutedModel",
    "TreadleError",
    "__version__",
    "linear_shapes",
    "load_model",
    "load_tokenizer",
    "public_texts",
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
