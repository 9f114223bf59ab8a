"""A federation over real silos: Flower's SuperLink and SuperNodes as processes, started with our settings alone.

server    `serve` starts the SuperLink; `admit` registers a silo's public key; `submit` starts the run
silo      `serve_silo` starts the SuperNode, whose messages a process of ours answers

All of it goes over TLS, and a SuperNode without a registered key is refused. Nothing calls home.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from treadle import __version__, files
from treadle.configs.federate import FederateRun, SiloRun, SuperLink
from treadle.configs.toml import load_toml
from treadle.errors import ConfigError, InputError, TreadleError, UnavailableError
from treadle.progress import Progress, silent
from treadle.recipes.federate import FederatedRun, federate_on, run_of, state_folder
from treadle.train.federated.applications import server_app, unused_client_app
from treadle.train.federated.node import PROCESS
from treadle.train.federated.quiet import silent_environment
from treadle.train.federated.run import Grid

OUTCOME = "outcome.json"

_BUNDLE = """
[project]
name = "treadle-federation"
version = "1.0.0"
description = "A federation of treadle {version}; silos answer by their own code."
license = "Apache-2.0"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "treadle"

[tool.flwr.app.components]
serverapp = "treadle_federation:server"
clientapp = "treadle_federation:client"

[tool.flwr.app.config]
run = ""
folder = ""
resume = ""
"""
_MODULE = "from treadle.recipes.superlink import client, server\n\n__all__ = ['client', 'server']\n"


def serve(config: FederateRun) -> int:
    """The exit code of the SuperLink that this run's silos connect to; it runs until it is stopped.

    Raises:
        ConfigError: the run has no `superlink`.
        InputError: a certificate or key is missing.
        UnavailableError: Flower is not installed.
    """
    link = _link(config)
    arguments = ["--host", link.host, "--port", str(link.port), "--enable-supernode-auth"]
    arguments += ["--ssl-certfile", _existing(link.certificate), "--ssl-keyfile", _existing(link.private_key)]
    arguments += ["--ssl-ca-certfile", _existing(link.root_certificates), "--disable-runtime-dependency-installation"]
    return _run("flower-superlink", arguments, _server_environment(config))


def admit(config: FederateRun, public_key: Path) -> None:
    """Register a silo's public key with the running SuperLink.

    Raises:
        InputError: there is no such key, or it is registered already.
        UnavailableError: the SuperLink does not answer.
    """
    _flwr(config, ["supernode", "register", _existing(public_key), "treadle"])


def submit(config: FederateRun, path: Path, *, resume: bool = False, progress: Progress = silent) -> FederatedRun:
    """What the run made on the SuperLink, once it is over.

    Args:
        config: the run's.
        path: of its TOML, which the ServerApp reads on the SuperLink's machine, which is this one.
        resume: whether a run that died goes on.
        progress: told that it waits.

    Raises:
        InputError: as `federate_on`, told by the ServerApp.
        UnavailableError: the SuperLink does not answer.
    """
    run_of(config, resume=resume)  # what is wrong with the configuration is said here and now
    outcome = state_folder(config) / OUTCOME
    outcome.unlink(missing_ok=True)
    bundle = _bundle(config)
    settings = {"run": str(path.resolve()), "folder": str(Path.cwd()), "resume": "yes" if resume else ""}
    given = " ".join(f'{name}="{value}"' for name, value in settings.items())
    progress("the run is on the SuperLink", 0, config.work.rounds)
    _flwr(config, ["run", str(bundle), "treadle", "--stream", "--run-config", given])
    return _made(config, outcome)


def _made(config: FederateRun, outcome: Path) -> FederatedRun:
    if not outcome.exists():
        raise TreadleError("the ServerApp left no outcome", where=outcome.parent, remedy="see the SuperLink's log")
    told = files.read_json(outcome)
    if told.get("error"):
        kind = InputError if told.get("kind") == "input" else UnavailableError
        raise kind(str(told["error"]))
    return FederatedRun.load(config, ended=str(told.get("ended", "")))


def _serve_run(grid: Grid, settings: Mapping[str, str]) -> None:
    """The ServerApp's work: the run that RUN.toml describes, its outcome written down for `submit`."""
    os.chdir(settings["folder"])
    config = load_toml(Path(settings["run"]), FederateRun)
    outcome = state_folder(config) / OUTCOME
    try:
        made = federate_on(grid, config, resume=bool(settings["resume"]))
        files.write_json(outcome, {"ended": made.ended})
    except TreadleError as error:
        kind = "input" if isinstance(error, InputError) else "outside"
        files.write_json(outcome, {"error": str(error), "kind": kind})
        raise


