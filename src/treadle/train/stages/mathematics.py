"""Whether two texts are equal as mathematics, by the library math-verify, in a process of its own and under a clock.

The library works out what it reads, and for one such as $9^{9^{9}}$ that takes longer than anybody waits, in C code
that Python cannot interrupt. An alarm that nobody handles ends the process instead; the next pair gets another.
"""

import contextlib
import json
import subprocess
import sys
import weakref

from treadle.errors import UnavailableError

# A pair as a line of JSON in, true or false as a line out; the first line out says that the library is there.
_DRIVER = """\
import json, signal, sys
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    signal.alarm(int(sys.argv[1]))
    gold, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))
    print(json.dumps(bool(gold and answer and verify(gold, answer, timeout_seconds=None))), flush=True)
    signal.alarm(0)
"""


class Comparing:
    """Compares answers; its process starts with the first pair, and ends with this object.

    Args:
        seconds: whole seconds of wall clock that a pair may take; the default is the library's own.
    """

    def __init__(self, seconds: int = 5) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._ends = weakref.finalize(self, lambda: None)

    def equal(self, gold: str, answer: str) -> bool:
        """Whether both can be read and are equal; false where that is not known in time.

        Raises:
            UnavailableError: the library does not start.
        """
        process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        said = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps([gold, answer]) + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
        if not said:
            self._ends()
            self._process = None
        return said == "true\n"

    def _started(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-c", _DRIVER, str(self._seconds)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self._process, self._ends = process, weakref.finalize(self, _end, process)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise UnavailableError("math-verify does not start", remedy="pip install 'treadle[rl]'")
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
