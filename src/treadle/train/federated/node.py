"""The processes that answer a silo's messages, in place of those that would run a server's code.

A SuperNode starts a `flwr-clientapp` process a message, which runs the ClientApp that came with the server's bundle:
whoever may start a run could then read a silo's rows. At a silo of ours that name stands for a script of one line,
which hands the message's address over to the silo's own process. This one forks; the child takes the message, never
unpacks the bundle, and answers by the code that is installed at the silo. Being forked, it has imported everything:
a message costs no start of Python.
"""

import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

from treadle import files

__all__ = ["ClientApp", "answer_messages", "handing_over"]

_PROCESS = "flwr-clientapp"
_BORDER = "\x1f"  # between arguments, in which it does not occur
_SECONDS_BETWEEN_LOOKS = 0.5


def handing_over(folder: Path) -> Path:
    """A pipe in `folder`, which is to stand first in a SuperNode's PATH: whoever is started there writes into it."""
    pipe = folder / "messages"
    script = f"#!/bin/sh\nIFS=$(printf '\\037')\nprintf '%s\\n' \"$*\" > '{pipe}'\n"
    files.write_bytes(folder / _PROCESS, script.encode())
    (folder / _PROCESS).chmod(0o755)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe, 0o600)
    return pipe


def answer_messages(pipe: Path, app_of: Callable[[], ClientApp], ended: Callable[[], int | None]) -> int:
    """What `ended` says, once it says something; until then every message is answered by a process of its own.

    Args:
        pipe: of `handing_over`.
        app_of: makes the silo's ClientApp; called in the process that answers, once a message is there.
        ended: the exit code of the SuperNode, or None while it runs.
    """
    stream, rest, children = os.open(pipe, os.O_RDWR), b"", set[int]()
    try:
        while (code := ended()) is None:
            if select.select([stream], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
                *lines, rest = (rest + os.read(stream, 65536)).split(b"\n")
                for line in lines:
                    children.add(_answer(line.decode().split(_BORDER), app_of))
            _bury(children)
        return code
    finally:
        os.close(stream)


def _bury(children: set[int]) -> None:
    """Take note of children that are done."""
    for child in list(children):
        if os.waitpid(child, os.WNOHANG)[0]:
            children.discard(child)


def _answer(arguments: list[str], app_of: Callable[[], ClientApp]) -> int:
    """The number of a process that does what `flwr-clientapp` does with these arguments, by the silo's own app."""
    if child := os.fork():
        return child
    code = 1
    try:
        sys.argv = [_PROCESS, *arguments]
        run_clientapp.install_from_fab = _nothing  # pyright: ignore[reportPrivateImportUsage]
        run_clientapp.get_load_client_app_fn = _loader(app_of)  # pyright: ignore[reportPrivateImportUsage]
        flwr_clientapp()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def _nothing(*_: object, **__: object) -> None:
    """Stand in for unpacking the server's bundle."""


def _loader(app_of: Callable[[], ClientApp]) -> Callable[..., Callable[..., ClientApp]]:
    """What stands for loading the bundle's app."""

    def own(*_: object, **__: object) -> ClientApp:
        return app_of()

    def loader(*_: object, **__: object) -> Callable[..., ClientApp]:
        return own

    return loader
