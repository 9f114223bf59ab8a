"""A federation over real silos: Flower's SuperLink and SuperNodes as processes, started with our settings alone.

server    `superlink_command` is the SuperLink; `admit` registers a silo's public key; `submit` starts the run
silo      `serve_silo` starts the SuperNode and answers its messages

All of it goes over TLS, a SuperNode without a registered key is refused, and only the SuperLink's own machine may
register keys and start runs (`train/federated/guard.py`). Nothing calls home.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from treadle import __version__, files
from treadle.configs.federate import FederateRun, SiloRun, SuperLink
from treadle.errors import ConfigError, FormatError, InputError, TreadleError, UnavailableError
from treadle.progress import Progress, silent
from treadle.recipes.federate import FederatedRun, Watched, federate_on, line_of, run_of, state_folder, watched
from treadle.recipes.silo import silo_client
from treadle.toml import load_toml
from treadle.train.federated import guard
from treadle.train.federated.applications import server_app, unused_client_app
from treadle.train.federated.client import client_app
from treadle.train.federated.node import ClientApp, answer_messages, handing_over
from treadle.train.federated.quiet import silent_environment
from treadle.train.federated.run import Grid

OUTCOME = "outcome.json"
_SECONDS_BETWEEN_QUESTIONS = 30.0
_LIVES = 3
_NOT_ACTIVATED = b"[code: 2004]"  # Flower's: the key is unknown, or a node is connected with it already
_KEPT_OUTPUT = 2**14

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


@dataclass(frozen=True)
class Command:
    """A process to start.

    Attributes:
        arguments: the program's path first.
        environment: all of it.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def run(self) -> int:
        """The exit code, once the process ends; Ctrl-C or a polite kill of this process ends it."""
        with self.running() as process:
            return process.wait()

    @contextlib.contextmanager
    def running(self, *, heard: bool = False) -> Iterator[subprocess.Popen[bytes]]:
        """A block while the process runs; it is ended with the block, and with this process.

        Args:
            heard: whether what it prints goes to the process's `stdout`, for the block to read.
        """

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        output, errors = (subprocess.PIPE, subprocess.STDOUT) if heard else (None, None)
        with subprocess.Popen(self.arguments, env=dict(self.environment), stdout=output, stderr=errors) as process:
            try:
                yield process
            finally:
                signal.signal(signal.SIGTERM, before)
                process.terminate()


def superlink_command(config: FederateRun) -> Command:
    """The SuperLink that this run's silos connect to; it runs until it is stopped.

    Raises:
        ConfigError: the run has no `superlink`.
        InputError: a certificate or key is missing.
    """
    link = _link(config)
    arguments = ["--host", link.host, "--port", str(link.port), "--enable-supernode-auth"]
    arguments += ["--ssl-certfile", _valid(link.certificate), "--ssl-keyfile", _existing(link.private_key)]
    arguments += ["--ssl-ca-certfile", _valid(link.root_certificates), "--disable-runtime-dependency-installation"]
    guarded = (sys.executable, "-m", guard.__name__)
    return Command((*guarded, *arguments), {**os.environ, **_server_environment(config)})


def admit(config: FederateRun, public_key: Path) -> None:
    """Register a silo's public key with the SuperLink that runs on this machine.

    Raises:
        InputError: there is no such key, or it is registered already.
        UnavailableError: the SuperLink does not answer.
    """
    _flwr(config, ["supernode", "register", _existing(public_key), "treadle"])


def submit(
    config: FederateRun,
    path: Path,
    *,
    resume: bool = False,
    progress: Progress = silent,
    seen: Callable[[Watched], None] = lambda now: None,
) -> FederatedRun:
    """What the run made on the SuperLink, once it is over; a run that Flower loses is resumed, twice at most.

    Args:
        config: the run's.
        path: of its TOML, which the ServerApp reads on the SuperLink's machine, which is this one.
        resume: whether a run that died goes on.
        progress: told of every round.
        seen: called with all rounds after each, for pages.

    Raises:
        InputError: as `federate_on`, told by the ServerApp.
        UnavailableError: the SuperLink does not answer.
    """
    _, folder = run_of(config, resume=resume)  # what is wrong with the configuration is said here and now
    outcome, bundle = state_folder(config) / OUTCOME, _bundle(config)
    for life in range(1, _LIVES + 1):
        outcome.unlink(missing_ok=True)
        settings = {"run": str(path.resolve()), "folder": str(Path.cwd()), "resume": "yes" if resume else ""}
        given = " ".join(f'{name}="{value}"' for name, value in settings.items())
        _flwr(config, ["run", str(bundle), "treadle", "--run-config", given])
        try:
            _follow(config, outcome, progress, seen)
        except _LostError as lost:
            if life == _LIVES:
                raise
            progress(f"{lost.what}; it goes on from its last round", 0, config.work.rounds)
            resume = folder.exists
        else:
            break
    return _made(config, outcome)


class _LostError(UnavailableError):
    """Flower has given the run up: its ServerApp died, or a starved machine made it miss its heartbeats."""


