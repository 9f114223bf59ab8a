"""The TOML of an audit of privacy: what is trained, with how many canaries, and how they are guessed about."""

from typing import Literal

from pydantic import Field, model_validator

from treadle.configs.toml import RunConfig
from treadle.train.settings import PrivateSettings


class AuditedTraining(RunConfig):
    """A private run with canaries.

    Attributes:
        rows: that are always in.
        canaries: each in by a fair coin.
        expected_batch: of rows and canaries together.
        steps: of training.
        max_grad_norm: C.
        guesses: how many of the canaries are guessed to be in and to be out; every pair is tried, at its share of the
            permitted failures.
        training: the rest.
    """

    rows: int = Field(ge=1)
    canaries: int = Field(ge=2)
    expected_batch: int = Field(ge=1)
    steps: int = Field(ge=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    guesses: tuple[tuple[int, int], ...] = Field(min_length=1)
    training: PrivateSettings

    @model_validator(mode="after")
    def _sound(self) -> "AuditedTraining":
        for included, excluded in self.guesses:
            if min(included, excluded) < 0 or not 1 <= included + excluded <= self.canaries:
                raise ValueError(f"guesses {[included, excluded]} about {self.canaries} canaries")
        return self

    @property
    def records(self) -> int:
        """The number of rows that is expected, and public."""
        return self.rows + self.canaries // 2


class PrivacyAuditRun(RunConfig):
    """`privacy-audit`.

    Attributes:
        seeds: one run each of every arm; they draw the coins, never the noise.
        base: an encoder.
        task: a shipped task of two classes whose data are files.
        rank: of every adapted layer.
        head_rows: of the task's validation split, taken for public: the base's head is fitted to them.
        epsilons: what is claimed.
        delta: likewise.
        failure: one minus the confidence of each bound.
        left_noise: what share of its noise the planted bug leaves.
        gradients: the run whose canaries are gradients of lora_B with one entry.
        rows: the run whose canaries are rows with the wrong label.
    """

    seeds: tuple[int, ...] = Field(min_length=1)
    base: str = "minilm-l6"
    task: str
    rank: int = Field(ge=1)
    head_rows: int = Field(ge=2)
    epsilons: tuple[float | Literal["inf"], ...] = Field(min_length=1)
    delta: float = Field(gt=0, lt=1)
    failure: float = Field(default=0.05, gt=0, lt=1)
    left_noise: float = Field(default=0.1, gt=0, lt=1)
    gradients: AuditedTraining
    rows: AuditedTraining
