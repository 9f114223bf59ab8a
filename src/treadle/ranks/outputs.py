"""What probes compare, and which layers they may touch."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.errors import InputError, UnavailableError, UnsupportedError
from treadle.family.injection import adapted_layers
from treadle.family.plan import LayerShape

Output = Literal["last", "all", "hidden"]
"""The logits at the last position, those at every position, or the last hidden state at every position."""

Metric = Literal["l1", "l2"]
"""The mean absolute difference of a text's outputs, or the root of their mean square difference."""

Observe = Callable[[Tensor], Tensor]
"""Maps token ids (texts, tokens) to the outputs that are compared, (texts, …)."""


def probed_layers(model: PreTrainedModel, shapes: Mapping[str, LayerShape]) -> dict[str, nn.Module]:
    """The layers to probe, by name.

    Raises:
        InputError: the model is in training mode, or no layer is named.
        MismatchError: the model lacks a layer or has it in another shape.
        UnsupportedError: a weight is quantised, or shared with another layer.
    """
    if model.training:
        raise InputError("the model is in training mode, where dropout shakes every output", remedy="call model.eval()")
    if not shapes:
        raise InputError("there is no module to probe", remedy="name modules that the model has")
    layers = adapted_layers(model, shapes)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    for name, layer in layers.items():
        weight = getattr(layer, "weight", None)
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise UnsupportedError("its weight is quantised", where=name, remedy="probe the model unquantised")
        sharing = owners[weight.data_ptr()]
        if len(sharing) > 1:
            raise UnsupportedError(
                f"its weight is shared ({' = '.join(sharing)}), so it cannot be probed alone",
                where=name,
                remedy="leave this module out of the plan",
            )
    return layers


def check_called(
    layers: Mapping[str, nn.Module], batches: Iterable[Int[Tensor, "_texts _tokens"]], run: Callable[[Tensor], object]
) -> None:
    """Nothing, where `run` calls every layer in some batch; batches are run until that is so.

    A model may read a layer's weight without calling the layer, as Mamba does with its `dt_proj`: hooks do not see it,
    and a LoRA on it does nothing. An expert that is idle in one batch is called in another.

    Raises:
        UnsupportedError: a layer is never called; names it.
        UnavailableError: memory does not suffice.
    """
    idle = dict(layers)

    def noting(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            idle.pop(name, None)

        return hook

    with torch.no_grad(), contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(noting(name)).remove)
        for ids in batches:
            if idle:
                with memory_for(ids):
                    run(ids)
    for name in idle:
        raise UnsupportedError("it is never called", where=name, remedy="leave this module out of the plan")


def trunk_runner(model: PreTrainedModel) -> Callable[[Tensor], object]:
    """The function that runs token ids through all below the model's head."""
    return lambda ids: model.base_model(**token_tensors(model, ids))


def observer(model: PreTrainedModel, output: Output) -> Observe:
    """The function from token ids to what is compared, asking the model for no more than that."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, int | bool] = {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    if output == "last" and "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1

    def observe(ids: Int[Tensor, "texts tokens"]) -> Tensor:
        tensors = token_tensors(model, ids)
        if output == "hidden":
            return _field(model.base_model(**tensors), "last_hidden_state", "last or all")
        try:
            result = model(**tensors, **options)
        except ValueError as error:
            if "padding token" not in str(error):
                raise
            raise InputError(
                "the classifier looks for its padding token and has none",
                remedy="set pad_token_id in the base's config.json, or probe with output = hidden",
            ) from error
        logits = _field(result, "logits", "hidden")
        return logits[:, -1] if output == "last" and logits.ndim == 3 else logits

    return observe


def token_tensors(model: PreTrainedModel, ids: Int[Tensor, "texts tokens"]) -> dict[str, Tensor]:
    """What the model takes for these texts, none of which is padded; a decoder reads them as well."""
    placed = ids.to(model.device)
    tensors = {"input_ids": placed, "attention_mask": torch.ones_like(placed)}
    if model.config.is_encoder_decoder:
        tensors["decoder_input_ids"] = _shifted(placed, model)
    return tensors


def _field(result: object, name: str, instead: str) -> Tensor:
    value = getattr(result, name, None)
    if not isinstance(value, Tensor):
        raise UnsupportedError(f"the model returns no {name}", remedy=f"probe with output = {instead}")
    return value


def _shifted(ids: Int[Tensor, "texts tokens"], model: PreTrainedModel) -> Int[Tensor, "texts tokens"]:
    """The ids one to the right, as a decoder is fed, so that it reads the probe text as well."""
    start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
    return torch.cat([start, ids[:, :-1]], dim=1)


def disagreement(
    a: Float[Tensor, "*lead texts rest"], b: Float[Tensor, "*lead texts rest"], metric: Metric
) -> Float[Tensor, "*lead texts"]:
    """How far the outputs of every text lie apart by the metric, in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    difference = a.to(wide) - b.to(wide)
    return difference.abs().mean(dim=-1) if metric == "l1" else difference.square().mean(dim=-1).sqrt()


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is how torch or Python says that memory has run out; torch has no class for it on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def memory_for(ids: Int[Tensor, "texts tokens"]) -> Iterator[None]:
    """A block that runs this batch.

    Raises:
        UnavailableError: memory runs out in it; says what to do about that.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        texts, tokens = ids.shape
        raise UnavailableError(
            f"memory ran out on a batch of {texts} texts of {tokens} tokens",
            remedy="use smaller batches (text.batch) or fewer tokens (text.tokens)",
        ) from error
