"""Regions are sets: they part what is selected, keep their counts when shuffled, and come back from a file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from treadle.errors import ConfigError, FormatError, InputError, MismatchError
from treadle.partition.importance import Importance, measure
from treadle.partition.overlap import growth, split_half
from treadle.partition.region_files import load_regions, save_regions
from treadle.partition.regions import Regions, shuffled
from treadle.partition.units import Mask, flat


def weighed(values: Sequence[float], score: Any = "taylor") -> Importance:
    """Ranks of two modules, the first with three ranks of 10 parameters, the others of 4."""
    row = torch.tensor(values, dtype=torch.float64)
    units = {"a/rank": row[:3], "b/rank": row[3:]}
    return Importance("rank", score, 10, units, {"a/rank": 10, "b/rank": 4})


def places(mask: Mask) -> list[int]:
    return flat(mask.units).nonzero().flatten().tolist()


FAST, SLOW = weighed([5.0, 3.0, 2.0, 0.0, 0.0, 0.0]), weighed([0.0, 1.0, 4.0, 4.0, 1.0, 0.0])


def test_two_systems_make_the_articles_regions() -> None:
    regions = Regions.of({"system1": FAST, "system2": SLOW}, theta=1.0)
    assert regions.systems == ("system1", "system2")
    assert places(regions.own("system1")) == [0]
    assert places(regions.own("system2")) == [3, 4]
    assert places(regions.shared) == [1, 2]
    assert regions.overlap("system1", "system2") == 2 / 5


def test_shared_units_are_ranked_by_the_system_that_trains() -> None:
    regions = Regions.of({"system1": FAST, "system2": SLOW}, theta=1.0)
    assert places(regions.active("system1", 0.5)) == [0, 1]  # 3 against 2
    assert places(regions.active("system2", 0.5)) == [2, 3, 4]  # 4 against 1
    assert places(regions.active("system1", 0.0)) == [0]
    assert places(regions.active("system1", 1.0)) == [0, 1, 2]


def test_of_three_systems_shared_is_what_two_selected() -> None:
    third = weighed([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    regions = Regions.of({"a": FAST, "b": SLOW, "c": third}, theta=1.0)
    assert places(regions.shared) == [0, 1, 2, 3]
    assert [places(regions.own(system)) for system in "abc"] == [[], [4], [5]]
    assert places(regions.active("c", 1.0)) == [0, 3, 5]  # 1 and 2 are shared by others alone


values = st.lists(st.integers(0, 5), min_size=6, max_size=6).filter(any)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(values, min_size=1, max_size=4), theta=st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_regions_part_what_is_selected(rows: list[list[int]], theta: float) -> None:
    regions = Regions.of({f"s{i}": weighed(row) for i, row in enumerate(rows)}, theta=theta)
    parts = [places(regions.own(system)) for system in regions.systems] + [places(regions.shared)]
    selected = {place for mask in regions.selected.values() for place in places(mask)}
    assert sorted(place for part in parts for place in part) == sorted(selected)  # each once
    for system in regions.systems:
        assert regions.active(system, 1.0).count == regions.selected[system].count
        assert set(places(regions.own(system))) <= set(places(regions.active(system, 0.3)))
    modules = regions.modules()
    assert {name: shares.parameters for name, shares in modules.items()} == {"a": 30, "b": 12}
    assert sum(shares.shared for shares in modules.values()) == regions.shared.parameters
    for system in regions.systems:
        assert sum(shares.own[system] for shares in modules.values()) == regions.own(system).parameters
        assert sum(shares.importance[system] for shares in modules.values()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("within", ["module", "all"])
def test_shuffled_regions_keep_every_count(within: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(3, 200, generator=generator).tolist()
    regions = Regions.of({f"s{i}": weighed(row) for i, row in enumerate(rows)}, theta=0.6, facts={"seed": 3})
    dealt = shuffled(regions, seed=5, within=within)
    assert places(dealt.shared) != places(regions.shared)
    for system in regions.systems:
        for before, after in (
            (regions.own(system), dealt.own(system)),
            (regions.active(system, 0.4), dealt.active(system, 0.4)),
        ):
            assert before.count == after.count
            if within == "module":
                assert before.parameters == after.parameters
        for first in regions.systems:
            assert dealt.overlap(system, first) == regions.overlap(system, first)
    assert places(shuffled(regions, seed=5, within=within).shared) == places(dealt.shared)
    assert places(shuffled(regions, seed=6, within=within).shared) != places(dealt.shared)
    assert dealt.facts == {"seed": 3, "shuffled": 5, "shuffled_within": within}


def test_shuffled_within_all_moves_between_modules() -> None:
    regions = Regions.of({"s": weighed([1.0] * 3 + [0.0] * 60)}, theta=1.0)
    assert places(shuffled(regions, seed=0).own("s")) == [0, 1, 2]
    assert places(shuffled(regions, seed=0, within="all").own("s")) != [0, 1, 2]


def test_floors_are_those_of_every_pair_of_systems(net_of: Callable[..., Any]) -> None:
    net = net_of(12)
    found = {
        system: measure(net.loss, [list(numbers)], lora_A={}, lora_B=net.lora_B, blocks=4)
        for system, numbers in (("a", range(4)), ("b", range(4, 8)), ("c", range(8, 12)))
    }
    regions = Regions.measured(found, theta=0.8, score="gradient")
    assert list(regions.floors) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (one, other), rows in regions.floors.items():
        assert rows == growth(found[one], found[other], 0.8, score="gradient")
        assert rows[-1].first == split_half(found[one], 0.8, score="gradient")
        assert [row.samples for row in rows] == [1, 2]
    assert {found.score for found in regions.importances.values()} == {"gradient"}


def test_regions_of_elements_come_back_from_their_file(net_of: Callable[..., Any], tmp_path: Path) -> None:
    net, found = net_of(8), {}
    for system, numbers in (("system1", [0, 1, 2, 3]), ("system2", [4, 5, 6, 7])):
        found[system] = measure(net.loss, [numbers], lora_A=net.lora_A, lora_B=net.lora_B, blocks=4)
    regions = Regions.measured(found, theta=0.9, facts={"seed": 0, "data": "ab" * 32})
    path = tmp_path / "regions.safetensors"
    save_regions(regions, path)
    loaded = load_regions(path)
    assert (loaded.theta, loaded.facts, loaded.systems) == (0.9, regions.facts, regions.systems)
    assert loaded.floors == regions.floors
    assert [(pair, len(rows)) for pair, rows in loaded.floors.items()] == [(("system1", "system2"), 2)]
    for system in regions.systems:
        before, after = regions.active(system, 0.5), loaded.active(system, 0.5)
        assert before.lora_A.keys() == after.lora_A.keys() == net.lora_A.keys()
        assert all(torch.equal(before.units[name], after.units[name]) for name in before.units)
        assert loaded.importances[system].samples == 4
    header = json.loads(safe_open(path, framework="pt").metadata()["regions"])
    assert header["parameters"]["all"] == sum(f.numel() for f in (*net.lora_A.values(), *net.lora_B.values()))
    assert header["parameters"]["shared"] == regions.shared.parameters
    assert header["parameters"]["only system1"] == regions.own("system1").parameters
    first = path.read_bytes()
    save_regions(loaded, path)
    assert path.read_bytes() == first


def test_shuffled_regions_come_back_as_they_are(tmp_path: Path) -> None:
    regions = shuffled(Regions.of({"s": weighed([1.0] * 12)}, theta=0.5), seed=1)  # ties, whose choice is in the file
    save_regions(regions, tmp_path / "r")
    assert places(load_regions(tmp_path / "r").own("s")) == places(regions.own("s"))


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    header = json.loads(safe_open(path, framework="pt").metadata()["regions"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, {"regions": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header, tensors: header.update(format="treadle.regions/9"),
        lambda header, tensors: header.update(score="luck"),
        lambda header, tensors: header.update(sizes=[1]),
        lambda header, tensors: header.update(samples={}),
        lambda header, tensors: header.pop("theta"),
        lambda header, tensors: header.update(floors={}),
        lambda header, tensors: header.update(floors=[{"systems": ["s"]}]),
        lambda header, tensors: tensors.pop("s/selected/a/rank"),
        lambda header, tensors: tensors.update({"s/selected/a/rank": torch.ones(3)}),
        lambda header, tensors: tensors.update({"s/importance/a/rank": torch.ones(2, dtype=torch.float64)}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "regions.safetensors"
    save_regions(Regions.of({"s": FAST}, theta=0.9), path)
    rewritten(path, change)
    with pytest.raises(FormatError, match=r"not a (file of regions|treadle.regions/1).*; make the regions again"):
        load_regions(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(FormatError, match="not a file of regions"):
        load_regions(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "bare")
    with pytest.raises(FormatError, match="not a file of regions"):
        load_regions(tmp_path / "bare")
    with pytest.raises(InputError, match="no such file"):
        load_regions(tmp_path / "none")


@pytest.mark.parametrize(
    ("importances", "theta", "kind", "words"),
    [
        ({}, 0.9, InputError, "there is no system"),
        ({"../s": FAST}, 0.9, InputError, "'../s' cannot be a name"),
        ({"s": FAST}, 1.5, ConfigError, "theta is 1.5"),
        ({"s": FAST, "t": weighed([1.0] * 7)}, 0.9, MismatchError, "b/rank: the importances to t are of other units"),
        ({"s": FAST, "t": weighed([1.0] * 6, "fisher")}, 0.9, MismatchError, "t: 'fisher' stands beside 'taylor'"),
    ],
)
def test_what_makes_no_regions_is_refused(importances: Any, theta: float, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        Regions.of(importances, theta=theta)


@pytest.mark.parametrize("ask", [lambda r: r.own("x"), lambda r: r.active("x", 0.5), lambda r: r.overlap("s", "x")])
def test_an_unknown_system_is_named(ask: Any) -> None:
    with pytest.raises(InputError, match="no system 'x'; choose among s"):
        ask(Regions.of({"s": FAST}, theta=0.9))
