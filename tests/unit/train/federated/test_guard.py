"""Who may ask the SuperLink for what."""

import asyncio
from typing import Any

import pytest

from treadle.train.federated.guard import guarded

LOCAL, STRANGER, OWN = "127.0.0.1", "10.0.0.9", "10.0.0.1"


def status(path: str, client: str | None, *, server: str = OWN, headers: tuple[tuple[bytes, bytes], ...] = ()) -> int:
    """What a request for `path` is answered: 200 where it gets through to the application behind the guard."""
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": headers, "server": (server, 9093)}
    scope["client"] = None if client is None else (client, 50000)
    asyncio.run(guarded(application)(scope, None, send))  # type: ignore[arg-type]  # nobody receives
    return sent[0]["status"]


@pytest.mark.parametrize("path", ["/v1/control/register-node", "/v1/runtime/acquire-task", "/docs", "/v1/fleetx", "/"])
def test_another_machine_gets_nothing_but_what_supernodes_need(path: str) -> None:
    assert status(path, STRANGER) == 403
    assert status(path, None) == 403
    assert status(path, "somewhere") == 403
    assert status(path, LOCAL) == 200


def test_a_supernode_gets_through_from_anywhere() -> None:
    assert status("/v1/fleet/push-object", STRANGER) == 200


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", OWN, f"::ffff:{OWN}"])
def test_this_machine_is_known_by_its_addresses(client: str) -> None:
    assert status("/v1/control/list-runs", client) == 200


@pytest.mark.parametrize("client", ["::ffff:10.0.0.9", "fe80::1%eth0", "0.0.0.0"])
def test_other_addresses_are_other_machines(client: str) -> None:
    assert status("/v1/control/list-runs", client) == 403


@pytest.mark.parametrize("header", [b"X-Forwarded-For", b"forwarded", b"Via", b"x-real-ip"])
def test_what_a_proxy_passes_on_is_from_elsewhere_though_the_proxy_is_here(header: bytes) -> None:
    assert status("/v1/control/list-runs", LOCAL, headers=((header, b"127.0.0.1"),)) == 403


def test_a_websocket_is_closed_and_the_start_goes_through() -> None:
    seen: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def send(message: Any) -> None:
        seen.append(message["type"])

    for kind in ("lifespan", "websocket"):
        scope = {"type": kind, "path": "/v1/control/x", "client": (STRANGER, 1), "server": (OWN, 9093), "headers": []}
        asyncio.run(guarded(application)(scope, None, send))  # type: ignore[arg-type]  # nobody receives
    assert seen == ["lifespan", "websocket.close"]
