"""Regions to look at: over layers × kinds of modules, what belongs to which system, and where its importance lies."""

from markupsafe import Markup

from treadle.partition.regions import Regions
from treadle.reports.charts import Bar, Cell, bar_map, colours, heat_map, legend
from treadle.reports.layers import placed

_SHARED = "shared"


def region_map(regions: Regions) -> Markup:
    """A bar a module: the shares of its parameters that each system has alone, and that several share."""
    names = [f"{system} only" for system in regions.systems]
    tints = colours([*names, _SHARED])
    modules = regions.modules()
    places = placed(list(modules))
    bars: dict[tuple[str, str], Bar] = {}
    for module, shares in modules.items():
        counts = dict(zip(names, shares.own.values(), strict=True)) | {_SHARED: shares.shared}
        told = ", ".join(f"{name} {count / shares.parameters:.1%} ({count:,})" for name, count in counts.items())
        bars[places[module]] = Bar(
            {name: count / shares.parameters for name, count in counts.items()},
            f"{module}: {told}, of {shares.parameters:,} parameters",
        )
    return legend(tints) + bar_map(bars, tints, title="shares of every module's regions", row_head="layer")


def importance_map(regions: Regions, system: str) -> Markup:
    """What percentage of a system's importance lies in each module; they add up to 100."""
    modules = regions.modules()
    places = placed(list(modules))
    cells: dict[tuple[str, str], Cell] = {}
    for module, shares in modules.items():
        share = shares.importance[system]
        tip = f"{module}: {share:.3%} of {system}'s importance, in {shares.parameters:,} parameters"
        cells[places[module]] = Cell(share, f"{100 * share:.1f}", tip)
    return heat_map(cells, title=f"percentage of {system}'s importance in every module", row_head="layer")
