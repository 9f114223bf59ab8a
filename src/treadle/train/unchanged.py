"""What training leaves as it was: a proof for what is frozen, and every module's mode."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from treadle.errors import TreadleError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Shaped[Tensor, "..."]) -> int:
    """The sum of the tensor's bit patterns: any one changed element changes it, and reading a model takes a moment."""
    return int(tensor.detach().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64).item())


@contextlib.contextmanager
def unchanged(model: nn.Module, lora_A: Mapping[str, Tensor]) -> Iterator[None]:
    """A block after which the model's parameters and buffers and every A are what they were, bit for bit.

    Raises:
        TreadleError: one of them changed; the adapter would not fit its family.
    """
    frozen = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    frozen |= {f"{name}.lora_A": A for name, A in lora_A.items()}
    before = {name: checksum(tensor) for name, tensor in frozen.items()}
    yield
    for name, tensor in frozen.items():
        if checksum(tensor) != before[name]:
            raise TreadleError("a frozen tensor changed during training", where=name, remedy="report this as a bug")


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A block in which no module drops anything out; each module's own mode returns with its end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
