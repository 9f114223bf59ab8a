"""The TOML of `treadle train`."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from treadle.privacy.accounting import Accountant
from treadle.privacy.plan import PrivacySettings
from treadle.toml import TomlTable
from treadle.train.settings import PrivateSettings, SftSettings


class TaskData(TomlTable):
    """The training split of a task.

    Attributes:
        task: a shipped task's name, or a task file.
        root: the folder that the task's relative data paths start from.
        limit: examples at most, before a token budget cuts them.
    """

    task: str
    root: Path | None = None
    limit: int | None = Field(default=None, ge=1)


class SourceData(TomlTable):
    """Rows of any source with a template.

    Attributes:
        source: a .jsonl or .csv file, or `hf:NAME`; see `read_rows`.
        prompt: template of what stands before the answer, such as "Review: {text} Sentiment:"; `{choices[0]}` is the
            first of the list that a field holds.
        completion: template of the answer, with the white space that joins it, such as " {label}".
        bare: the prompt without its instruction; needed where `bare_share` is above 0.
        variants: the prompt with other instructions; needed where `variant_share` is above 0.
        split: of a `datasets` source.
        limit: rows at most, the first ones.
        name: what the data are called in the adapter's provenance; without it the file's or data set's own name.
    """

    source: str
    prompt: str
    completion: str
    bare: str | None = None
    variants: tuple[str, ...] = ()
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)
    name: str | None = None


class PrivacyPromise(TomlTable):
    """What a private run promises; see `PrivacySettings`.

    Attributes:
        epsilon: of the whole run; "none" for clipping without noise and without a promise.
        delta: below 1/records.
        records: the number of rows if it is public, else a public lower bound of it.
        expected_batch: rows that a step is expected to sample.
        steps: of the whole run.
        max_grad_norm: to which a row's gradient is clipped.
        accountant: "pld", or "rdp" to compare with articles.
    """

    epsilon: float | Literal["none"]
    delta: float
    records: int
    expected_batch: int
    steps: int
    max_grad_norm: float = 1.0
    accountant: Accountant = "pld"

    def settings(self) -> PrivacySettings:
        """The same as one round of so many local steps.

        Raises:
            ConfigError: a value is out of its range.
        """
        return PrivacySettings(
            epsilon=math.inf if self.epsilon == "none" else self.epsilon,
            delta=self.delta,
            records=self.records,
            expected_batch=self.expected_batch,
            rounds=1,
            local_steps=self.steps,
            max_grad_norm=self.max_grad_norm,
            accountant=self.accountant,
        )


class SiloLedger(TomlTable):
    """Where a silo keeps account, and what it allows in all.

    Attributes:
        path: the ledger's file, made by `treadle ledger new`.
        data: the data set's name in it: all spending on these rows stands under it, whatever the run.
        epsilon: budget over all runs ever, at the δ of `privacy`; that of one run if None, "none" for no limit.
    """

    path: Path
    data: str
    epsilon: Annotated[float, Field(gt=0)] | Literal["none"] | None = None


def refuse_limit(data: TaskData | SourceData) -> None:
    """Return if every row is in whatever the others are, as every accountant of rows supposes.

    Raises:
        ValueError: a limit lets one row push out another.
    """
    if data.limit is not None:
        raise ValueError("data.limit lets one row push out another: cut the data beforehand, or promise no ε")


def kind_of_data(data: object) -> str:
    """The tag of the kind of data that a table describes."""
    task = isinstance(data, TaskData) or (isinstance(data, dict) and "task" in data)
    return "task" if task else "source"


RowsData = Annotated[
    Annotated[TaskData, Tag("task")] | Annotated[SourceData, Tag("source")], Discriminator(kind_of_data)
]
"""A table of a task or of a source, told apart by its keys."""


class TrainRun(TomlTable):
    """Which adapter is trained, in which family, on what.

    Attributes:
        family: the family's folder.
        name: the adapter's.
        out: the adapter's folder.
        data: what it learns.
        base: where the family's base model is, if its own label does not say: catalogue name, folder or hub id.
        bare_share: share of the examples shown without their instruction, in [0, 1].
        variant_share: share of the examples shown with another instruction, which take turns; likewise.
        public: whether the data may be known; only then their digest is recorded in the adapter.
        sft: the trainer's settings.
        privacy: makes it DP-SGD with this promise, instead of plain fine-tuning.
        dp_sgd: that trainer's settings.
        ledger: pays for a private run before its adapter is written; None where nobody keeps account of these rows.
        device: "auto", "cpu", "cuda", …
        overwrite: whether a folder at `out` is replaced.
    """

    family: Path
    name: str
    out: Path
    data: RowsData
    base: str | None = None
    bare_share: float = Field(default=0.0, ge=0.0, le=1.0)
    variant_share: float = Field(default=0.0, ge=0.0, le=1.0)
    public: bool = False
    sft: SftSettings = SftSettings()
    privacy: PrivacyPromise | None = None
    dp_sgd: PrivateSettings = PrivateSettings()
    ledger: SiloLedger | None = None
    device: str = "auto"
    overwrite: bool = False

    @model_validator(mode="after")
    def _sound(self) -> "TrainRun":
        if self.bare_share > 0 and isinstance(self.data, SourceData) and self.data.bare is None:
            raise ValueError("bare_share above 0 needs data.bare, the template without the instruction")
        if self.variant_share > 0 and isinstance(self.data, SourceData) and not self.data.variants:
            raise ValueError("variant_share above 0 needs data.variants, templates with other instructions")
        if self.bare_share + self.variant_share > 1:
            raise ValueError("bare_share and variant_share add up to more than 1")
        if self.privacy is None and "dp_sgd" in self.model_fields_set:
            raise ValueError("[dp_sgd] needs [privacy]; plain fine-tuning is configured by [sft]")
        if self.privacy is None and self.ledger is not None:
            raise ValueError("[ledger] needs [privacy]: it accounts for noise")
        if self.privacy is not None:
            self._private(self.privacy)
        return self

    def _private(self, promise: PrivacyPromise) -> None:
        """Refuse what would let one row decide about another, which no accountant knows of."""
        promise.settings()
        if "sft" in self.model_fields_set:
            raise ValueError("[sft] and [privacy] are two trainers; private steps are configured by [dp_sgd]")
        if promise.epsilon == "none":
            return
        if self.bare_share > 0 or self.variant_share > 0:
            raise ValueError(
                "bare_share and variant_share deal forms out among all rows: leave them out with [privacy]"
            )
        refuse_limit(self.data)
