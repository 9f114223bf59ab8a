"""The TOML of `treadle train`."""

from pathlib import Path
from typing import Annotated

from pydantic import Discriminator, Field, Tag, model_validator

from treadle.configs.toml import RunConfig
from treadle.train.settings import SftSettings


class TaskData(RunConfig):
    """The training split of a task.

    Attributes:
        task: a shipped task's name, or a task file.
        root: the folder that the task's relative data paths start from.
        limit: examples at most, before a token budget cuts them.
    """

    task: str
    root: Path | None = None
    limit: int | None = Field(default=None, ge=1)


class SourceData(RunConfig):
    """Rows of any source with a template.

    Attributes:
        source: a .jsonl or .csv file, or `hf:NAME`; see `read_rows`.
        prompt: template of what stands before the answer, such as "Review: {text} Sentiment:".
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


def kind_of_data(data: object) -> str:
    """The tag of the kind of data that a table describes."""
    task = isinstance(data, TaskData) or (isinstance(data, dict) and "task" in data)
    return "task" if task else "source"


class TrainRun(RunConfig):
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
        device: "auto", "cpu", "cuda", …
        overwrite: whether a folder at `out` is replaced.
    """

    family: Path
    name: str
    out: Path
    data: Annotated[
        Annotated[TaskData, Tag("task")] | Annotated[SourceData, Tag("source")], Discriminator(kind_of_data)
    ]
    base: str | None = None
    bare_share: float = Field(default=0.0, ge=0.0, le=1.0)
    variant_share: float = Field(default=0.0, ge=0.0, le=1.0)
    public: bool = False
    sft: SftSettings = SftSettings()
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
        return self
