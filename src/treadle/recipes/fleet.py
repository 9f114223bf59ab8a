"""Growing a fleet, stage by stage, each stage's result a file or folder that a second run finds and keeps.

scores, plan   disagreement of each layer under noise      → scores.json, plan.json
family         one frozen A a layer                        → family/
adapters       B-only training, one task after another     → adapters/TASK/
bank           factors, calibration on public text         → bank/
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle import files
from treadle.configs.fleet import FleetRun
from treadle.configs.plan import PlanRun
from treadle.data.prompts import Example
from treadle.data.public_text import public_texts
from treadle.data.tasks import Condition, Task, load_task
from treadle.errors import MismatchError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import identity_of, load_model, load_tokenizer
from treadle.progress import Progress, part, silent
from treadle.ranks.allocation import plan_of_scores
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.probes import probe_scores
from treadle.recipes.bank import store_bank
from treadle.recipes.calibration import PublicSource, calibration_of
from treadle.recipes.family import store_family
from treadle.recipes.plan import PLAN, SCORES, stated
from treadle.recipes.train import task_examples
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import METADATA, load_bank
from treadle.train.rows import data_sha256
from treadle.train.sft import train_sft

CURVES = "losses.json"


@dataclass(frozen=True)
class Fleet:
    """What grew.

    Attributes:
        plan: ranks a layer.
        family: what the adapters share.
        bank: the adapters, calibrated.
        tasks: one an adapter, of the same name.
        losses: adapter → training loss of each step, nats a target token.
        model: the base, loaded.
        tokenizer: the base's.
    """

    plan: RankPlan
    family: AdapterFamily
    bank: AdapterBank
    tasks: tuple[Task, ...]
    losses: Mapping[str, tuple[float, ...]]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def grow_fleet(config: FleetRun, progress: Progress = silent) -> Fleet:
    """The fleet in `config.out`: what is missing is made, what is there is kept.

    Raises:
        MismatchError: the folder holds a fleet of other settings.
        InputError: a task or its data cannot be used.
        UnavailableError: what draws a task's data is not installed, or the base must be fetched and cannot be.
    """
    tasks = tuple(load_task(name) for name in config.tasks)
    _claim(config)
    for task in tasks:  # what is missing is said before minutes of work, not after
        if not (config.out / "adapters" / task.name).exists():
            task.examples("train", data_root=config.data, limit=1, seed=config.seed)
    progress("loading the base model", 0, 0)
    model, tokenizer = load_model(config.base, device=config.device, dtype=config.dtype), load_tokenizer(config.base)
    plan = _plan(config, model, tokenizer, progress)
    family = _family(config, model, plan)
    losses = {task.name: _adapter(config, task, family, model, tokenizer, progress) for task in tasks}
    bank = _bank(config, family, tasks, model, tokenizer, progress)
    return Fleet(plan, family, bank, tasks, losses, model, tokenizer)


def _claim(config: FleetRun) -> None:
    """Write down whose folder this is, or find that it is ours."""
    settings = config.model_dump(mode="json", exclude={"out", "data", "device"})
    path = config.out / "fleet.json"
    if not path.exists():
        files.write_json(path, settings)
        return
    stored = files.read_json(path)
    for key, value in settings.items():
        if stored.get(key) != value:
            raise MismatchError(
                f"the folder's fleet has {key} = {stored.get(key)!r}, this run {value!r}",
                where=config.out,
                remedy="choose another out folder, or delete this one",
            )


def _plan(config: FleetRun, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> RankPlan:
    path = config.out / PLAN
    if path.exists():
        return RankPlan.load(path)
    if config.uniform:
        plan = RankPlan.uniform(linear_shapes(model), rank=config.mean_rank)
        plan.save(path)
        return plan
    asked = PlanRun(
        base=config.base,
        out=config.out,
        mean_rank=config.mean_rank,
        maximum=config.max_rank,
        seed=config.seed,
        probe=config.probe,
    )
    text = public_texts("pydoc", limit=config.probe_texts, words=config.probe_words, seed=config.seed)
    inputs, shapes = ProbeInputs.of_texts(tokenizer, text.passages, tokens=asked.text.tokens), linear_shapes(model)
    found = probe_scores(model, inputs, shapes, settings=config.probe, seed=config.seed, progress=progress)
    scores = stated(found, asked, identity_of(config.base))
    plan = plan_of_scores(scores, budget=asked.budget_for(shapes), settings=asked.allocation)
    scores.save(config.out / SCORES)
    plan.save(path)
    return plan


def _family(config: FleetRun, model: PreTrainedModel, plan: RankPlan) -> AdapterFamily:
    folder = config.out / "family"
    if folder.exists():
        return AdapterFamily.load(folder)
    return store_family(folder, model, plan, base=identity_of(config.base), seed=config.seed)


def training_examples(config: FleetRun, task: Task) -> list[Example]:
    """The task's training examples, shares of them without the instruction and with another one."""
    shares: dict[Condition, float] = {"bare": config.bare_share, "variant": config.variant_share}
    return task_examples(task, root=config.data, limit=config.examples, shares=shares, seed=config.seed)


def _adapter(
    config: FleetRun,
    task: Task,
    family: AdapterFamily,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> tuple[float, ...]:
    """Train the task's adapter unless it is there; return its losses."""
    folder, curve = config.out / "adapters" / task.name, config.out / "adapters" / f"{task.name}-{CURVES}"
    if not folder.exists():
        examples = training_examples(config, task)

        told = part(progress, f"training {task.name}")
        result = train_sft(
            model,
            tokenizer,
            family,
            examples,
            replace(config.sft, seed=config.seed),
            checkpoint_folder=config.out / "checkpoints" / task.name,
            progress=told,
        )
        files.write_json(curve, {"losses": list(result.losses), "tokens": result.tokens, "examples": result.examples})
        digest = data_sha256(examples) if config.public else None
        result.adapter(task.name, data=task.name, data_sha256=digest).save(folder)
    stored = files.read_json(curve)["losses"]
    assert isinstance(stored, list)
    return tuple(float(loss) for loss in stored)


def _bank(
    config: FleetRun,
    family: AdapterFamily,
    tasks: tuple[Task, ...],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> AdapterBank:
    folder = config.out / "bank"
    if (folder / METADATA).exists():
        return load_bank(folder)
    adapters = [Adapter.load(config.out / "adapters" / task.name, family=family) for task in tasks]
    text = PublicSource(limit=config.calibration_texts, words=config.calibration_words, seed=config.seed + 1)
    calibration = calibration_of(text, [task.name for task in tasks])
    bank = AdapterBank.build(
        family, adapters, calibration=calibration, model=model, tokenizer=tokenizer, progress=progress
    )
    store_bank(bank, folder, calibration)
    return bank
