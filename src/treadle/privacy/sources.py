"""Which data a name stands for: digests keyed by a ledger's secret, so that they tell nobody else what the data are.

A plain digest of private data lets whoever has a guess confirm it. These are HMAC-SHA-256 under 32 random bytes that
never leave the ledger's file.
"""

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import InputError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Keyed digests of one data set as it stands, 64 hex digits each.

    Attributes:
        content: of the bytes.
        place: of the file's device and inode, which a hard or symbolic link and an edit in place share; "" for bytes
            that are in no file.
    """

    content: str
    place: str


def source_of(data: Path | bytes, secret: bytes) -> Source:
    """The identity of a file, or of bytes, under this secret.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    if isinstance(data, bytes):
        return Source(hmac.new(secret, b"content" + data, hashlib.sha256).hexdigest(), "")
    keyed = hmac.new(secret, b"content", hashlib.sha256)
    try:
        with data.open("rb") as stream:
            found = os.fstat(stream.fileno())
            while block := stream.read(_BLOCK):
                keyed.update(block)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=data, remedy="name the data set's file") from error
    place = hmac.new(secret, f"place{found.st_dev}:{found.st_ino}".encode(), hashlib.sha256)
    return Source(keyed.hexdigest(), place.hexdigest())
