"""What a pilot finds: trials, the row of every ε, and what follows for the run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from treadle.configs.pilot import Epsilon, Init, PilotRun
from treadle.errors import FormatError
from treadle.evaluation.intervals import Interval
from treadle.train.signal import GradientSignal


@dataclass(frozen=True)
class Point:
    """One place of the grid."""

    init: Init
    learning_rate: float
    max_grad_norm: float

    def __str__(self) -> str:
        return f"{self.init}, learning rate {self.learning_rate:g}, clip {self.max_grad_norm:g}"


@dataclass(frozen=True)
class Trial:
    """One training to be done: a point at an ε ("silos'" in a private pilot), to choose ("search") or to "report"."""

    point: Point
    epsilon: Epsilon
    seed: int
    stage: str


@dataclass(frozen=True)
class Tried:
    """What a trial has shown.

    Attributes:
        trial: which.
        accuracy: on the half of the held-out rows that belongs to its stage; 0 where it failed.
        round_bytes: up and down, of the round and client with the most.
        step_seconds: of one private step of one client.
        memory: most bytes held, by the process in which all simulated clients take turns.
        spent: ε that the silos' data have spent in all by then; None on public rows.
        failed: why it did not end; "" if it did.
    """

    trial: Trial
    accuracy: float
    round_bytes: int = 0
    step_seconds: float = 0.0
    memory: int = 0
    spent: float | None = None
    failed: str = ""

    @staticmethod
    def of_json(content: Mapping[str, object], *, where: object) -> "Tried":
        """The trial in a JSON object of `asdict`.

        Raises:
            FormatError: it is none.
        """
        row = json.loads(json.dumps(content))
        try:
            trial = row.pop("trial")
            point = Point(**trial.pop("point"))
            return Tried(Trial(point, **trial), **row)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"no trial of a pilot ({error})", where=where, remedy="delete the file") from error


@dataclass(frozen=True)
class Noise:
    """What is added at one ε.

    Attributes:
        multiplier: the noise's deviation over the clip.
        signal: how far all steps move B along the public rows' first gradient, over that noise; None without noise.
    """

    multiplier: float
    signal: float | None


@dataclass(frozen=True)
class AtEpsilon:
    """What the pilot found for one ε.

    Attributes:
        epsilon: of every silo.
        point: the best of the grid.
        accuracy: over the seeds, with the wider of two 95% intervals at either end: Student's over seeds, and Wilson's
            over the rows that judge.
        tried: the reported trials.
        noise: of the trials; None in a private pilot, where each silo has its own.
        noise_of_run: likewise of the whole run, where its `records` are stated.
    """

    epsilon: Epsilon
    point: Point
    accuracy: Interval
    tried: tuple[Tried, ...]
    noise: Noise | None
    noise_of_run: Noise | None

    @property
    def round_bytes(self) -> int:
        """The most of the trials."""
        return max(row.round_bytes for row in self.tried)

    @property
    def step_seconds(self) -> float:
        """The mean over the trials."""
        return fmean(row.step_seconds for row in self.tried)

    @property
    def memory(self) -> int:
        """The most of the trials."""
        return max(row.memory for row in self.tried)


@dataclass(frozen=True)
class Check:
    """A threshold beside what was found."""

    name: str
    found: float
    wanted: float
    holds: bool


@dataclass(frozen=True)
class PilotResult:
    """What a pilot found.

    Attributes:
        config: what was tried.
        signals: what public rows' gradients have in common, by the A; empty in a private pilot.
        searched: the trials that chose.
        curve: a row an ε, the strongest privacy first.
        untrained: accuracy of the base alone, on the rows that judge the curve.
        decided: the row that the decision is about: the smallest ε that may go, else the acceptable one with the best
            accuracy.
        checks: of that row.
        run: the whole run's TOML; None on "no go".
    """

    config: PilotRun
    signals: Mapping[Init, GradientSignal]
    searched: tuple[Tried, ...]
    curve: tuple[AtEpsilon, ...]
    untrained: float
    decided: AtEpsilon
    checks: tuple[Check, ...]
    run: Path | None

    @property
    def go(self) -> bool:
        """Whether every threshold holds."""
        return all(check.holds for check in self.checks)
