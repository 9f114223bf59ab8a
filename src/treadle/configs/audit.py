"""The TOML of an audit of privacy: what is trained, with how many canaries, and how they are guessed about."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from treadle.configs.train import PrivacyPromise, RowsData
from treadle.toml import TomlTable
from treadle.train.settings import PrivateSettings


class AuditedTraining(TomlTable):
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


class PrivacyAuditRun(TomlTable):
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


class AuditRun(TomlTable):
    """`treadle audit`: private training as `treadle train` would do it, with canaries whose gradients are made up.

    Attributes:
        family: the family's folder.
        data: public rows in the place of the private ones; what is found is printed, and no ledger knows of it.
        privacy: the promise that is audited. Its noise, rate and steps are those of the real run.
        dp_sgd: that trainer's settings.
        base: where the family's base model is, if its own label does not say.
        canaries: at most as many as lora_B has entries; each in by a fair coin.
        guesses: as `AuditedTraining`; none for a hundredth and three eighths of the canaries, all guessed to be in.
        failure: one minus the confidence of each bound.
        planted: also audit the same training with this share of its noise, a bug that the audit should catch.
        seed: of the coins, never of noise.
        device: "auto", "cpu", "cuda", …
    """

    family: Path
    data: RowsData
    privacy: PrivacyPromise
    dp_sgd: PrivateSettings = PrivateSettings()
    base: str | None = None
    canaries: int = Field(default=4096, ge=2)
    guesses: tuple[tuple[int, int], ...] = ()
    failure: float = Field(default=0.05, gt=0, lt=1)
    planted: float | None = Field(default=None, gt=0, lt=1)
    seed: int = 0
    device: str = "auto"

    def training(self, rows: int) -> AuditedTraining:
        """The audited run over so many rows: as many more canaries as are expected, sampled at the promise's rate.

        Raises:
            ConfigError: the promise contradicts itself.
        """
        rate = self.privacy.settings().sample_rate
        few, many = max(1, self.canaries // 100), max(1, 3 * self.canaries // 8)
        return AuditedTraining(
            rows=rows,
            canaries=self.canaries,
            expected_batch=max(1, round(rate * (rows + self.canaries // 2))),
            steps=self.privacy.steps,
            max_grad_norm=self.privacy.max_grad_norm,
            guesses=self.guesses or ((few, 0), (many, 0)),
            training=self.dp_sgd,
        )
