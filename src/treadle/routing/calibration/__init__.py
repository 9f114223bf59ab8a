"""Statistics of activation norms: what a "large" norm is for each adapter at each layer.

A calibration is an explicit step over named text. What each reads, and what that costs:

| method | reads | privacy |
|---|---|---|
| `own` | each adapter's training text, as arXiv 2509.18093 does | a release that no ε accounts for |
| `public` | one text that has nothing to do with any task | none |
| `analytic` | the same, once a family; an adapter is then described by its B | none |
| `traffic` | a tenant's unlabelled prompts, aggregates only | the adapters' ε stands; a release about the callers |
| `private` | numbers that silos released about their own text | the ε of the releases, beside the adapters' |
"""

from treadle.routing.calibration.analytic import AnalyticCalibration, completed
from treadle.routing.calibration.drift import Drift, drift
from treadle.routing.calibration.methods import Calibration, calibrate
from treadle.routing.calibration.moments import LatentMoments, Moments
from treadle.routing.calibration.own import OwnCalibration
from treadle.routing.calibration.private import PrivateCalibration, ReleasedNorms, pooled
from treadle.routing.calibration.prompts import PromptStatistics
from treadle.routing.calibration.public import PublicCalibration, PublicText
from treadle.routing.calibration.statistics import Method, Statistics
from treadle.routing.calibration.text import (
    counted,
    ignored_tokens,
    positions,
    read_prompt,
    text_batches,
    wants_positions,
)
from treadle.routing.calibration.traffic import TrafficCalibration, TrafficStatistics, read_traffic

__all__ = [
    "AnalyticCalibration",
    "Calibration",
    "Drift",
    "LatentMoments",
    "Method",
    "Moments",
    "OwnCalibration",
    "PrivateCalibration",
    "PromptStatistics",
    "PublicCalibration",
    "PublicText",
    "ReleasedNorms",
    "Statistics",
    "TrafficCalibration",
    "TrafficStatistics",
    "calibrate",
    "completed",
    "counted",
    "drift",
    "ignored_tokens",
    "pooled",
    "positions",
    "read_prompt",
    "read_traffic",
    "text_batches",
    "wants_positions",
]
