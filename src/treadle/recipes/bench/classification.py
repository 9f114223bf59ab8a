"""A task of classification as studies train it: the base with what it needs, and the rows of every split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.data.metrics import LabelLikelihood
from treadle.data.prompts import Example
from treadle.data.tasks import Condition, Split, Task
from treadle.errors import InputError
from treadle.models.heads import with_head
from treadle.models.loading import is_causal, load_model, load_tokenizer, model_folder
from treadle.train.rows import Row, encoded
from treadle.train.settings import PrivateSettings


@dataclass(frozen=True)
class Classification:
    """A task's examples and rows by split, and the base model that they are for."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: Path
    examples: Mapping[Split, Sequence[Example]]
    rows: Mapping[Split, Sequence[Row]]


def classification(
    task: Task,
    base: Path,
    *,
    root: Path,
    limits: Mapping[Split, int | None],
    condition: Condition = "bare",
    dtype: str = "float32",
    max_length: int = 64,
) -> Classification:
    """The task on this base, as many examples of each split as `limits` says.

    Args:
        task: with fixed labels.
        base: of `classifying_base`.
        root: the folder of the data sets.
        limits: split → examples at most; None for all.
        condition: the form of the prompts.
        dtype: of the base.
        max_length: tokens of a row.
    """
    model, tokenizer = load_model(str(base), device="cpu", dtype=dtype), load_tokenizer(str(base))
    examples: dict[Split, Sequence[Example]] = {
        split: task.examples(split, data_root=root, condition=condition, limit=limit) for split, limit in limits.items()
    }
    settings = PrivateSettings(max_length=max_length)
    rows: dict[Split, Sequence[Row]] = {
        split: encoded(model, tokenizer, found, settings) for split, found in examples.items()
    }
    return Classification(model, tokenizer, base, examples, rows)


def classifying_base(base: str, task: Task, *, work: Path, head_seed: int) -> Path:
    """The folder of the base; an encoder gets a classifier's head, drawn from a seed, once, in the folder `work`.

    Raises:
        InputError: the task has no fixed labels.
    """
    return trained_base(base, work, name=task.name, labels=labels_of(task), seed=head_seed)


def labels_of(task: Task) -> list[str]:
    """The task's labels.

    Raises:
        InputError: it has no fixed ones.
    """
    if not isinstance(task.metric, LabelLikelihood):
        raise InputError("has no fixed labels", where=f"task {task.name}", remedy="choose a task of classification")
    return list(task.metric.labels.values())


def trained_base(base: str, work: Path, *, name: str, labels: Sequence[str], seed: int) -> Path:
    """A folder of the base that has something to minimise: an encoder gets a drawn head, in `work`, as BASE-`name`."""
    folder = model_folder(base)
    if is_causal(folder):
        return folder
    out = work / f"{folder.name}-{name}"
    return out if out.exists() else with_head(base, out, labels=labels, seed=seed)
