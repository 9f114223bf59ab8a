"""Adding low-rank updates to a live model, and taking them away again without a trace.

A forward hook on each adapted layer adds `folded_B · (A · x)` to the layer's output. The module tree, the state
dict and the weights stay as they are, so whatever transformers can do with the model it still can.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from treadle.errors import MismatchError, UnsupportedError
from treadle.family.plan import LayerShape

Delta = Callable[[Tensor], Tensor | None]
"""What a hook adds: maps a layer's input (..., in_features) to (..., out_features), or to None to add nothing."""


def linear_shapes(model: nn.Module, kinds: Sequence[str] | None = None) -> dict[str, LayerShape]:
    """Every adaptable layer of the model (Linear and Conv1D, the head left out) with its shape, in model order.

    Args:
        model: any transformers model.
        kinds: last parts of module names to keep, for example ("q_proj", "v_proj"); None keeps all.

    Raises:
        MismatchError: a kind matches no layer.
    """
    head = _head_modules(model)
    shapes = {
        name: _shape_of(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in head
    }
    if kinds is None:
        return shapes
    for kind in kinds:
        if not any(_is_kind(name, kind) for name in shapes):
            found = sorted({name.rsplit(".", 1)[-1] for name in shapes})
            raise MismatchError(f"no layer is called {kind!r}", remedy=f"choose among {', '.join(found)}")
    return {name: shape for name, shape in shapes.items() if any(_is_kind(name, kind) for kind in kinds)}


def _is_kind(name: str, kind: str) -> bool:
    return name == kind or name.endswith(f".{kind}")


def _head_modules(model: nn.Module) -> set[nn.Module]:
    """The modules above the model's trunk: they belong to the base and are never adapted."""
    if not isinstance(model, PreTrainedModel):
        return set()
    trunk = set(model.base_model.modules())
    head = {module for module in model.modules() if module not in trunk}
    output = model.get_output_embeddings()
    return head | {output} if output is not None else head


def _shape_of(module: nn.Module) -> LayerShape:
    if isinstance(module, nn.Linear):
        return LayerShape(module.in_features, module.out_features)
    if isinstance(module, Conv1D):  # stores its weight as (in, out)
        return LayerShape(module.nx, module.nf)
    raise UnsupportedError(f"cannot adapt a {type(module).__name__}", remedy="name Linear or Conv1D layers")


def adapted_layers(model: nn.Module, shapes: Mapping[str, LayerShape]) -> dict[str, nn.Module]:
    """The named layers of the model, each checked against the expected shape.

    Raises:
        MismatchError: a layer is missing or of another shape.
        UnsupportedError: a named module is neither Linear nor Conv1D.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, shape in shapes.items():
        if name not in modules:
            raise MismatchError(
                f"the model has no module {name!r}", remedy="use the base that the adapter was made for"
            )
        actual = _shape_of(modules[name])
        if actual != shape:
            raise MismatchError(
                f"the model's layer is {actual.in_features}→{actual.out_features}, "
                f"the adapter's {shape.in_features}→{shape.out_features}",
                where=name,
                remedy="use the base that the adapter was made for",
            )
        found[name] = modules[name]
    return found


class Attachment:
    """Hooks that are in place until `remove` is called or the `with` block ends."""

    def __init__(self, layers: Mapping[str, nn.Module], deltas: Mapping[str, Delta]) -> None:
        self._handles = [
            layers[name].register_forward_hook(_hook_of(delta), with_kwargs=True) for name, delta in deltas.items()
        ]

    def remove(self) -> None:
        """Take every hook away; calling it twice is allowed."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _hook_of(delta: Delta) -> Callable[..., Tensor | None]:
    def hook(
        _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor] | Tensor, output: Tensor | None = None
    ) -> Tensor | None:
        if output is None or isinstance(named, Tensor):
            # torch passes no named inputs to a hook that comes or goes while another thread's pass is under way.
            return None
        added = delta(inputs[0] if inputs else next(iter(named.values())))
        return None if added is None else output + added.to(output.dtype)

    return hook


def inject(model: nn.Module, lora_A: Mapping[str, Tensor], folded_B: Mapping[str, Tensor]) -> Attachment:
    """Hooks that add `folded_B[m] · (lora_A[m] · x)` at every module m; B may require gradients.

    Args:
        model: the base model, left frozen or not as it is.
        lora_A: (rank, in_features) a module.
        folded_B: (out_features, rank) a module, scaling included.

    Raises:
        MismatchError: a module is missing in the model or has another shape.
    """
    shapes = {name: LayerShape(lora_A[name].shape[1], folded_B[name].shape[0]) for name in folded_B}
    layers = adapted_layers(model, shapes)
    deltas = {name: low_rank_delta(lora_A[name].to(_device(layers[name])), folded_B[name]) for name in folded_B}
    return Attachment(layers, deltas)


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def low_rank_delta(A: Float[Tensor, "rank inner"], B: Float[Tensor, "outer rank"]) -> Delta:
    """x ↦ B·(A·x), computed in the dtype of B whatever that of x is; an A in half precision is widened to it."""
    moved = B if isinstance(B, nn.Parameter) else B.to(A.device)
    wide = A if A.dtype == B.dtype else A.to(B.dtype)

    def delta(x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x.to(wide.dtype), wide), moved)

    return delta


@contextlib.contextmanager
def trainable(
    model: nn.Module, lora_A: Mapping[str, Tensor], shapes: Mapping[str, LayerShape]
) -> Iterator[dict[str, nn.Parameter]]:
    """Yield a zero-initialised trainable B a module, injected until the block ends.

    Within the block the model itself is frozen; afterwards each of its parameters asks for gradients as before.
    """
    zeros = {name: torch.zeros(shape.out_features, lora_A[name].shape[0]) for name, shape in shapes.items()}
    with trainable_factors(model, lora_A, zeros, train_A=(), train_B=zeros) as (_, lora_B):
        yield lora_B


@contextlib.contextmanager
def trainable_factors(
    model: nn.Module,
    lora_A: Mapping[str, Tensor],
    folded_B: Mapping[str, Tensor],
    *,
    train_A: Collection[str],
    train_B: Collection[str],
) -> Iterator[tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]]:
    """Yield trainable copies of the A and of the B that are named, injected with all others until the block ends.

    Within the block the model and the factors that are not named are frozen, and the tensors given never change;
    afterwards each parameter of the model asks for gradients as before. Where B is zero, A has no gradient.

    Args:
        model: the base model.
        lora_A: (rank, in_features) a module.
        folded_B: (out_features, rank) a module, scaling included.
        train_A: modules whose A is trained.
        train_B: modules whose B is trained.

    Raises:
        MismatchError: a module is missing in the model or has another shape.
    """
    device = next(model.parameters()).device

    def copies(factors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, nn.Parameter]:
        chosen = {name: factors[name] for name in factors if name in names}
        return {name: nn.Parameter(tensor.detach().to(device, copy=True)) for name, tensor in chosen.items()}

    moving_A, moving_B = copies(lora_A, train_A), copies(folded_B, train_B)
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        with inject(model, {**lora_A, **moving_A}, {**folded_B, **moving_B}):
            yield moving_A, moving_B
    finally:
        for parameter, requires_grad in asked.items():
            parameter.requires_grad_(requires_grad)
