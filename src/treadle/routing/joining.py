"""Factors and statistics of a changed bank, copied bit for bit from the banks that its adapters come from.

Nothing is computed here: an adapter's factors are made once, by `build_factors`, and move from bank to bank.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from treadle.family.adapter import Adapter
from treadle.routing.calibration import Statistics
from treadle.routing.calibration.prompts import joined as joined_prompts
from treadle.routing.factors import Group, LayerFactors, assemble, grouped


@dataclass(frozen=True)
class Pick:
    """An adapter of the new bank: the bank it comes from, and its place there."""

    source: int
    place: int


def joined_factors(
    module: str, members: Sequence[Adapter], sources: Sequence[Mapping[str, LayerFactors]], picks: Sequence[Pick]
) -> LayerFactors:
    """The uncalibrated factors of one layer for these members, each copied from the bank it was picked from.

    Args:
        module: the layer.
        members: of the new bank, in order.
        sources: module → factors, of every bank that is picked from.
        picks: where each member comes from.
    """
    groups = [
        _joined_group(module, columns, sources, [picks[column] for column in columns])
        for columns in grouped(module, members)
    ]
    return assemble(module, members, groups)


def _joined_group(
    module: str, columns: Sequence[int], sources: Sequence[Mapping[str, LayerFactors]], picks: Sequence[Pick]
) -> Group:
    """One group: all members of the family, or one foreign adapter; so it has one group in each source too."""
    groups: dict[int, Group] = {}
    rows: dict[Pick, int] = {}
    for pick in picks:
        if pick.source not in groups:
            group = sources[pick.source][module].group_of(pick.place)
            assert group is not None, "grouped() names adapters that have the module"
            start = len(rows)
            rows |= {Pick(pick.source, place): start + row for row, place in enumerate(group.columns.tolist())}
            groups[pick.source] = group
    order = torch.tensor([rows[pick] for pick in picks])
    return Group(
        torch.tensor(columns),
        next(iter(groups.values())).A,
        torch.cat([group.grams for group in groups.values()])[order],
        torch.cat([group.norms for group in groups.values()])[order],
    )


def joined_statistics(
    sources: Sequence[Statistics | None], sizes: Sequence[int], picks: Sequence[Pick], modules: Iterable[str]
) -> Statistics | None:
    """The statistics of the picked adapters; NaN for one whose source was measured with another yardstick.

    Args:
        sources: of every bank that is picked from; the first sets the yardstick, None leaves the new bank without.
        sizes: adapters of every source.
        picks: where each adapter of the new bank comes from.
        modules: of the new bank.
    """
    first = sources[0]
    if first is None:
        return None
    starts = [sum(sizes[:source]) for source in range(len(sizes))]
    order = torch.tensor([starts[pick.source] + pick.place for pick in picks])
    names = list(modules)
    known = [source if source is not None and first.alike(source) else None for source in sources]

    def columns(values: Sequence[Mapping[str, Tensor]], module: str) -> Tensor:
        parts = [
            value.get(module, torch.full((size,), torch.nan, dtype=torch.float64))
            for value, size in zip(values, sizes, strict=True)
        ]
        return torch.cat(parts)[order]

    means = [{} if source is None else source.mean for source in known]
    stds = [{} if source is None else source.std for source in known]
    digests = [("",) * size if source is None else source.B_digests for source, size in zip(known, sizes, strict=True)]
    prompts = [None if source is None else source.prompts for source in known]
    spent = [source.epsilon for source in known if source is not None]
    return replace(
        first,
        mean={module: columns(means, module) for module in names},
        std={module: columns(stds, module) for module in names},
        prompts=None if first.prompts is None else joined_prompts(prompts, sizes, order, first.prompts, names),
        B_digests=tuple(digests[pick.source][pick.place] for pick in picks),
        # of other silos' data, so that the largest holds for each of them; without a bound there is none at all
        epsilon=None if None in spent else max(epsilon for epsilon in spent if epsilon is not None),
        delta=max(source.delta for source in known if source is not None),
    )
