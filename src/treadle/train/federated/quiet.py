"""Flower's calls home, switched off."""

import os
from collections.abc import Mapping

from treadle.models.cache import cache_folder

_SILENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def stay_at_home() -> None:
    """Set what Flower and Ray read before they report usage, look for updates or install packages.

    A variable that the user has set stays as it is: law 7 asks that nothing leaves unasked. FLWR_HOME becomes a folder
    of treadle's cache, so that Flower neither finds nor writes an account in the user's home.
    """
    for name, value in silent_environment().items():
        os.environ.setdefault(name, value)


def silent_environment() -> dict[str, str]:
    """The variables that `stay_at_home` sets, for processes that do not import treadle first."""
    return {**_SILENT, "FLWR_HOME": str(cache_folder() / "flower")}
