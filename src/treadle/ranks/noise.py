"""Noise on one layer's weight: how it is drawn, and how a layer is given noisy tensors and then its own again."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.errors import InputError

# Below, scores in bfloat16 are up to eleven times those in float32; and a tiny model's in float32 at a tenth of its
# least are three times what they should be.
_LEAST = {torch.float16: 0.1, torch.bfloat16: 0.1, torch.float32: 1e-4}


def drawn(*key: str | int) -> torch.Generator:
    """The generator of one draw, a function of its key; on the CPU, so that no device changes what is drawn."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shaken_parameters(layer: nn.Module, *, bias: bool) -> list[nn.Parameter]:
    """The layer's weight and, if asked for and there, its bias."""
    parameters = [layer.get_parameter("weight")]
    if bias and getattr(layer, "bias", None) is not None:
        parameters.append(layer.get_parameter("bias"))
    return parameters


def deviation(tensor: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The standard deviation of the tensor's entries about their mean, in float32."""
    return tensor.detach().float().std(correction=0)


def noisy(tensor: Float[Tensor, "*shape"], scale: float, generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """The tensor plus independent noise from N(0, (scale·std)²), std being its own.

    Raises:
        InputError: the noise would be lost in the rounding of the tensor's type.
    """
    return _added(tensor, torch.randn(tensor.shape, generator=generator), scale)


def noisy_at_rank(
    weight: Float[Tensor, "rows columns"], scale: float, rank: int, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """The weight plus B·A, Gaussian factors of this rank; each entry has variance (scale·std)², as full noise has."""
    rows, columns = weight.shape
    B, A = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return _added(weight, B @ A / rank**0.5, scale)


def _added(tensor: Tensor, noise: Tensor, scale: float) -> Tensor:
    least = _LEAST.get(tensor.dtype, 0.0)
    if scale < least:
        finer = "" if tensor.dtype is torch.float32 else "in float32, or "
        raise InputError(
            f"noise of scale {scale} drowns in the rounding of {str(tensor.dtype).removeprefix('torch.')}",
            remedy=f"probe {finer}with a scale of at least {least:g}",
        )
    return tensor + (noise.to(tensor.device) * (scale * deviation(tensor))).to(tensor.dtype)


@contextlib.contextmanager
def pointed(parameters: Sequence[nn.Parameter], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Until the block ends the parameters show these tensors; their own are never written and then return."""
    stored = [parameter.data for parameter in parameters]
    try:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.data = tensor
        yield
    finally:
        for parameter, tensor in zip(parameters, stored, strict=True):
            parameter.data = tensor
