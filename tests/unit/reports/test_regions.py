"""The picture of regions shows their shares where their modules stand, and lets nothing unescaped through."""

import re

import pytest
import torch

from treadle.partition.importance import Importance
from treadle.partition.regions import Regions
from treadle.reports.charts import PALETTE, Bar, bar_map
from treadle.reports.regions import importance_map, region_map


def weighed(*rows: tuple[float, ...]) -> Importance:
    names = ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    units = {f"{n}/rank": torch.tensor(row, dtype=torch.float64) for n, row in zip(names, rows, strict=True)}
    return Importance("rank", "taylor", 10, units, dict.fromkeys(units, 100))


@pytest.fixture
def regions() -> Regions:
    first, second = (
        weighed((1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 2.0)),
        weighed((0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 2.0)),
    )
    return Regions.of({"fast": first, "slow": second}, theta=1.0)


def widths(markup: str, tint: str) -> list[float]:
    return [float(found) for found in re.findall(rf'width="([\d.]+)" height="13" fill="{tint}"', markup)]


def test_bars_are_as_wide_as_shares(regions: Regions) -> None:
    drawn = region_map(regions)
    (whole, _) = widths(drawn, "#808080")
    for tint, shares in zip(PALETTE, ([0.25, 0.0], [0.0, 0.25], [0.25, 0.25]), strict=False):
        assert widths(drawn, tint) == pytest.approx([share * whole for share in shares], abs=0.1)
    assert "model.layers.0.q_proj: fast only 25.0% (100), slow only 0.0% (0), shared 25.0% (100), of 400" in drawn
    assert [name in drawn for name in ("fast only", "slow only", "shared")] == [True] * 3


def test_importance_adds_up_to_a_hundred(regions: Regions) -> None:
    shown = [float(found) for found in re.findall(r">([\d.]+)</text></g>", importance_map(regions, "slow"))]
    assert shown == [25.0, 75.0]


def test_names_are_escaped_and_an_empty_map_is_drawn() -> None:
    drawn = bar_map({("<0>", "<a>"): Bar({}, "<tip>")}, {}, title="<t>")
    assert not re.search(r"<(0|a|tip|t)>", drawn)
    assert "<svg" in bar_map({}, {}, title="t")
