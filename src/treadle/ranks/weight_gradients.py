"""How large the gradient of a scalar is at every layer's weight, text by text, in one backward pass.

A layer that maps x_t to W·x_t has, for one text, the gradient Σ_t g_t x_tᵀ, with g_t the gradient at its output. Its
squared Frobenius norm is Σ_st (x_s·x_t)(g_s·g_t): for few tokens cheaper than the matrix itself. No weight needs a
gradient of its own, so the pass costs what passing through the layers costs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from treadle.errors import UnsupportedError


@dataclass
class _Seen:
    """One layer's calls in a forward pass, and the gradients at its outputs in the present backward pass."""

    inputs: list[Tensor] = field(default_factory=list[Tensor])
    gradients: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    products: Tensor | None = None  # x_s·x_t, the same for every scalar
    versions: list[tuple[Tensor, int]] = field(default_factory=list[tuple[Tensor, int]])

    @property
    def overwritten(self) -> bool:
        """Whether the model has written to an input since the layer read it."""
        return any(x._version != version for x, version in self.versions)


def squared_norms(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    *,
    run: Callable[[], Float[Tensor, "texts *rest"]],
    scalars: Sequence[Callable[[Tensor], Float[Tensor, ""]]],
    take: Callable[[int, dict[str, Tensor]], None],
) -> None:
    """Give `take` for every scalar its number and layer → ‖∂scalar/∂W‖²_F of each text's share, (texts,).

    A layer without a part in the scalar gets zeros. The model is run once and is as before afterwards, its parameters'
    wish for gradients included.

    Args:
        model: whose parameters are frozen meanwhile.
        layers: Linear or Conv1D, by name.
        run: runs the model on texts that do not mix.
        scalars: sums over the texts of what `run` returns.
        take: told of each scalar as it is done.

    Raises:
        UnsupportedError: a layer's input is not laid out by texts, or is written to behind the layer.
    """
    seen = {name: _Seen() for name in layers}
    roots: list[Tensor] = []
    with torch.enable_grad(), _frozen(model):
        with contextlib.ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(_watching(seen[name], roots)).remove)
            output = run()
        texts = len(output)
        for name, layer_seen in seen.items():
            if layer_seen.overwritten:
                raise UnsupportedError(
                    "its input is changed in place", where=name, remedy="leave this module out of the plan"
                )
            if any(len(x) != texts for x in layer_seen.inputs):
                raise UnsupportedError(
                    "the rows of its input are not the texts", where=name, remedy="leave this module out of the plan"
                )
        for number, scalar in enumerate(scalars):
            total = scalar(output)
            if total.requires_grad:
                retain = number < len(scalars) - 1
                torch.autograd.grad(total, roots, retain_graph=retain, allow_unused=True)
            take(number, {name: _norms(layer_seen, texts, output.device) for name, layer_seen in seen.items()})


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """A block in which the graph begins at the first watched layer and nowhere else."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in asked.items():
            parameter.requires_grad_(requires_grad)


def _watching(seen: _Seen, roots: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        call = len(seen.inputs)
        seen.inputs.append(_by_text(inputs[0].detach()))
        seen.versions.append((inputs[0], inputs[0]._version))
        if not output.requires_grad:
            roots.append(output.detach().requires_grad_())
            output = roots[-1].clone()  # a leaf must not be added to in place, as some blocks do

        def take(gradient: Tensor) -> None:
            seen.gradients[call] = _by_text(gradient)

        output.register_hook(take)
        return output

    return hook


def _by_text(x: Float[Tensor, "texts *_ width"]) -> Float[Tensor, "texts _ width"]:
    return x.float().flatten(1, -2) if x.ndim > 2 else x.float()[:, None]


def _norms(seen: _Seen, texts: int, device: torch.device) -> Float[Tensor, " texts"]:
    """The layer's squared norms, its gradients dropped."""
    gradients, seen.gradients = seen.gradients, {}
    if not gradients:
        return torch.zeros(texts, device=device)
    if len(seen.inputs) == 1:
        x, g = seen.inputs[0], gradients[0]
    else:  # a layer that runs several times has one weight: its gradients add up before they are squared
        x = torch.cat([seen.inputs[call] for call in gradients], dim=1)
        g = torch.cat(list(gradients.values()), dim=1)
    tokens, wide, high = x.shape[1], x.shape[2], g.shape[2]
    if tokens * (wide + high) >= wide * high:
        return torch.bmm(g.mT, x).square().sum((1, 2))
    if seen.products is None or len(gradients) != len(seen.inputs):
        seen.products = torch.bmm(x, x.mT)
    return (seen.products * torch.bmm(g, g.mT)).sum((1, 2)).clamp(min=0.0)