server, client = server_app(_serve_run), unused_client_app()


def serve_silo(config: SiloRun, path: Path) -> int:
    """The exit code of the SuperNode of this silo; it runs until it is stopped.

    Raises:
        ConfigError: the silo has no `supernode`.
        InputError: a key or certificate is missing.
        UnavailableError: Flower is not installed.
    """
    node = config.supernode
    if node is None:
        raise ConfigError("key 'supernode' is missing", where=path, remedy="say how the silo reaches its server")
    arguments = ["--superlink", node.superlink, "--root-certificates", _existing(node.root_certificates)]
    arguments += ["--auth-supernode-private-key", _existing(node.private_key), "--port", str(node.port)]
    home = config.folder.resolve() / "flower"
    environment = {**silent_environment(), "FLWR_HOME": str(home)}
    environment["PATH"] = f"{_own_processes(home, path)}{os.pathsep}{_commands()}{os.pathsep}{os.environ['PATH']}"
    return _run("flower-supernode", arguments, environment)


def _own_processes(home: Path, silo: Path) -> Path:
    """A folder in which the name of Flower's client process stands for ours."""
    folder = home / "processes"
    script = f'#!/bin/sh\nexec "{sys.executable}" -m treadle.recipes.silo_node "{silo.resolve()}" "$@"\n'
    files.write_bytes(folder / PROCESS, script.encode())
    (folder / PROCESS).chmod(0o755)
    return folder


def _bundle(config: FederateRun) -> Path:
    folder = state_folder(config) / "bundle"
    files.write_bytes(folder / "pyproject.toml", _BUNDLE.format(version=__version__).encode())
    files.write_bytes(folder / "treadle_federation.py", _MODULE.encode())
    return folder


def _link(config: FederateRun) -> SuperLink:
    if config.superlink is None:
        raise ConfigError("key 'superlink' is missing", remedy="say where the silos connect to")
    return config.superlink


def _server_environment(config: FederateRun) -> dict[str, str]:
    """Flower's variables for the server's side, with a home that knows one SuperLink: the run's."""
    link, home = _link(config), state_folder(config).resolve() / "flower"
    connection = f'address = "{link.host}:{link.port}"\nroot-certificates = "{link.root_certificates.resolve()}"\n'
    text = f'[superlink]\ndefault = "treadle"\n\n[superlink.treadle]\n{connection}'
    files.write_bytes(home / "config.toml", text.encode())
    path = f"{_commands()}{os.pathsep}{os.environ['PATH']}"
    return {**silent_environment(), "FLWR_HOME": str(home), "PATH": path}


def _commands() -> str:
    """Where this Python's commands are."""
    return str(Path(sys.executable).parent)


def _existing(path: Path) -> str:
    if not path.is_file():
        raise InputError("no such file", where=path, remedy="check the path")
    return str(path.resolve())


def _command(name: str) -> str:
    found = shutil.which(name, path=f"{_commands()}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise UnavailableError(f"{name} is not installed", remedy="pip install 'treadle[federated]'")
    return found


def _run(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    with subprocess.Popen([_command(name), *arguments], env={**os.environ, **environment}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            raise


def _flwr(config: FederateRun, arguments: Sequence[str]) -> str:
    """What Flower's command line printed.

    Raises:
        UnavailableError: it failed; the last line it printed.
    """
    done = subprocess.run(
        [_command("flwr"), *arguments],
        env={**os.environ, **_server_environment(config)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise UnavailableError(
            f"flwr {arguments[0]}: {lines[-1] if lines else 'failed'}", remedy="is the SuperLink running?"
        )
    return done.stdout
