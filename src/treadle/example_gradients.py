"""The gradient of every example by itself, out of one backward pass.

For a weight W that acts as y = z·Wᵀ on an example's positions t, the example's gradient is Σ_t g_t z_tᵀ with g the
gradient at y. With W = lora_B and z = A·x that is (out_features, rank) an example: what the ordinary backward pass
multiplies anyway, only not yet added up over the examples. Where only Σ_o G_or W_or of a column r is asked for, it is
Σ_t z_tr (Wᵀg_t)_r, and no matrix G is made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from treadle.errors import TreadleError, UnsupportedError


def per_example_gradients(
    loss: Callable[[], Tensor], weights: Mapping[str, nn.Parameter], examples: int
) -> dict[str, Float[Tensor, "examples out inner"]]:
    """The gradients of every example's share of `loss()`, by the name of the weight.

    Weights that took no part are left out. Nothing is accumulated in any `.grad`.

    Args:
        loss: runs the model on a batch, examples first, and returns the sum of their losses.
        weights: each used only as the weight of `torch.nn.functional.linear`, as often as it likes.
        examples: how many the batch has.

    Raises:
        UnsupportedError: a weight is used in another way, or on something whose first axis is not the examples.
        TreadleError: no weight takes part in the loss.
    """
    return _watched(loss, weights, examples, _gradients)


def per_example_gates(
    loss: Callable[[], Tensor], weights: Mapping[str, nn.Parameter], examples: int
) -> dict[str, Float[Tensor, "examples inner"]]:
    """The derivative of every example's share of `loss()` by a factor on each column of a weight, at factor 1.

    For column r it is Σ_o G_or W_or, with G the example's gradient. With W = lora_B, and z = A·x its only input, it is
    as well Σ_i over row r of A of A's gradient times A: a factor on the column of B is one on the row of A.

    Args and Raises: those of `per_example_gradients`.
    """
    return _watched(loss, weights, examples, _gates)


_Reduction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps g (examples, positions, out), z (examples, positions, inner) and W to what is kept of every example."""


def _gradients(g: Tensor, z: Tensor, weight: Tensor) -> Float[Tensor, "examples out inner"]:
    few = g.shape[2] < z.shape[2]  # batched products are twice as fast with the short side first
    return torch.bmm(g.mT, z) if few else torch.bmm(z.mT, g).mT


def _gates(g: Tensor, z: Tensor, weight: Tensor) -> Float[Tensor, "examples inner"]:
    return ((g @ weight) * z).sum(1)


def _watched(
    loss: Callable[[], Tensor], weights: Mapping[str, nn.Parameter], examples: int, reduce: _Reduction
) -> dict[str, Tensor]:
    watch = _Watch(weights, examples, reduce)
    with watch:
        total = loss()
    if not watch.used:
        raise TreadleError("no trained weight takes part in the loss", remedy="plan modules whose output reaches it")
    rest = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, cast("tuple[Tensor | None, ...]", rest), strict=True):
        if gradient is not None:
            raise UnsupportedError("it is used as more than a linear layer's weight", where=name, remedy="leave it out")
    return watch.found


class _Watch(TorchFunctionMode):
    """A block in which `linear` by one of the weights remembers what its backward pass is to know."""

    def __init__(self, weights: Mapping[str, nn.Parameter], examples: int, reduce: _Reduction) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._examples = examples
        self._reduce = reduce
        self.used = False
        self.found: dict[str, Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Let every function through but `linear` by a watched weight."""
        if func is torch.nn.functional.linear and len(args) > 1 and (name := self._names.get(id(args[1]))):
            if args[0].dim() < 2 or args[0].shape[0] != self._examples:
                raise UnsupportedError(
                    f"its input is {tuple(args[0].shape)} for {self._examples} examples, which must come first",
                    where=name,
                    remedy="leave it out of the plan",
                )
            self.used = True
            bias = args[2:] or tuple((kwargs or {}).values())
            output = _Product.apply(args[0], args[1], _Record(name, self.found, self._reduce))
            return output + bias[0] if bias and bias[0] is not None else output
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Record:
    """Where what is kept of one weight goes."""

    name: str
    found: dict[str, Tensor]
    reduce: _Reduction

    def add(self, g: Float[Tensor, "examples *_ out"], z: Float[Tensor, "examples *_ inner"], weight: Tensor) -> None:
        """Take up the part of one use; a weight that is used twice gets both."""
        g, z = g.flatten(1, -2) if g.dim() > 2 else g[:, None], z.flatten(1, -2) if z.dim() > 2 else z[:, None]
        part = self.reduce(g, z, weight)
        earlier = self.found.get(self.name)
        self.found[self.name] = part if earlier is None else earlier + part


class _Product(torch.autograd.Function):
    """z·Wᵀ whose backward pass hands g and z to a record, and W no gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, record: _Record) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(z, weight)
        ctx.record = record
        return torch.nn.functional.linear(z, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:  # noqa: ANN401
        z, weight = ctx.saved_tensors
        (g,) = gradients
        ctx.record.add(g, z, weight)
        return (g @ weight if ctx.needs_input_grad[0] else None), None, None
