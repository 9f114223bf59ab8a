"""Regions on disk: one safetensors file whose header tells in JSON what they are."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import cast, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from treadle import files
from treadle.errors import FormatError, InputError
from treadle.partition.importance import SCORES, Importance
from treadle.partition.overlap import Overlap
from treadle.partition.regions import Facts, Regions
from treadle.partition.units import Granularity, Mask

FORMAT = "treadle.regions/1"
_REMEDY = "make the regions again"


def save_regions(regions: Regions, path: Path) -> None:
    """Replace `path` by the regions, whole or not at all.

    Tensors are named "SYSTEM/importance/KEY" (float64) and "SYSTEM/selected/KEY" (bool), KEY as in `units`. The header
    says in JSON: θ, granularity, score, samples a system, parameters of each region, floors, sizes and facts.

    Raises:
        UnavailableError: the disk refuses.
    """
    first = next(iter(regions.importances.values()))
    tensors: dict[str, Tensor] = {}
    for system in regions.systems:
        tensors |= {f"{system}/importance/{name}": t for name, t in regions.importances[system].units.items()}
        tensors |= {f"{system}/selected/{name}": t for name, t in regions.selected[system].units.items()}
    header = {
        "format": FORMAT,
        "theta": regions.theta,
        "granularity": first.granularity,
        "score": first.score,
        "samples": {system: found.samples for system, found in regions.importances.items()},
        "parameters": {
            "all": (regions.shared | ~regions.shared).parameters,
            "shared": regions.shared.parameters,
            **{f"only {system}": regions.own(system).parameters for system in regions.systems},
        },
        "floors": [{"systems": list(pair), **asdict(floor)} for pair, rows in regions.floors.items() for floor in rows],
        "sizes": dict(first.sizes),
        "facts": dict(regions.facts),
    }
    files.write_bytes(path, save(tensors, {"regions": json.dumps(header, allow_nan=False)}))


def load_regions(path: Path) -> Regions:
    """The regions in a file, with what its header tells.

    Raises:
        InputError: no such file.
        FormatError: it is damaged, or no file of regions.
    """
    if not path.exists():
        raise InputError("no such file", where=path, remedy="check the path")
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {})["regions"])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        if header["format"] != FORMAT:
            raise FormatError(f"not a {FORMAT}", where=path, remedy=_REMEDY)
        return _regions(header, tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"not a file of regions ({error})", where=path, remedy=_REMEDY) from error


def _regions(header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Regions:
    granularity, score = header["granularity"], header["score"]
    if granularity not in get_args(Granularity) or score not in SCORES:
        raise ValueError(f"{granularity!r} by {score!r}")
    samples, sizes, facts = (_table(header, name) for name in ("samples", "sizes", "facts"))
    shapes = {name: tensors[f"{next(iter(samples))}/selected/{name}"].shape for name in sizes}

    def stored(system: str, what: str, dtype: torch.dtype) -> dict[str, Tensor]:
        found = {name: tensors[f"{system}/{what}/{name}"] for name in sizes}
        if any(tensor.dtype != dtype or tensor.shape != shapes[name] for name, tensor in found.items()):
            raise ValueError(f"{what} of {system} is not {dtype}, or of another shape")
        return found

    importances = {
        system: Importance(
            cast("Granularity", granularity),
            score,
            cast("int", count),
            stored(system, "importance", torch.float64),
            cast("Mapping[str, int]", sizes),
        )
        for system, count in samples.items()
    }
    selected = {s: Mask(stored(s, "selected", torch.bool), importances[s].sizes) for s in samples}
    theta = float(cast("float", header["theta"]))
    floors: dict[tuple[str, str], tuple[Overlap, ...]] = {}
    for pair, floor in map(_floor, _rows(header["floors"])):
        floors[pair] = (*floors.get(pair, ()), floor)
    return Regions(theta, importances, selected, cast("Facts", facts), floors)


def _rows(listed: object) -> list[dict[str, object]]:
    if not isinstance(listed, list):
        raise ValueError(f"floors are {listed!r}")
    return cast("list[dict[str, object]]", listed)


def _floor(row: Mapping[str, object]) -> tuple[tuple[str, str], Overlap]:
    first, second = cast("list[str]", row["systems"])
    samples, *indices = (float(cast("float", row[field.name])) for field in fields(Overlap))
    return (first, second), Overlap(int(samples), *indices)


def _table(header: Mapping[str, object], name: str) -> dict[str, object]:
    table = header[name]
    if not isinstance(table, dict) or (not table and name != "facts"):
        raise ValueError(f"{name} is {table!r}")
    return {str(key): value for key, value in table.items()}
