"""The TOML of `treadle federate pilot`: what is tried on public rows, what must be reached, and the run it is for."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from treadle.configs.family import PublicText
from treadle.configs.federate import FederateRun, SuperLink
from treadle.configs.train import RowsData
from treadle.toml import TomlTable
from treadle.train.federated.settings import LocalWork, RoundRules
from treadle.train.federated.variants import VariantSettings

Init = Literal["kaiming", "orthonormal", "weight-svd", "public-pca"]
Positive = Annotated[float, Field(gt=0)]
Epsilon = Positive | Literal["none"]
"""ε of a run; "none" for no noise and no guarantee."""


class PilotGrid(TomlTable):
    """What is tried, each with each.

    Attributes:
        init: how A is made; none of these costs ε.
        learning_rate: at scaling 1.
        max_grad_norm: to which a row's gradient is clipped.
        epsilon: of each simulated silo over a whole trial; left out of a private pilot, where silos decide.
    """

    init: tuple[Init, ...] = Field(default=("kaiming",), min_length=1)
    learning_rate: tuple[Positive, ...] = Field(min_length=1)
    max_grad_norm: tuple[Positive, ...] = Field(min_length=1)
    epsilon: tuple[Epsilon, ...] = ()

    @model_validator(mode="after")
    def _sound(self) -> "PilotGrid":
        for name in ("init", "learning_rate", "max_grad_norm", "epsilon"):
            values: tuple[object, ...] = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names a value twice")
        return self


class PilotTrials(TomlTable):
    """How one trial is made.

    Attributes:
        rounds: of a trial.
        delta: of a simulated silo, below 1 / its rows.
        clients: simulated silos, to which the public rows are dealt.
        concentration: of the Dirichlet shares by which answers are dealt unevenly; "iid" for equal shares.
        held_out: public rows that are kept for judging: the first half chooses settings, the second is reported.
        tuning_seed: on which the grid is searched; also of the chosen family.
        seeds: of A, of the dealing, of sampling and noise, of the trials that are reported.
        micro_batch: rows in one forward pass.
        device: "auto", "cpu", "cuda", …
    """

    rounds: int = Field(ge=1)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    clients: int = Field(default=3, ge=1)
    concentration: Positive | Literal["iid"] = "iid"
    held_out: int = Field(default=200, ge=2)
    tuning_seed: int = 0
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=2)
    micro_batch: int = Field(default=8, ge=1)
    device: str = "auto"

    @model_validator(mode="after")
    def _sound(self) -> "PilotTrials":
        if self.tuning_seed in self.seeds:
            raise ValueError("tuning_seed is one of the seeds that are reported")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds names a value twice")
        return self


class Go(TomlTable):
    """What must be reached for "go"; stated before the first trial, and not changed after it.

    Attributes:
        accuracy: in [0, 1]; the lower end of the 95% interval must reach it.
        epsilon: the largest that is acceptable.
        round_bytes: of one client, up and down together, at most.
        step_seconds: of one private step of one client, at most.
        memory_bytes: of the process, at most.
    """

    accuracy: float = Field(ge=0, le=1)
    epsilon: Epsilon
    round_bytes: int | None = Field(default=None, ge=1)
    step_seconds: float | None = Field(default=None, gt=0)
    memory_bytes: int | None = Field(default=None, ge=1)


class FullWork(TomlTable):
    """`LocalWork` of the run that is prepared, but for what the pilot chooses: learning rate and clip."""

    rounds: int
    expected_batch: int
    local_steps: int = 1
    reserve_rounds: int = 0
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    max_length: int = 512

    def with_point(self, learning_rate: float, max_grad_norm: float, *, rounds: int | None = None) -> LocalWork:
        """The work with what the pilot chose, over the run's rounds or so many of a trial.

        Raises:
            ConfigError: a value is out of its range.
        """
        return LocalWork(
            rounds=self.rounds if rounds is None else rounds,
            expected_batch=self.expected_batch,
            learning_rate=learning_rate,
            local_steps=self.local_steps,
            reserve_rounds=self.reserve_rounds if rounds is None else 0,
            max_grad_norm=max_grad_norm,
            optimizer=self.optimizer,
            momentum=self.momentum,
            max_length=self.max_length,
        )


class FullRun(TomlTable):
    """The run that is prepared: the keys of `FederateRun` without its family.

    Attributes:
        name: the adapter's.
        out: the adapter's folder.
        work: of every client; trials have the same, in fewer rounds.
        rules: of the rounds.
        variant: what is trained and how it is joined.
        silos: the silos' TOML files, to run all of them in one process.
        superlink: the server that real silos connect to, in place of `silos`.
        page: an HTML page of the run.
        overwrite: whether a folder at `out` is replaced.
        records: rows of the smallest silo, if that is public: says how much noise the run will have beside the trials.
    """

    name: str
    out: Path
    work: FullWork
    rules: RoundRules
    variant: VariantSettings = VariantSettings()
    silos: tuple[Path, ...] = ()
    superlink: SuperLink | None = None
    page: Path | None = None
    overwrite: bool = False
    records: int | None = Field(default=None, ge=1)

    def with_family(self, family: Path, work: LocalWork) -> FederateRun:
        """The run's whole configuration."""
        return FederateRun(
            family=family,
            name=self.name,
            out=self.out,
            work=work,
            rules=self.rules,
            variant=self.variant,
            silos=self.silos,
            superlink=self.superlink,
            page=self.page,
            overwrite=self.overwrite,
        )


class PilotRun(TomlTable):
    """What a pilot tries.

    Attributes:
        base: catalogue name, folder or hub id of the frozen base; a classifier or a language model.
        plan: a plan.json for it.
        out: folder of trials, page and the run's TOML; a pilot that was cut short goes on there.
        data: public rows in the place of the silos' own.
        grid: what is tried.
        trials: how.
        go: what must be reached.
        run: the run that is prepared.
        text: the public text of init "public-pca".
        private: tries on the silos' own rows instead: every trial is a run of its own, debited to their ledgers, and
            `data` only judges.
    """

    base: str
    plan: Path
    out: Path
    data: RowsData
    grid: PilotGrid
    trials: PilotTrials
    go: Go
    run: FullRun
    text: PublicText | None = None
    private: bool = False

    @model_validator(mode="after")
    def _sound(self) -> "PilotRun":
        work = self.run.work.with_point(self.grid.learning_rate[0], self.grid.max_grad_norm[0])
        try:
            self.run.with_family(self.out, work)
        except ValidationError as error:  # said now, as a run's own, and not after hours of trials
            raise ValueError(f"run: {error.errors(include_url=False)[0]['msg']}") from error
        if self.private and (self.grid.epsilon or not self.run.silos):
            raise ValueError("a private pilot needs run.silos, and no grid.epsilon: every silo's own TOML states it")
        if not self.private and not self.grid.epsilon:
            raise ValueError("grid.epsilon is missing: name what the trials are to spend")
        if not self.private and not any(acceptable(epsilon, self.go) for epsilon in self.grid.epsilon):
            raise ValueError("no grid.epsilon is within go.epsilon, so that nothing could go")
        if self.text is not None and "public-pca" not in self.grid.init:
            raise ValueError("[text] is for init 'public-pca', which grid.init does not name")
        return self


def acceptable(epsilon: Epsilon, go: Go) -> bool:
    """Whether this ε is no larger than what may go."""
    return go.epsilon == "none" or (epsilon != "none" and epsilon <= go.epsilon)
