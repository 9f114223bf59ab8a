"""A probe under way: its values as they are measured, and the file from which an interrupted one resumes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle import files
from treadle.errors import FormatError, InputError, MismatchError
from treadle.ranks.inputs import ProbeInputs

FORMAT = "treadle.partial-probe/1"

Facts = dict[str, object]
"""What decides a probe's values: equal facts, equal values."""

_AFRESH = "delete the file to probe afresh"


class PartialProbe:
    """What a probe has measured so far: a number a (batch, trial, module, text).

    With a path every value is appended to that file as soon as it is there, and values that stand there already are
    not measured again. The file is as private as the probe texts; whoever has saved the scores deletes it. The number
    of trials is no fact of a probe, so the same object, or file, serves when trials are added.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._facts: Facts | None = None
        self._values: dict[tuple[int, int, str], tuple[float, ...]] = {}

    def begin(self, facts: Facts) -> None:
        """Take up what an earlier probe of equal facts has left.

        Raises:
            MismatchError: what is there is of another probe; names what differs.
            FormatError: the file is damaged.
        """
        if self._facts is None and self.path is not None and self.path.exists() and self.path.stat().st_size:
            self._read(self.path)
        if self._facts is None:
            self._facts = facts
            if self.path is not None:
                files.append_line(self.path, json.dumps({"format": FORMAT, "facts": facts}).encode())
        for name in [*facts, *self._facts]:
            if self._facts.get(name) != facts.get(name):
                raise MismatchError(
                    f"the probe begun there had {name} {_short(self._facts.get(name))}, "
                    f"this one has {_short(facts.get(name))}",
                    where=self.path,
                    remedy=_AFRESH,
                )

    def _read(self, path: Path) -> None:
        with path.open("r+b") as stream:
            content = stream.read()
            stream.truncate(content.rfind(b"\n") + 1)  # what follows the last line feed was cut off by a crash
        try:
            for number, line in enumerate(content.split(b"\n")[:-1]):
                row = json.loads(line)
                if number == 0:
                    if row["format"] != FORMAT:
                        raise ValueError
                    self._facts = dict(row["facts"])
                    continue
                for name, values in row["values"].items():
                    self._values[row["batch"], row["trial"], name] = tuple(map(float, values))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError("not a probe under way", where=path, remedy=_AFRESH) from error

    def missing(self, batch: int, trials: int, names: Sequence[str]) -> list[int]:
        """The trials of a batch that lack a value of one of the modules."""
        return [trial for trial in range(trials) if any((batch, trial, name) not in self._values for name in names)]

    def add(self, batch: int, trial: int, values: Mapping[str, Float[Tensor, " texts"]]) -> None:
        """Keep a trial's values of some modules.

        Raises:
            InputError: one is not finite.
        """
        found: dict[str, list[float]] = {}
        for name, tensor in values.items():
            if not torch.isfinite(tensor).all():
                raise InputError("the probed outputs hold NaN or Inf", where=name, remedy="use float32 or less noise")
            found[name] = cast("list[float]", tensor.double().tolist())
        if self.path is not None:
            line = json.dumps({"batch": batch, "trial": trial, "values": found}, allow_nan=False)
            files.append_line(self.path, line.encode())
        for name, row in found.items():
            self._values[batch, trial, name] = tuple(row)

    def values(self, name: str, *, trials: int, batches: int) -> tuple[tuple[float, ...], ...]:
        """A module's values, a row a trial, the texts of all batches in order."""
        return tuple(
            tuple(value for batch in range(batches) for value in self._values[batch, trial, name])
            for trial in range(trials)
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def inputs_sha256(inputs: ProbeInputs) -> str:
    """The SHA-256 of tokens, labels, and how they are batched."""
    content = [[batch.tolist() for batch in part] for part in (inputs.batches, inputs.labels or ())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def model_sha256(model: nn.Module) -> str:
    """The SHA-256 of every parameter's and buffer's name, shape and bytes, as they are in memory."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
