"""Gaussian noise from a cryptographic generator, added so that its floating point tells nothing about the sum.

A sum and its noise are each rounded to one grid before they meet: the release is an integer multiple of the grid's
width, and which multiples are possible does not depend on the sum (Mironov, CCS 2012). A normal draw is the sum of
four, so that no draw can be traced back to the few bits that made it (Holohan and Braghin, arXiv 2107.10138).
"""

import hashlib
import math
import os
from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Float64, UInt64
from torch import Tensor

from treadle.errors import UnavailableError

Words = UInt64[np.ndarray, " count"]

_SUMMANDS = 4
_BLOCK = 2**14  # draws at a time, so that the work stays in the processor's cache
_FINENESS = 30  # the grid is at most the noise's deviation times 2 to the power of minus this


class PrivateRandomness(ABC):
    """Where random bits come from; `secret` says whether nobody else can know them."""

    secret: bool

    @abstractmethod
    def words(self, count: int) -> Words:
        """The next `count` random 64-bit integers, uniform and independent."""


class SystemRandomness(PrivateRandomness):
    """ChaCha20 under a key that the operating system's generator draws anew for every call; never re-seeded.

    Raises:
        UnavailableError: cryptography is not installed.
    """

    secret = True

    def __init__(self) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        except ImportError as error:
            raise UnavailableError("cryptography is not installed", remedy="pip install 'treadle[privacy]'") from error
        # What cryptography calls the nonce begins with the count of blocks, 4 bytes: at 0, or the stream may run over.
        self._stream = lambda: Cipher(algorithms.ChaCha20(os.urandom(32), bytes(4) + os.urandom(12)), None).encryptor()

    def words(self, count: int) -> Words:
        """Integers of the key's stream."""
        return np.frombuffer(self._stream().update(bytes(8 * count)), dtype=np.uint64)


class SeededRandomness(PrivateRandomness):
    """Bits that follow from a seed, for tests and benchmarks: what they noise is not private, and is marked so."""

    secret = False

    def __init__(self, seed: int) -> None:
        key = int.from_bytes(hashlib.sha256(f"private/{seed}".encode()).digest()[:16], "little")
        self._bits = np.random.Philox(key=key)

    def words(self, count: int) -> Words:
        """The next integers of Philox-4x64 under a key made of the seed."""
        return self._bits.random_raw(count)


def grid_width(deviation: float) -> float:
    """The power of two to whose multiples a sum and its noise of this standard deviation are rounded."""
    return 2.0 ** (math.floor(math.log2(deviation)) - _FINENESS)


def noised(
    total: Float64[Tensor, " size"], deviation: float, randomness: PrivateRandomness
) -> Float64[Tensor, " size"]:
    """`total` plus independent Gaussian noise of this standard deviation, as multiples of `grid_width(deviation)`.

    Rounding moves each entry by half a grid width at most, so two totals may be apart by width·√size more than before;
    whoever bounds their distance leaves room for that. Entries beyond 2⁵² widths would lose the grid; a sum of N rows
    stays within as long as N is below 2²¹ noise multipliers.
    """
    width = grid_width(deviation)
    noise = standard_normal(total.numel(), randomness).mul_(deviation / width).round_()
    return (total / width).round_().add_(noise).mul_(width)


def standard_normal(count: int, randomness: PrivateRandomness) -> Float64[Tensor, " count"]:
    """`count` independent standard normal draws, each half the sum of four by Box and Muller.

    Their tails end at about 18; a true normal passes that with probability 1e-72.
    """
    draws = torch.zeros(count + count % 2, dtype=torch.float64)
    for begin in range(0, len(draws), _BLOCK):
        block = draws[begin : begin + _BLOCK]
        for _ in range(_SUMMANDS):
            _add_pairs(block, randomness.words(len(block)))
    return draws.mul_(_SUMMANDS**-0.5)[:count]


def _add_pairs(draws: Float64[Tensor, " even"], words: Words) -> None:
    """Add a standard normal to every draw, of which each word gives one."""
    radius, angle = torch.from_numpy(words.astype(np.float64)).mul_(2.0**-64).chunk(2)
    radius.add_(2.0**-65).log_().mul_(-2.0).sqrt_()
    angle.mul_(2.0 * math.pi)
    first, second = draws.chunk(2)
    first.addcmul_(radius, angle.cos())
    second.addcmul_(radius, angle.sin())
