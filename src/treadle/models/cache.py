"""Where treadle keeps what can be made again: fetched bases, downloads, digests."""

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The cache folder, absolute: the environment's TREADLE_CACHE, or else the platform's own place for caches."""
    chosen = os.environ.get("TREADLE_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else platformdirs.user_cache_path("treadle")
