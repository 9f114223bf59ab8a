"""A family and some data make one adapter: B is trained, everything else is frozen.

family, base    proved to belong together
examples        rows in a template, a share of them without the instruction
training        `train_sft`, continued from its checkpoint if a run was cut short; or `train_private`, begun anew
adapter         a PEFT folder with its provenance; then the checkpoint goes
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle.configs.train import SourceData, TaskData, TrainRun
from treadle.data.prompts import Example, Template
from treadle.data.sources import read_rows
from treadle.data.tasks import Condition, Task, load_task
from treadle.errors import InputError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.files import checked_name, locked, refuse_existing
from treadle.privacy.plan import DPPlan
from treadle.progress import Progress, silent
from treadle.recipes.bases import loaded_base
from treadle.recipes.payment import payment_of
from treadle.train.checkpoint import discard
from treadle.train.private import PrivateResult, train_private
from treadle.train.rows import data_sha256, mixed
from treadle.train.sft import SftResult, train_sft


@dataclass(frozen=True)
class TrainedAdapter:
    """What a run made.

    Attributes:
        adapter: as saved.
        folder: where.
        result: of plain fine-tuning its losses and counts, which stay with whoever trained it.
    """

    adapter: Adapter
    folder: Path
    result: SftResult | PrivateResult


def train_adapter(config: TrainRun, progress: Progress = silent) -> TrainedAdapter:
    """The configured adapter, also saved in the folder `config.out`.

    A run that was cut short left `.NAME.checkpoint` beside `config.out`; the same run again continues from there. A
    private run leaves nothing and is begun anew: what nobody saw has cost nothing. Its ledger, if it has one, is asked
    before the training and pays after it, before the adapter is written.

    Raises:
        BudgetError: the ledger allows no such run; no adapter is written.
        InputError: `config.out` exists, another process trains it, a file is missing, or the data cannot be used.
        MismatchError: the base is not the family's, or the checkpoint is of another run.
        UnavailableError: the base must be fetched and cannot be, or the disk refuses.
        TreadleError: training failed; see `train_sft` and `train_private`.
    """
    checked_name(config.name, where="key 'name'")
    refuse_existing(config.out, overwrite=config.overwrite)
    family = AdapterFamily.load(config.family)
    examples = _examples(config)
    plan = _plan(config, examples)
    pay = payment_of(config, plan, examples)
    model, tokenizer = loaded_base(family.base, config.base, device=config.device, progress=progress)
    checkpoints = config.out.parent / f".{config.out.name}.checkpoint"
    with alone(config.out):
        if plan is not None:
            result = train_private(model, tokenizer, family, examples, plan, config.dp_sgd, progress=progress)
            pay()
        else:
            result = train_sft(
                model, tokenizer, family, examples, config.sft, checkpoint_folder=checkpoints, progress=progress
            )
        digest = data_sha256(examples) if config.public else None
        adapter = result.adapter(config.name, data=data_name(config.data), data_sha256=digest)
        adapter.save(config.out, overwrite=config.overwrite)
        discard(checkpoints)
    return TrainedAdapter(adapter, config.out, result)


def _plan(config: TrainRun, examples: Sequence[Example]) -> DPPlan | None:
    """The plan of a private run. Whether there are as many rows as stated is for the eyes of who runs it."""
    if config.privacy is None:
        return None
    if len(examples) < config.privacy.records:
        raise InputError(
            f"the data hold fewer rows than privacy.records = {config.privacy.records}",
            remedy="state a lower bound that is public, or complete the data",
        )
    return config.privacy.settings().plan()


def _examples(config: TrainRun) -> list[Example]:
    shares: dict[Condition, float] = {"bare": config.bare_share, "variant": config.variant_share}
    return examples_of(config.data, shares=shares, seed=config.sft.seed)


def examples_of(data: TaskData | SourceData, *, shares: Mapping[Condition, float], seed: int) -> list[Example]:
    """The examples of a task or a source, the shares of them in other conditions than trained.

    Raises:
        InputError: the data cannot be read, or lack a field or a variant.
        UnavailableError: what draws them is not installed.
    """
    if isinstance(data, TaskData):
        return task_examples(load_task(data.task), root=data.root, limit=data.limit, shares=shares, seed=seed)
    return _of_source(data, shares, seed=seed)


def task_examples(
    task: Task, *, root: Path | None, limit: int | None, shares: Mapping[Condition, float], seed: int
) -> list[Example]:
    """The task's training split, at most `limit` examples of it, the shares of them in other conditions than trained.

    Raises:
        InputError: the task's data cannot be used, or it has no variants and some are asked for.
        UnavailableError: what draws them is not installed.
    """

    def form(condition: Condition) -> list[Example]:
        return task.examples("train", data_root=root, condition=condition, limit=limit, seed=seed)

    return mixed(form("trained"), *[(form(other), share) for other, share in shares.items() if share > 0], seed=seed)


def _of_source(data: SourceData, shares: Mapping[Condition, float], *, seed: int) -> list[Example]:
    """The rows in their template, the shares of them in another; variants take turns."""
    rows = read_rows(data.source, split=data.split, limit=data.limit)

    def form(prompts: Sequence[str]) -> list[Example]:
        templates = [Template(prompt, data.completion) for prompt in prompts]
        return [
            Example(*templates[i % len(templates)].render(row, where=f"{data.source}, row {i + 1}"))
            for i, row in enumerate(rows)
        ]

    others = {"bare": (data.bare or data.prompt,), "variant": data.variants}
    return mixed(
        form((data.prompt,)), *[(form(others[name]), share) for name, share in shares.items() if share > 0], seed=seed
    )


def data_name(data: TaskData | SourceData) -> str:
    """What the data are called: never a path."""
    if isinstance(data, TaskData):
        return load_task(data.task).name
    if data.name is not None:
        return data.name
    stored = Path(data.source.removeprefix("hf:"))
    return stored.name if stored.exists() else data.source


@contextlib.contextmanager
def alone(folder: Path, told: str = "another process trains this adapter") -> Iterator[None]:
    """A block in which no other process makes the adapter in `folder`.

    Raises:
        InputError: one does.
    """

    def refuse() -> None:
        raise InputError(told, where=folder, remedy="wait for it")

    with locked(folder.parent / f".{folder.name}.lock", refuse):
        yield
