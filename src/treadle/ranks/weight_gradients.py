"""How large the gradient of a scalar is at every layer's weight, text by text, in one backward pass.

A layer that maps x_t to W·x_t has, for one text, the gradient Σ_t g_t x_tᵀ, with g_t the gradient at its output. Its
squared Frobenius norm is Σ_st (x_s·x_t)(g_s·g_t): for few tokens cheaper than the matrix itself. No weight needs a
gradient of its own, so the pass costs what passing through the layers costs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from treadle.errors import UnsupportedError

_SAME, _SAME_IN_HALF = 1e-3, 1e-2  # relative; kernels may sum other rows in another order


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
    ids: Int[Tensor, "texts tokens"],
    run: Callable[[Tensor], Float[Tensor, "texts *rest"]],
    scalars: Sequence[Callable[[Tensor], Float[Tensor, ""]]],
    take: Callable[[int, dict[str, Tensor]], None],
) -> None:
    """Give `take` for every scalar its number and layer → ‖∂scalar/∂W‖²_F of each text's share, (texts,).

    A layer without a part in the scalar gets zeros. The model is run twice, the second time on the texts in reverse to
    see that a layer's rows turn round with them, text by text. It is as before afterwards, its parameters' wish for
    gradients included.

    Args:
        model: whose parameters are frozen meanwhile.
        layers: Linear or Conv1D, by name.
        ids: the texts.
        run: runs the model on texts that do not mix.
        scalars: sums over the texts of what `run` returns.
        take: told of each scalar as it is done.

    Raises:
        UnsupportedError: a layer's input is not laid out by texts, or is written to behind the layer, or the scalar
            has gradients and none of them reaches a layer.
    """
    texts = len(ids)
    seen = {name: _Seen() for name in layers}
    with torch.enable_grad(), _frozen(model):
        with contextlib.ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(_watching(name, seen[name], texts)).remove)
            output = run(ids)
        for name, layer_seen in seen.items():
            if layer_seen.overwritten:
                raise UnsupportedError(
                    "its input is changed in place", where=name, remedy="leave this module out of the plan"
                )
        _check_layout(layers, seen, texts, lambda: run(ids.flip(0)))
        for number, scalar in enumerate(scalars):
            total = scalar(output)
            if total.requires_grad:
                torch.autograd.backward(total, retain_graph=number < len(scalars) - 1)
                called = [layer_seen for layer_seen in seen.values() if layer_seen.inputs]
                if called and not any(layer_seen.gradients for layer_seen in called):
                    raise UnsupportedError("no gradient reaches a module", remedy="use the probe perturbation")
            take(number, {name: _norms(layer_seen, texts, output.device) for name, layer_seen in seen.items()})


def _check_layout(
    layers: Mapping[str, nn.Module], seen: Mapping[str, _Seen], texts: int, reverse: Callable[[], object]
) -> None:
    """Nothing, where every layer reads the same rows in reverse, text by text, when the texts stand in reverse.

    Whose a row is follows: what the first text has comes last then, so that it has as many rows as are taken for its
    own, and so on. Texts are told from tokens where there are as many of one as of the other.

    Raises:
        UnsupportedError: a layer does not.
    """
    calls = dict.fromkeys(layers, 0)

    def comparing(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if calls[name] == len(seen[name].inputs):
                raise _not_by_text(name)
            x, again = seen[name].inputs[calls[name]], _by_text(inputs[0], texts, name).flip(0)
            same = _SAME_IN_HALF if inputs[0].dtype in (torch.float16, torch.bfloat16) else _SAME
            if again.shape != x.shape or (again - x).norm() > same * x.norm():
                raise _not_by_text(name)
            calls[name] += 1

        return hook

    with torch.no_grad(), contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(comparing(name)).remove)
        reverse()


def _not_by_text(name: str) -> UnsupportedError:
    return UnsupportedError(
        "the rows of its input are not the texts",
        where=name,
        remedy="probe one text a batch (text.batch = 1), or leave this module out of the plan",
    )


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


def _watching(name: str, seen: _Seen, texts: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        call = len(seen.inputs)
        seen.inputs.append(_by_text(inputs[0].detach(), texts, name))
        seen.versions.append((inputs[0], inputs[0]._version))
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # a leaf must not be added to in place, as some blocks do

        def take(gradient: Tensor) -> None:
            seen.gradients[call] = _by_text(gradient, texts, name)

        output.register_hook(take)
        return output

    return hook


def _by_text(x: Float[Tensor, "rows *_ width"], texts: int, name: str) -> Float[Tensor, "{texts} _ width"]:
    """The rows of each text, where the texts stand one behind the other, each with as many rows or several axes."""
    if len(x) % texts:
        raise _not_by_text(name)
    return x.float().reshape(texts, x.shape[:-1].numel() // texts, x.shape[-1])


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
