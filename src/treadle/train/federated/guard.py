"""Flower's SuperLink with its doors for operators shut to everybody but this machine.

Flower serves all of its HTTP APIs on one port. The Fleet API asks a SuperNode for its registered key; the Control API,
which registers keys and starts runs, asks for nothing unless an account service is bought, and the Runtime API hands a
waiting ServerApp's task to whoever asks first. Silos need the Fleet API alone, so that is all that a network gets.

    python -m treadle.train.federated.guard ...    # the arguments of `flower-superlink`
"""

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import uvicorn
from flwr.superlink.cli import flower_superlink

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/v1/fleet/", "/health")
"""What the paths begin with that a network may ask for."""

_OF_PROXIES = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-real-ip"})
_REFUSAL = b"only the SuperLink's own machine may ask for this\n"


def guarded(application: Application) -> Application:
    """The ASGI application, which answers 403 to other machines wherever `OPEN` does not say otherwise."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or str(scope.get("path", "")).startswith(OPEN) or is_local(scope):
            await application(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(_REFUSAL)).encode())]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})
        else:
            await send({"type": "websocket.close", "code": 1008})

    return answer


def is_local(scope: Scope) -> bool:
    """Whether a connection comes from this machine: a loopback address, or the very one that it was made to.

    What a proxy passes on is not, whoever runs the proxy.
    """
    if any(name.lower() in _OF_PROXIES for name, _ in scope.get("headers", ())):
        return False
    peer, own = _address(scope.get("client")), _address(scope.get("server"))
    return peer is not None and (peer.is_loopback or peer == own)


def _address(place: object) -> IPv4Address | IPv6Address | None:
    """The IP address of an ASGI (host, port), None where there is none."""
    try:
        found = ip_address(str(place[0]).partition("%")[0])  # type: ignore[index]  # a scope of link-local IPv6 apart
    except (TypeError, IndexError, ValueError):
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def main() -> None:
    """Run `flower-superlink` behind the guard."""
    run = uvicorn.run

    def run_guarded(app: Application, **options: object) -> None:
        run(guarded(app), **{**options, "proxy_headers": False})  # type: ignore[arg-type]  # as Flower gives them

    uvicorn.run = run_guarded
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
