"""What a run of stages made, and its regions, as tables for people and as JSON for programs.

Imported inside the command, since the recipe's types bring torch with them.
"""

from dataclasses import asdict

from treadle.cli.console import print_json, print_table, remark, say
from treadle.evaluation.intervals import Interval
from treadle.partition.overlap import samples_needed
from treadle.partition.regions import Regions
from treadle.recipes.stages import StagedAdapter
from treadle.train.stages.training import Passed


def show_stages(trained: StagedAdapter, *, json: bool) -> None:
    """Print what a run made."""
    result = trained.result
    if json:
        print_json(
            {
                "folder": trained.folder,
                "name": trained.adapter.name,
                "family": trained.adapter.family,
                "minds": {system: str(folder) for system, folder in trained.minds.items()},
                "regions": trained.regions,
                "overlaps": [] if result.regions is None else _overlaps(result.regions),
                "stages": [_part(part) for part in result.passed],
                "accuracy": result.accuracy,
                "ablations": [asdict(each) for each in trained.ablations],
            }
        )
        return
    where = "of its family" if trained.adapter.family else "with an A of its own, so of no family"
    say(f"{trained.folder}: adapter {trained.adapter.name}, {where}")
    for system, folder in trained.minds.items():
        say(f"{folder}: what {system} selected")
    print_table("parts", ["part", "parameters", "first", "last"], [_row(part) for part in result.passed])
    if result.accuracy:
        systems = list(next(iter(result.accuracy.values())))
        rows = [[name, *(round(found[system], 3) for system in systems)] for name, found in result.accuracy.items()]
        print_table("accuracy on held-out examples", ["after", *systems], rows)
    if trained.ablations:
        systems = list(trained.ablations[0].accuracy)
        print_table(
            "ablations: accuracy at the end",
            ["run", "parameters of each stage", *systems],
            [
                [each.name, " · ".join(f"{count:,}" for count in each.parameters), *map(_shown, each.accuracy.values())]
                for each in trained.ablations
            ],
        )
    for (one, other), rows in ({} if result.regions is None else result.regions.floors).items():
        if samples_needed(rows) is None:
            remark(f"{rows[-1].samples} samples do not tell {one} from {other}: raise regions.samples")
    for part in result.passed:
        if part.left_out:
            remark(f"{part.name}: {part.left_out} examples have too long a prompt: raise max_prompt_length")


def _shown(found: Interval) -> str:
    return f"{found.estimate:.3f} ({found.low:.2f}–{found.high:.2f})"


def show_regions(name: str, regions: Regions, *, json: bool) -> None:
    """Print which parameters of which modules are whose."""
    modules, first = regions.modules(), next(iter(regions.importances.values()))
    told = {
        "theta": regions.theta,
        "granularity": first.granularity,
        "score": first.score,
        "samples": {system: found.samples for system, found in regions.importances.items()},
    }
    if json:
        content = {"name": name, **told, "facts": regions.facts, "overlaps": _overlaps(regions)}
        print_json({**content, "modules": {module: asdict(shares) for module, shares in modules.items()}})
        return
    columns = [f"{system} only" for system in regions.systems]
    rows = [
        [module, *(f"{count / each.parameters:.0%}" for count in (*each.own.values(), each.shared)), each.parameters]
        for module, each in modules.items()
    ]
    print_table(f"{name}: regions of {first.granularity}s", ["module", *columns, "shared", "parameters"], rows)
    for (one, other), draws in regions.floors.items():
        last = draws[-1]
        say(
            f"{one} and {other} share {regions.overlap(one, other):.2f} of what either selected; two draws of "
            f"{last.samples} samples of one system share {last.floor:.2f}, of both {last.between:.2f}"
        )


def _overlaps(regions: Regions) -> list[dict[str, object]]:
    return [
        {
            "systems": [one, other],
            "overlap": regions.overlap(one, other),
            "growth": [asdict(row) for row in rows],
            "samples_needed": samples_needed(rows),
        }
        for (one, other), rows in regions.floors.items()
    ]


def _curve(part: Passed) -> tuple[str, list[float]]:
    """The rewards of a part, or the losses where there are none."""
    for name in ("reward", "loss"):
        found = [record.values[name] for record in part.records if name in record.values]
        if found:
            return name, found
    return "loss", []


def _row(part: Passed) -> list[str]:
    name, values = _curve(part)
    ends = [f"{name} {values[place]:.3f}" for place in (0, -1)] if values else ["–", "–"]
    return [part.name, f"{part.parameters:,}", *ends]


def _part(part: Passed) -> dict[str, object]:
    return {
        "name": part.name,
        "parameters": part.parameters,
        "left_out": part.left_out,
        "records": [{"step": record.step, **record.values} for record in part.records],
    }
