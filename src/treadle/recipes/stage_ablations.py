"""What the parts of a run in stages are worth: the same examples, steps and rates again, with one thing taken away.

shuffled     regions of the same sizes, dealt out by chance: does importance tell anything?
all          every parameter in every stage: what do regions cost?
lower-rank   a plain LoRA of as many parameters as a stage moves, all of them in every stage: the baseline to beat
reversed     the stages in reverse order
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from treadle.configs.stages import Ablation
from treadle.evaluation.intervals import Interval, wilson_interval
from treadle.family.family import AdapterFamily
from treadle.family.plan import RankPlan
from treadle.family.resize import resized_family
from treadle.partition.regions import shuffled
from treadle.progress import part
from treadle.ranks.allocation import AllocationSettings, Budget, allocate
from treadle.train.stages.run import Run
from treadle.train.stages.training import WARM_UP, Staged, train_in_stages


@dataclass(frozen=True)
class Ablated:
    """One run of an ablation.

    Attributes:
        name: what was done.
        parameters: of every stage.
        accuracy: system → share of held-out examples answered rightly at the end, with Wilson's 95% interval.
    """

    name: str
    parameters: tuple[int, ...]
    accuracy: Mapping[str, Interval]

    @staticmethod
    def of(name: str, run: Run, made: Staged) -> "Ablated":
        """The figures of a run that is over."""
        counts = {system: len(data.held_out) for system, data in run.systems.items()}
        last = list(made.accuracy.values())[-1]
        accuracy = {
            system: wilson_interval(round(share * counts[system]), counts[system]) for system, share in last.items()
        }
        return Ablated(name, _parameters(made), accuracy)


def ablated(name: Ablation, run: Run, made: Staged) -> Ablated:
    """The run once more, changed as `name` says; its state, in a folder within the run's, continues as a run's does.

    Args:
        name: what is taken away.
        run: the run itself, with held-out examples.
        made: what it made, which says how many parameters a stage moved.

    Raises:
        TreadleError: see `train_in_stages`.
    """
    plan, partition, family = run.plan, run.plan.partition, run.family
    match name:
        case "shuffled":
            partition = replace(partition, control=partial(shuffled, seed=partition.seed))
        case "all":
            partition = replace(partition, granularity="none")
        case "lower-rank":
            partition = replace(partition, granularity="none")
            family = _of_lower_rank(family, fmean(_parameters(made)) / made.factors.trainable)
        case "reversed":
            plan = replace(plan, stages=plan.stages[::-1])

    told = part(run.progress, name)
    again = replace(
        run,
        family=family,
        plan=replace(plan, partition=partition),
        folder=run.folder / "ablations" / name,
        progress=told,
    )
    return Ablated.of(name, again, train_in_stages(again))


def _parameters(made: Staged) -> tuple[int, ...]:
    """That every stage trained."""
    return tuple(part.parameters for part in made.passed if part.name != WARM_UP)


def _of_lower_rank(family: AdapterFamily, share: float) -> AdapterFamily:
    """The family with that share of its numbers in B, in proportion to its ranks, at the same α/r."""
    modules = family.plan.modules
    plan = allocate(
        {name: float(module.rank) for name, module in modules.items()},
        {name: module.shape for name, module in modules.items()},
        budget=Budget("trainable", max(1, round(share * family.plan.count().lora_B))),
        settings=AllocationSettings(minimum=0),
    )
    ranks = {name: module.rank for name, module in plan.modules.items()}
    return resized_family(
        family,
        RankPlan(
            {n: replace(modules[n], rank=rank, lora_alpha=modules[n].scaling * rank) for n, rank in ranks.items()}
        ),
    )
