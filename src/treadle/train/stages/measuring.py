"""What each system selects: the importance of every rank or element to its own samples, and the regions these make."""

from dataclasses import replace

from treadle.family.injection import trainable_factors
from treadle.partition.importance import Measured, measure
from treadle.partition.region_files import load_regions, save_regions
from treadle.partition.regions import Regions
from treadle.progress import part
from treadle.train.checkpoint import check_facts
from treadle.train.objectives import mean_losses
from treadle.train.rows import shuffled
from treadle.train.stages.acting import all_ranks, others_acting
from treadle.train.stages.factors import Factors
from treadle.train.stages.run import Run
from treadle.train.stages.settings import SftStage
from treadle.train.stages.state import Facts

_ALL = 1 << 30
_BLOCKS = 8  # of a system's samples: four rows of growing draws


def selected(run: Run, factors: Factors, facts: Facts) -> Regions:
    """What every system selects, from its own samples; from disk if they were measured before.

    Args:
        run: whose partition says how, and whose folder keeps them.
        factors: at which importance is measured.
        facts: what has made those factors.

    Raises:
        MismatchError: the regions in the folder are of another run.
        TreadleError: every importance is 0.
    """
    partition, path = run.plan.partition, run.folder / "regions.safetensors"
    if path.exists():
        regions = load_regions(path)
        check_facts(path, regions.facts, facts)
    else:
        found = {name: sums(run, factors, name) for name in run.systems}
        regions = Regions.measured(found, theta=partition.theta, score=partition.score, facts=facts)
        save_regions(regions, path)
    # The run's facts hold digests of its rows, and regions may leave its folder.
    regions = replace(regions, facts={"seed": partition.seed, "family": run.family.fingerprint})
    return partition.control(regions) if partition.control else regions


def sums(run: Run, factors: Factors, system: str) -> Measured:
    """The gradients' sums over the system's samples, from which every score is made."""
    partition = run.plan.partition
    assert partition.granularity != "none"
    rows = run.rows(system, _longest(run, system))
    # As many of every system: draws of unequal size could not be told from systems that differ.
    count = min(partition.samples, *(len(each.examples) for each in run.systems.values()))
    chosen = shuffled(len(rows), partition.seed, f"importance/{system}")[:count]
    order = sorted(chosen, key=lambda place: rows[place].tokens)
    size = partition.batch_size
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    names = list(factors.plan.modules)
    folded = {name: factors.scaling(name) * factors.lora_B[name] for name in names}
    moving = names if factors.moves_A else ()
    with (
        others_acting(run.model, factors, all_ranks(factors)),
        trainable_factors(run.model, factors.lora_A, folded, train_A=moving, train_B=names) as (lora_A, lora_B),
    ):
        measured = measure(
            lambda places: mean_losses(run.model, [(rows[i].prompt, rows[i].target) for i in places]).sum(),
            batches,
            lora_A=lora_A,
            lora_B=lora_B,
            granularity=partition.granularity,
            blocks=max(2, min(_BLOCKS, count - count % 2)),
            progress=part(run.progress, system),
        )
    return measured.unfolded({name: factors.scaling(name) for name in names})


def _longest(run: Run, system: str) -> int:
    """Tokens of a row that its importance is measured on: as many as training reads, or all where only rewards do."""
    stages = [assigned.stage for assigned in run.plan.stages if assigned.system == system]
    read = [stage.max_length for stage in (run.plan.partition.warm_up, *stages) if isinstance(stage, SftStage)]
    return max(read, default=_ALL)
