"""A family and its adapters brought to another plan's ranks: growing loses nothing, shrinking says what it loses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle import files
from treadle.errors import InputError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.plan import RankPlan
from treadle.family.resize import Resized, resized, resized_family, truncated
from treadle.progress import Progress, silent

FAMILY = "family"


@dataclass(frozen=True)
class ResizedFleet:
    """The family of the new plan, and what became of each adapter; all of it stands in `folder`."""

    folder: Path
    family: AdapterFamily
    adapters: tuple[Resized, ...]


def resize(
    folder: Path,
    plan: Path,
    *,
    out: Path,
    adapters: Sequence[Path] = (),
    alone: bool = False,
    progress: Progress = silent,
) -> ResizedFleet:
    """The family in `folder` with the plan's ranks, as `out`/family, and these of its adapters, each as `out`/NAME.

    Args:
        folder: of a family.
        plan: a plan.json for the same base.
        out: a new folder, written whole or not at all.
        adapters: their folders; members of the family, or others on its base.
        alone: cut each adapter by the best truncation of its own, which takes it out of the family.
        progress: told of every adapter.

    Raises:
        InputError: `out` exists, two adapters have one name, or there is no such family, plan or adapter.
        MismatchError: parts of different bases or shapes.
        UnavailableError: the disk refuses.
    """
    if out.exists():  # said before the work, not after
        raise InputError("already exists", where=out, remedy="choose another name")
    old, wanted = AdapterFamily.load(folder), RankPlan.load(plan)
    family = resized_family(old, wanted)
    made: dict[str, Resized] = {}
    for done, path in enumerate(adapters):
        progress(f"resizing {path.name}", done, len(adapters))
        adapter = Adapter.load(path)
        if adapter.name in made or adapter.name == FAMILY:
            raise InputError(f"the name {adapter.name!r} is taken", where=path, remedy="resize it on its own")
        if adapter.family == old.fingerprint:
            adapter = adapter.member_of(old)
        made[adapter.name] = truncated(adapter, wanted) if alone else resized(adapter, family)
    with files.new_folder(out) as temporary:
        family.save(temporary / FAMILY)
        for name, change in made.items():
            change.adapter.save(temporary / name)
    return ResizedFleet(out, family, tuple(made.values()))
