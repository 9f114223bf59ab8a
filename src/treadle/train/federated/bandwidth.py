"""How fast bytes reach a server, or, where there is none yet, pass through serialising and hashing."""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

import grpc
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from treadle.errors import InputError, UnavailableError
from treadle.train.federated.messages import array_record

_CALL = "/flwr.proto.Fleet/PushObject"
_LARGE, _SMALL, _REPEATS = 4 * 2**20, 2**10, 3
_SECONDS = 60.0


@dataclass(frozen=True)
class Transfer:
    """How fast bytes go.

    Attributes:
        way: "superlink" for the network up to a server, or "local" for this machine's own part of it.
        bytes_per_second: of large messages.
        latency: seconds of a small message, there and back.
    """

    way: str
    bytes_per_second: float
    latency: float

    def seconds(self, size: int) -> float:
        """What so many bytes take."""
        return self.latency + size / self.bytes_per_second


def to_superlink(address: str, root_certificates: Path) -> Transfer:
    """The upload to the SuperLink at HOST:PORT, over the TLS that a SuperNode uses.

    Random bytes are sent without a node's key, so that the server reads them whole and refuses them: nothing of the
    silo goes with them, and nothing on the server changes.

    Raises:
        InputError: the certificate cannot be read.
        UnavailableError: the server does not answer.
    """
    try:
        credentials = grpc.ssl_channel_credentials(root_certificates.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=root_certificates, remedy="check it") from error
    unlimited = [("grpc.max_send_message_length", -1)]
    with grpc.secure_channel(address, credentials, options=unlimited) as channel:
        _seconds_of(channel, address, _SMALL)  # the handshake belongs to no message
        small = median(_seconds_of(channel, address, _SMALL) for _ in range(_REPEATS))
        large = median(_seconds_of(channel, address, _LARGE) for _ in range(_REPEATS))
    return Transfer("superlink", (_LARGE - _SMALL) / max(large - small, 1e-6), small)


def _seconds_of(channel: grpc.Channel, address: str, size: int) -> float:
    """How long a message of random bytes takes until the server has refused it."""
    payload = os.urandom(size)
    begun = time.perf_counter()
    try:
        channel.unary_unary(_CALL)(payload, timeout=_SECONDS)
    except grpc.RpcError as error:
        code = cast("grpc.Call", error).code()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise UnavailableError(
                "the SuperLink does not answer", where=address, remedy="check address, certificate and network"
            ) from error
    return time.perf_counter() - begun


def on_this_machine() -> Transfer:
    """Serialising and hashing as Flower does before it sends: what a network would be the slower of."""
    tensor = torch.zeros(_LARGE // 4)
    small, large = (median(_packed(part) for _ in range(_REPEATS)) for part in (tensor[: _SMALL // 4], tensor))
    return Transfer("local", (_LARGE - _SMALL) / max(large - small, 1e-6), small)


def _packed(tensor: torch.Tensor) -> float:
    begun = time.perf_counter()
    content = RecordDict({"tensors": array_record({"B": tensor}), "facts": ConfigRecord({})})
    for item in get_all_nested_objects(content).values():
        hashlib.sha256(item.deflate())
    return time.perf_counter() - begun
