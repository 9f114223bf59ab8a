"""What a run of stages keeps on disk between them, so that it continues after a kill from the last whole stage.

Every file is one safetensors file with the factors, and as JSON in its header which run they are of and what was told
on the way. It is replaced as a whole.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from treadle import files
from treadle.errors import FormatError
from treadle.family.peft_format import read_tensors
from treadle.train.checkpoint import LOST, check_facts
from treadle.train.stages.factors import Factors
from treadle.train.stages.hosting import Record

FORMAT = "treadle.stage/2"

Facts = Mapping[str, str | int | float | bool | None]
"""What a run is; runs with equal facts make the same factors."""


@dataclass(frozen=True)
class Kept:
    """The factors after a part of a run, what was told in it, and how many examples it left out."""

    factors: Factors
    records: Sequence[Record]
    left_out: int = 0


def keep(path: Path, kept: Kept, facts: Facts) -> None:
    """Write the file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name in kept.factors.plan.modules:
        tensors[f"{name}/lora_B"] = kept.factors.lora_B[name].contiguous()
        if kept.factors.moves_A:
            tensors[f"{name}/lora_A"] = kept.factors.lora_A[name].contiguous()
    records = [{"step": record.step, "values": dict(record.values)} for record in kept.records]
    header = {"format": FORMAT, "facts": dict(facts), "records": records, "left_out": kept.left_out}
    files.write_bytes(path, save(tensors, {"run": json.dumps(header)}))


def kept(path: Path, before: Factors, facts: Facts) -> Kept | None:
    """What was kept in the file, given the factors that the run began with; None where there is no file.

    Raises:
        MismatchError: it is of another run; names what differs.
        FormatError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {})["run"])
        found, left_out = dict(header["facts"]), int(header["left_out"])
        records = [
            Record(int(record["step"]), {name: float(value) for name, value in record["values"].items()})
            for record in header["records"]
        ]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"not a stage ({error})", where=path, remedy=LOST) from error
    check_facts(path, found, facts)
    tensors = read_tensors(path)
    sides = {"lora_B": before.lora_B, **({"lora_A": before.lora_A} if before.moves_A else {})}
    for side, known in sides.items():
        for name, tensor in known.items():
            stored = tensors.get(f"{name}/{side}")
            if stored is None or stored.shape != tensor.shape:
                raise FormatError(f"{name!r} is missing or of another shape", where=path, remedy=LOST)
    lora_A = {name: tensors[f"{name}/lora_A"] for name in sides.get("lora_A", {})}
    return Kept(before.moved(lora_A, {name: tensors[f"{name}/lora_B"] for name in before.lora_B}), records, left_out)
