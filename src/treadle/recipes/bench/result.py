"""What every benchmark returns, and how a long one keeps its finished runs."""

import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from treadle import files
from treadle.errors import InputError


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        value: what was measured.
        unit: its unit, "1" for a ratio or share.
        goal: what it should reach, in words of comparison such as "<= 0.03"; None where there is no goal.
        holds: whether it does; None where there is no goal or the run was too small to tell.
    """

    value: float
    unit: str
    goal: str | None = None
    holds: bool | None = None

    @staticmethod
    def against(value: float, unit: str, *, at_least: float | None = None, at_most: float | None = None) -> "Metric":
        """The figure, held against one bound."""
        if at_least is not None:
            return Metric(value, unit, f">= {at_least:g}", value >= at_least)
        if at_most is not None:
            return Metric(value, unit, f"<= {at_most:g}", value <= at_most)
        return Metric(value, unit)

    def undecided(self) -> "Metric":
        """The same figure from a run too small to decide anything."""
        return Metric(self.value, self.unit, self.goal)


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's figures, with what is needed to judge and repeat them."""

    name: str
    device: str
    commit: str
    settings: Mapping[str, object]
    metrics: Mapping[str, Metric]
    rows: Sequence[Mapping[str, object]]

    def undecided(self) -> "BenchmarkResult":
        """The same figures from a run too small to decide anything."""
        return replace(self, metrics={name: metric.undecided() for name, metric in self.metrics.items()})

    def to_json(self) -> dict[str, object]:
        """The result as plain JSON values; null where nothing was measured, since JSON has no NaN."""
        return {
            "name": self.name,
            "device": self.device,
            "commit": self.commit,
            "settings": dict(self.settings),
            "metrics": {name: _told(asdict(metric)) for name, metric in self.metrics.items()},
            "rows": [_told(row) for row in self.rows],
        }


def _told(row: Mapping[str, object]) -> dict[str, object]:
    return {name: None if value != value else value for name, value in row.items()}  # only NaN is not itself


def device_name() -> str:
    """The processor and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of the checkout that this code runs from, with "+" if it was changed; "" outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "."],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip()[:12] + ("+" if changed.stdout.strip() else "")


def finished_runs(path: Path) -> Iterator[dict[str, object]]:
    """The runs recorded in a JSON Lines file."""
    return (run for _, run in files.json_lines(path))


def is_recorded(path: Path, key: Mapping[str, object]) -> bool:
    """Whether a finished run has all of these entries."""
    return any(key.items() <= run.items() for run in finished_runs(path))


def data_of(data: Path | None) -> Path:
    """The folder of the data sets.

    Raises:
        InputError: nobody has named one.
    """
    if data is None:
        raise InputError("the tasks need data files", remedy="pass --data DIR")
    return data


def record_run(path: Path, run: Mapping[str, object]) -> None:
    """Append a finished run; the file is replaced whole, so a crash leaves the earlier runs."""
    earlier = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finished_runs(path))
    files.write_bytes(path, (earlier + json.dumps(run, ensure_ascii=False) + "\n").encode())
