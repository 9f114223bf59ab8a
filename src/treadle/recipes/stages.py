"""A family and the data of two systems make one adapter in stages (LoRA-PAR).

family, base    proved to belong together
systems         examples of each, by label; the last of them held out for accuracy
training        `train_in_stages`: warm-up, importance, regions, stages; continued where a run was cut short
ablations       if asked for, the same with one thing taken away
adapter         a PEFT folder with its provenance; minds and regions beside it, before it; then the state goes
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from treadle.configs.stages import RegionRun, StageRun, StagesRun, SystemSource, SystemTask
from treadle.data.examples import example_of
from treadle.data.metrics import Code, ExactMatch
from treadle.data.prompts import Example, Template, fill
from treadle.data.sources import read_rows
from treadle.data.tasks import load_task
from treadle.errors import InputError
from treadle.evaluation.answers import generated
from treadle.family.adapter import Adapter, Provenance, package_versions
from treadle.family.family import AdapterFamily
from treadle.files import checked_name, refuse_existing, write_bytes
from treadle.partition.region_files import save_regions
from treadle.partition.regions import Regions
from treadle.progress import Progress, silent
from treadle.recipes.bases import loaded_base
from treadle.recipes.stage_ablations import Ablated, ablated
from treadle.recipes.train import alone, data_name
from treadle.train.rows import data_sha256
from treadle.train.stages.acting import acting, all_ranks
from treadle.train.stages.factors import Factors
from treadle.train.stages.run import Assigned, Partition, Plan, Run, System
from treadle.train.stages.training import Staged, train_in_stages

METHOD = "lora-par"
_SHOWN = 3


@dataclass(frozen=True)
class Answer:
    """How one held-out prompt is answered, before and after the run."""

    system: str
    prompt: str
    wanted: str
    before: str
    after: str


@dataclass(frozen=True)
class StagedAdapter:
    """What a run made.

    Attributes:
        adapter: as saved.
        folder: where.
        minds: system → folder of the adapter that its own and shared ranks make.
        regions: the file of the regions, if there are any. It lies beside the folder, not in it, since what matters to
            which rows is a fact about the data, and adapters are handed on.
        result: of the training.
        answers: a few held-out prompts.
        ablations: the run itself and, after it, what was asked for; empty where nothing was.
    """

    adapter: Adapter
    folder: Path
    minds: Mapping[str, Path]
    regions: Path | None
    result: Staged
    answers: Sequence[Answer]
    ablations: Sequence[Ablated] = ()


def train_adapter_in_stages(
    config: StagesRun, *, allow_code_execution: bool = False, progress: Progress = silent
) -> StagedAdapter:
    """The configured adapter, also saved in the folder `config.out`; the same run again continues a killed one.

    Args:
        config: the run's.
        allow_code_execution: whether rewards and accuracy may run generated code, in a restricted subprocess.
        progress: told of every step.

    Raises:
        InputError: `config.out`, a mind or the file of regions exists, another process trains it, or the data cannot
            be used.
        MismatchError: the base is not the family's, or the state is of another run.
        UnavailableError: the base must be fetched and cannot be, TRL is not installed, or the disk refuses.
        TreadleError: training failed; see `train_in_stages`.
    """
    names = {system: f"{config.name}-{system}" for system in config.systems} if config.minds else {}
    for name in (config.name, *names.values()):
        checked_name(name, where="key 'name'")
    minds = {system: config.out.parent / f"{config.out.name}-{system}" for system in names}
    state = config.out.parent / f".{config.out.name}.stages"
    regions = config.out.parent / f"{config.out.name}.regions.safetensors"
    begun = state / "results"
    mine = config.overwrite or begun.exists()  # beside `out`, which is written last and ends the run
    refuse_existing(config.out, overwrite=config.overwrite)
    for folder in minds.values():
        refuse_existing(folder, overwrite=mine)
    if config.regions.granularity != "none":
        refuse_existing(regions, overwrite=mine, kind="file")
    family = AdapterFamily.load(config.family)
    systems = {name: _system(name, data, seed=config.regions.seed) for name, data in config.systems.items()}
    model, tokenizer = loaded_base(family.base, config.base, device=config.device, progress=progress)
    plan = Plan(_partition(config.regions), _assigned(config.stages), config.look_steps, allow_code_execution)
    with alone(config.out):
        run = Run(model, tokenizer, family, systems, plan, state, progress)
        result = train_in_stages(run)
        # Before the adapter is written: with it the run is over, and one that was cut short must find all that it made.
        others = [ablated(name, run, result) for name in config.ablations]
        answers = _answers(model, tokenizer, systems, result.factors)
        provenance = _provenance(config, family, systems, result)
        transposed = isinstance(model.get_submodule(next(iter(family.plan.modules))), Conv1D)
        write_bytes(begun, b"")
        if result.regions is not None:
            save_regions(result.regions, regions)
            for system, folder in minds.items():
                mind = mind_of(result.factors, result.regions, system)
                made = mind.adapter(family, names[system], provenance=provenance, transposed=transposed)
                made.save(folder, overwrite=mine)
        adapter = result.factors.adapter(family, config.name, provenance=provenance, transposed=transposed)
        adapter.save(config.out, overwrite=config.overwrite)
        shutil.rmtree(state, ignore_errors=True)
    compared = [Ablated.of("this run", run, result), *others] if others else []
    return StagedAdapter(adapter, config.out, minds, regions if result.regions else None, result, answers, compared)


def _partition(regions: RegionRun) -> Partition:
    return Partition(
        start=regions.start,
        moves_A=regions.moves_A,
        warm_up=regions.warm_up,
        granularity=regions.granularity,
        score=regions.score,
        theta=regions.theta,
        samples=regions.samples,
        batch_size=regions.batch_size,
        seed=regions.seed,
    )


def _assigned(stages: Sequence[StageRun]) -> list[Assigned]:
    return [Assigned(run.system, settings, run.share) for run in stages if (settings := run.sft or run.grpo)]


def _system(name: str, data: SystemTask | SystemSource, *, seed: int) -> System:
    if isinstance(data, SystemTask):
        task = load_task(data.task)
        held_out: list[Example] = []
        if data.held_out:
            held_out = task.examples("validation", data_root=data.root, limit=data.held_out, seed=seed)
        examples = task.examples("train", data_root=data.root, limit=data.limit, seed=seed)
        return System(examples, held_out, task.metric)
    examples = _of_source(name, data)
    if data.held_out >= len(examples):
        raise InputError(f"its {len(examples)} rows are all held out", where=f"system {name}", remedy="lower held_out")
    cut = len(examples) - data.held_out
    return System(examples[:cut], examples[cut:], data.metric)


def _of_source(name: str, data: SystemSource) -> list[Example]:
    """The rows that belong to the system, with their label where a metric judges answers."""
    rows = read_rows(data.source, split=data.split, limit=data.limit)
    template, found = Template(data.prompt, data.completion), list[Example]()
    for number, row in enumerate(rows, 1):
        where = f"{data.source}, row {number}"
        for field in data.where:
            if field not in row:
                raise InputError(f"no field {field!r}", where=where, remedy="label the rows with treadle classify")
        if all(row[field] == value for field, value in data.where.items()):
            prompt = fill(template.prompt, row, where=where)
            found.append(example_of(prompt, template.completion, data.metric, row, where=where))
    if not found:
        wanted = ", ".join(f"{field} = {value!r}" for field, value in data.where.items())
        raise InputError(f"no row has {wanted}", where=f"system {name}", remedy="check the labels of the data")
    return found


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    systems: Mapping[str, System],
    factors: Factors,
) -> list[Answer]:
    """A few held-out prompts of every system whose answers are generated, with and without the adapter."""
    found: list[Answer] = []
    for name, system in systems.items():
        metric, shown = system.metric, list(system.held_out[:_SHOWN])
        if not shown or not isinstance(metric, ExactMatch | Code):
            continue
        before = generated(model, tokenizer, shown, metric.max_new_tokens)
        with acting(model, factors, all_ranks(factors)):
            model.eval()
            after = generated(model, tokenizer, shown, metric.max_new_tokens)
        found += [
            Answer(name, example.prompt, example.completion, first, last)
            for example, first, last in zip(shown, before, after, strict=True)
        ]
    return found


def _provenance(config: StagesRun, family: AdapterFamily, systems: Mapping[str, System], result: Staged) -> Provenance:
    """Settings of regions and stages, and which data; no loss, reward or count, which are facts about the data."""
    settings: dict[str, str | int | float | bool | None] = dict(_partition(config.regions).decisive())
    for number, assigned in enumerate(_assigned(config.stages), 1):
        settings |= assigned.decisive(number)
    if result.factors.moves_A:
        settings["left_family"] = family.fingerprint
    examples = [example for system in systems.values() for example in system.examples]
    return Provenance(
        method=METHOD,
        data=", ".join(dict.fromkeys(data_name(data) for data in config.systems.values())),
        data_sha256=data_sha256(examples) if config.public else None,
        seeds={"family": family.seed, "regions": config.regions.seed},
        settings=settings,
        versions=package_versions(),
    )


def mind_of(factors: Factors, regions: Regions, system: str) -> Factors:
    """The factors with only the ranks that the system selected: its own and those it shares; A must be frozen."""
    chosen = regions.selected[system].ranks
    learnt = {name: B * chosen[name] for name, B in factors.learnt().items()}
    return replace(factors, lora_B=learnt, start_A={}, start_B={})
