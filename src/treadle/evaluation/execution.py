"""Running generated code in a jail, and only where the caller has allowed it.

What the jail guarantees (Linux 5.12 or later; elsewhere, and where the kernel forbids it, running is refused):
    network     a network namespace of its own, without an interface; sockets on the file system are out of sight
    files       a file system in memory with an empty /work (working directory and HOME, 64 MB in all); of the machine
                it sees /usr, /lib, /lib64 and the interpreter's own folder, read-only; no /home, /tmp, /run, /proc
    processes   process and IPC namespaces of its own: it sees, signals and traces nobody; all of it ends with the
                program or at the timeout, daemons included
    rights      a user without capabilities (root becomes nobody) that can gain none; an environment of five variables
    limits      wall clock and CPU seconds, address space and file size of each process, number of processes
What it does not: it is no virtual machine, so a hole in the kernel is a hole in the jail. Memory is bounded by process,
not in sum, and time on the CPU is shared with everybody. The program may read what the folders above hold. A program
that sets out to forge its own verdict can: judge models by it, not adversaries.
"""

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from treadle.data.prompts import Example
from treadle.errors import InputError, UnsupportedError

_JAIL = Path(__file__).with_name("jail.py")

# The verdict is written only if the program runs to its end: `exit()` in the middle is no success.
_DRIVER = """\
import os, sys
write, verdict, word = os.write, int(sys.argv[1]), sys.argv[2].encode()
del sys.argv[1:]
exec(compile(open("program.py", encoding="utf-8").read(), "program.py", "exec"), {"__name__": "__main__"})
write(verdict, word)
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds of wall clock and of CPU, bytes, and how much of its output is kept."""

    seconds: float | int = 10
    cpu_seconds: int = 10
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 2**20
    processes: int = 8
    output_bytes: int = 2**14

    def __post_init__(self) -> None:
        """Refuse limits that let nothing run, before anything does."""
        if self.seconds <= 0 or min(self.cpu_seconds, self.file_bytes, self.processes, self.output_bytes) < 1:
            raise InputError("a limit is not positive", where="Limits", remedy="give positive limits")
        if self.memory_bytes < 64 * 2**20:
            raise InputError("memory_bytes is below 64 MiB", where="Limits", remedy="an interpreter needs more")


@dataclass(frozen=True)
class Execution:
    """How a program ended: it ran to its end ("passed"), did not ("failed"), or was stopped by the clock."""

    status: Literal["passed", "failed", "timeout"]
    stdout: str
    stderr: str
    seconds: float


def check_completion(
    example: Example, completion: str, *, allow_code_execution: bool = False, limits: Limits | None = None
) -> Execution:
    """The run of the program that checks a generated completion: "passed" if every unit test holds.

    Raises:
        InputError: the example has no program.
        UnsupportedError: see `run_program`.
    """
    if example.program is None:
        raise InputError("the example has no unit tests", remedy="check code only for tasks with the metric 'code'")
    before, after = example.program
    return run_program(before + completion + after, allow_code_execution=allow_code_execution, limits=limits)


def run_program(source: str, *, allow_code_execution: bool = False, limits: Limits | None = None) -> Execution:
    """How the Python program `source` ends in a jail; the module says what that guarantees.

    Raises:
        UnsupportedError: nobody has allowed it, or this system cannot make the jail; nothing has run.
    """
    prove_jail(allow_code_execution=allow_code_execution)
    return _run_program(source, limits or Limits())


def prove_jail(*, allow_code_execution: bool = False) -> None:
    """Return if programs run here, as one run of an empty one shows: all that fail after it fail by their own fault.

    Raises:
        UnsupportedError: see `run_program`.
    """
    if not allow_code_execution:
        raise UnsupportedError(
            "generated code runs only by permission", remedy="pass --allow-code-execution if you accept the risk"
        )
    if sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"):
        raise UnsupportedError(f"no jail for {sys.platform}", remedy="run generated code on 64-bit Linux")
    _prove()


@functools.cache
def _prove() -> None:
    empty = _run_program("", Limits(seconds=60))
    if empty.status != "passed":
        raise UnsupportedError(
            f"this system makes no jail ({empty.stderr.strip() or 'no reason given'})",
            remedy="allow unprivileged user namespaces, or run where root may make namespaces",
        )


def _run_program(source: str, limits: Limits) -> Execution:
    word = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="treadle-jail-"))
        out, err, verdict = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        command = _command(Path(root), word, verdict.fileno(), limits)
        begin = time.monotonic()
        ended = _run(command, source.encode("utf-8", "replace"), (out, err, verdict), limits.seconds)
        seconds = time.monotonic() - begin
        stdout, stderr, said = _head(out, limits.output_bytes), _head(err, limits.output_bytes), _head(verdict, 64)
    status = "timeout" if not ended else "passed" if said == word else "failed"
    return Execution(status, stdout, stderr, seconds)


def _command(root: Path, word: str, verdict: int, limits: Limits) -> list[str]:
    """The command that starts the jail; of a virtual environment only the interpreter's own home gets in."""
    interpreter = str(Path(sys.executable).resolve())
    settings = {
        "root": str(root),
        "shown": ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", str(Path(sys.base_prefix).resolve())],
        "disk": 64 * 2**20,
        "command": [interpreter, "-I", "-S", "-c", _DRIVER, str(verdict), word],
        "limits": {
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NPROC": limits.processes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        },
    }
    return [interpreter, "-I", "-S", str(_JAIL), json.dumps(settings)]


def _run(
    command: list[str], source: bytes, files: tuple[IO[bytes], IO[bytes], IO[bytes]], seconds: float | int
) -> bool:
    """Whether the command ended by itself; its session is dead in any case, also when this is interrupted."""
    out, err, verdict = files
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=err,
        pass_fds=[verdict.fileno()],
        start_new_session=True,
        env={},
        cwd="/",
    )
    try:
        process.communicate(source, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


def _head(file: IO[bytes], count: int) -> str:
    file.seek(0)
    return file.read(count).decode("utf-8", "replace")
