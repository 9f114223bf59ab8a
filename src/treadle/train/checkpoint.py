"""The state of a run on disk, so that a killed run continues as if it had not been killed.

One safetensors file holds B, the optimiser's moments and, as JSON in its header, what the run is and how far it has
come; being one file it is replaced as a whole. No generator's state is stored: order and selection are functions of
(seed, epoch).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from treadle import files
from treadle.errors import FormatError, MismatchError
from treadle.family.peft_format import read_tensors

FORMAT = "treadle.sft-checkpoint/1"
FILE = "checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
LOST = "delete the folder to start afresh"

Facts = dict[str, str | int | float | bool | None]
"""What a run is: settings, digest of the data, family. Runs with equal facts make the same adapter."""


@dataclass(frozen=True)
class Run:
    """A run whose state can be saved: its facts, its parameters and their optimiser."""

    facts: Facts
    lora_B: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer

    def save(self, folder: Path, losses: list[float]) -> None:
        """Replace the checkpoint in `folder` by the state after `len(losses)` steps."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.lora_B.items():
            tensors[f"{name}/lora_B"] = parameter.detach().cpu()
            for moment in _MOMENTS:
                tensors[f"{name}/{moment}"] = self.optimizer.state[parameter][moment].cpu()
        header = json.dumps({"format": FORMAT, "facts": self.facts, "losses": losses})
        files.write_bytes(folder / FILE, save(tensors, {"run": header}))

    def resume(self, folder: Path) -> list[float]:
        """The losses of the steps already done, once parameters and optimiser stand where they stood; [] at first.

        Raises:
            MismatchError: the checkpoint is of another run; names what differs.
            FormatError: it is damaged.
        """
        for remnant in folder.glob(f".{FILE}.*.part"):  # of a write that was killed
            remnant.unlink(missing_ok=True)
        path = folder / FILE
        if not path.exists():
            return []
        losses = self._checked_losses(path)
        tensors = read_tensors(path)
        state = {i: self._restored(path, name, tensors, len(losses)) for i, name in enumerate(self.lora_B)}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        return losses

    def _checked_losses(self, path: Path) -> list[float]:
        try:
            with safe_open(path, framework="pt") as stream:
                header = json.loads((stream.metadata() or {})["run"])
            facts, losses = dict(header["facts"]), [float(loss) for loss in header["losses"]]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"not a checkpoint ({error})", where=path, remedy=LOST) from error
        if header.get("format") != FORMAT:
            raise FormatError(f"not a {FORMAT}", where=path, remedy=LOST)
        check_facts(path, facts, self.facts, whose="the checkpoint's")
        return losses

    def _restored(self, path: Path, name: str, tensors: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Put one B back, and return its moments."""
        parameter = self.lora_B[name]
        stored = {part: tensors.get(f"{name}/{part}") for part in ("lora_B", *_MOMENTS)}
        found = {part: tensor for part, tensor in stored.items() if tensor is not None}
        if len(found) != len(stored) or any(tensor.shape != parameter.shape for tensor in found.values()):
            raise FormatError(f"{name!r} is missing or of another shape", where=path, remedy=LOST)
        with torch.no_grad():
            parameter.copy_(found.pop("lora_B"))
        return {"step": torch.tensor(float(step)), **found}


def check_facts(path: Path, found: Mapping[str, object], wanted: Mapping[str, object], *, whose: str = "its") -> None:
    """Nothing, where what is stored in the file is of the run that goes on.

    Raises:
        MismatchError: it is of another; names what differs first.
    """
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise MismatchError(
                f"{whose} {name} is {found.get(name)!r}, this run's {wanted.get(name)!r}",
                where=path,
                remedy=f"go back to {whose} {name}, or {LOST}",
            )


def discard(folder: Path) -> None:
    """Remove the checkpoint, and its folder if nothing else is in it."""
    (folder / FILE).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