def _follow(config: FederateRun, outcome: Path, progress: Progress, seen: Callable[[Watched], None]) -> None:
    """Tell of every round until the ServerApp has written its outcome.

    Raises:
        _LostError: it ended without one.
    """
    progress("the run is on the SuperLink", 0, config.work.rounds)
    known, asked = 0, time.monotonic()
    while not outcome.exists():
        now = watched(config)
        if len(now.reports) > known:
            known = len(now.reports)
            progress(line_of(now.reports[-1]), known, config.work.rounds)
            seen(now)
        if time.monotonic() - asked > _SECONDS_BETWEEN_QUESTIONS:
            asked = time.monotonic()
            ended = _ended(_flwr(config, ["ls", "treadle", "--format", "json"]))
            if ended and not outcome.exists():
                raise _LostError(
                    f"the run ended without an outcome: {ended}",
                    remedy="the SuperLink's log may say why; `treadle federate resume` goes on from the last round",
                )
        time.sleep(1)
    seen(watched(config))


def _ended(listing: str) -> str:
    """How the newest run of Flower's list ended, with Flower's details; empty while it has not."""
    runs = json.loads(listing[listing.index("{") :]).get("runs", [])
    status = str(runs[0].get("status", "")) if runs else ""
    details = str(runs[0].get("status-details") or "") if runs else ""
    return ", ".join(filter(None, (status, details))) if status.startswith("finished") else ""


def _made(config: FederateRun, outcome: Path) -> FederatedRun:
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
    except Exception as error:
        told = str(error) if isinstance(error, TreadleError) else f"{type(error).__name__}: {error}"
        files.write_json(outcome, {"error": told, "kind": "input" if isinstance(error, InputError) else "outside"})
        raise


server, client = server_app(_serve_run), unused_client_app()


def serve_silo(config: SiloRun, path: Path) -> int:
    """The exit code of the silo's SuperNode; it runs until it is stopped, and this process answers its messages.

    Raises:
        ConfigError: the silo has no `supernode`.
        InputError: a key or certificate is missing.
        UnavailableError: Flower is not installed, or the SuperLink does not let the silo's key in.
    """
    command = supernode_command(config, path)
    pipe = handing_over(_processes(config))

    def app() -> ClientApp:
        return client_app(lambda context: silo_client(config))

    said = bytearray()
    with command.running(heard=True) as process:
        code = answer_messages(pipe, app, _listening(process, said))
    if code != 0 and _NOT_ACTIVATED in said:
        raise UnavailableError(
            "the SuperLink does not let this key in",
            where=config.supernode.private_key if config.supernode else path,
            remedy="have it admitted (`treadle federate admit`); if it is, another node is connected with it, "
            "and every silo needs a key of its own",
        )
    return code


def _listening(process: subprocess.Popen[bytes], said: bytearray) -> Callable[[], int | None]:
    """What tells whether the process has ended, passes on what it has printed, and keeps the last of it in `said`.

    No thread listens, since silos fork.
    """
    stream = process.stdout
    assert stream is not None
    os.set_blocking(stream.fileno(), False)

    def ended() -> int | None:
        code = process.poll()  # first, so that nothing is printed between it and the last reading
        while part := stream.read(_KEPT_OUTPUT):
            said.extend(part)
            del said[:-_KEPT_OUTPUT]
            sys.stderr.write(part.decode(errors="replace"))
            sys.stderr.flush()
        return code

    return ended


def supernode_command(config: SiloRun, path: Path) -> Command:
    """The SuperNode of the silo whose TOML is at `path`; whoever starts it must answer what `handing_over` gives.

    Raises:
        ConfigError: the silo has no `supernode`.
        InputError: a key or certificate is missing.
        UnavailableError: Flower is not installed.
    """
    node = config.supernode
    if node is None:
        raise ConfigError("key 'supernode' is missing", where=path, remedy="say how the silo reaches its server")
    arguments = ["--superlink", node.superlink, "--root-certificates", _valid(node.root_certificates)]
    arguments += ["--auth-supernode-private-key", _existing(node.private_key), "--port", str(node.port)]
    environment = {**os.environ, **silent_environment(), "FLWR_HOME": str(config.folder.resolve() / "flower")}
    places = (str(_processes(config)), _commands(), os.environ["PATH"])
    return Command((_command("flower-supernode"), *arguments), {**environment, "PATH": os.pathsep.join(places)})


def _processes(config: SiloRun) -> Path:
    """Where the name of Flower's client process stands for ours."""
    return config.folder.resolve() / "flower" / "processes"


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


def _valid(certificate: Path) -> str:
    """The path of a certificate that is in force.

    Raises:
        InputError: there is none, or it is not valid today.
        FormatError: it is no certificate.
    """
    path = _existing(certificate)
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except ValueError as error:
        raise FormatError(
            "not a certificate in PEM", where=certificate, remedy="give the signed certificate"
        ) from error
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    if not begins <= datetime.now(UTC) <= ends:
        raise InputError(
            f"the certificate is valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}",
            where=certificate,
            remedy="have a new one signed",
        )
    return path


def _command(name: str) -> str:
    found = shutil.which(name, path=f"{_commands()}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise UnavailableError(f"{name} is not installed", remedy="pip install 'treadle[federated]'")
    return found


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
        lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines()]
        lines = [line for line in lines if line and "For more information" not in line]
        raise UnavailableError(
            f"flwr {arguments[0]}: {lines[-1] if lines else 'failed'}", remedy="is the SuperLink running?"
        )
    return done.stdout
