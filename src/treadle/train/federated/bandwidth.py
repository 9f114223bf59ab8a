"""How fast bytes reach a server, or, where there is none yet, pass through serialising and hashing."""

import hashlib
import os
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supernode.fleet_http_client import FleetHttpClient

from treadle.errors import FormatError, InputError, UnavailableError
from treadle.train.federated.messages import array_record

_LARGE, _SMALL, _REPEATS = 4 * 2**20, 2**10, 3
_REFUSED = 401  # the SuperLink authenticates a message once it has read all of it


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
    """The upload to the SuperLink at HOST:PORT, by the client of a SuperNode: protobuf over HTTPS, one connection.

    Random bytes are sent without a node's key, so that the server reads them whole and refuses them: nothing of the
    silo goes with them, and nothing on the server changes.

    Raises:
        InputError: the certificate cannot be read.
        FormatError: it is none.
        UnavailableError: the server does not answer, is not trusted, or is no SuperLink.
    """
    try:
        trusted = root_certificates.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=root_certificates, remedy="check it") from error
    try:
        opened = FleetHttpClient.from_server_address(address, False, trusted, interceptors=[])
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise FormatError(
            "not a certificate in PEM", where=root_certificates, remedy="give the authority's certificate"
        ) from error
    with opened as client:
        _seconds_of(client, address, _SMALL)  # the handshake belongs to no message
        small = median(_seconds_of(client, address, _SMALL) for _ in range(_REPEATS))
        large = median(_seconds_of(client, address, _LARGE) for _ in range(_REPEATS))
    return Transfer("superlink", (_LARGE - _SMALL) / max(large - small, 1e-6), small)


def _seconds_of(client: FleetHttpClient, address: str, size: int) -> float:
    """How long an object of random bytes takes until the server has refused it.

    Raises:
        UnavailableError: nobody does, or not as a SuperLink would.
    """
    request = PushObjectRequest(object_content=os.urandom(size))
    stranger = "what answers is no SuperLink of this Flower"
    begun = time.perf_counter()
    try:
        client.PushObject(request)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == _REFUSED:
            return time.perf_counter() - begun
        raise UnavailableError(
            f"{stranger} (HTTP {error.response.status_code})", where=address, remedy="check the address"
        ) from error
    except httpx.TransportError as error:
        raise _unreached(address, error) from error
    except (httpx.InvalidURL, ValueError) as error:
        raise UnavailableError(stranger, where=address, remedy="check the address: HOST:PORT") from error
    raise UnavailableError(stranger, where=address, remedy="check the address")


def _unreached(address: str, error: Exception) -> UnavailableError:
    """Why: the server's certificate, if TLS says so."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return UnavailableError(
                f"the SuperLink's certificate is not trusted: {cause.verify_message}",
                where=address,
                remedy="check supernode.root_certificates, and that the certificate names this address",
            )
    return UnavailableError(
        "the SuperLink does not answer", where=address, remedy="check address, certificate and network"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
