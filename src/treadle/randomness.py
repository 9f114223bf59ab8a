"""Random matrices that are the same on every machine: an integer counter generator, float64, then rounded.

The stream is Philox-4x64, keyed by SHA-256 of (seed, name), read as raw 64-bit integers; only integer arithmetic
and correctly rounded float64 products stand between the key and `uniform`, so its result is portable bit for bit.
`normal` passes through log, sin and cos and is promised only on one machine.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """Draws from [0, 1) with 53 random bits each, a function of (seed, name) alone."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(math.prod(shape))
    return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def normal(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    """Standard normal draws (Box and Muller), a function of (seed, name) up to the machine's log, sin and cos."""
    first, second = uniform(seed, name, (2, *shape))
    return np.sqrt(-2.0 * np.log1p(-first)) * np.cos(2.0 * math.pi * second)
