"""AdaRank's probe: how much the outputs move when one module's weights are shaken."""

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.errors import InputError, UnsupportedError
from treadle.family.injection import adapted_layers
from treadle.family.plan import LayerShape
from treadle.progress import Progress, silent
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.prefix import Recording, record, skipping
from treadle.ranks.scores import ModuleScore, ProbeScores

Observe = Callable[[Tensor], Tensor]
"""Maps token ids (texts, tokens) to the outputs that are compared, (texts, …)."""


@dataclass(frozen=True)
class PerturbationSettings:
    """How modules are shaken and what is compared; the defaults are the paper's.

    Attributes:
        trials: perturbations a module, averaged.
        scale: noise as a multiple of the weight's own standard deviation.
        compare: "copies", two independently perturbed copies (the paper), or "pristine", one copy against the
            model as it is (the official code): half the runs, scores about √2 smaller.
        output: "last", the logits at the last position; "all", those at every position; "hidden", the last hidden
            state at every position.
        bias: whether the module's bias is shaken too, by its own deviation. The official code does so on BERT; a
            LoRA cannot move a bias and most causal models have none, so the default is no.

    Raises:
        InputError: no trial, or a scale that is not positive.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    trials: int = 5
    scale: float = 1.0
    compare: Literal["copies", "pristine"] = "copies"
    output: Literal["last", "all", "hidden"] = "last"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise InputError(f"{self.trials} trials probe nothing", remedy="use at least 1 trial")
        if not 0 < self.scale < float("inf"):
            raise InputError(f"a noise scale of {self.scale} is not positive", remedy="use a scale > 0")


def perturbation(
    model: PreTrainedModel,
    inputs: ProbeInputs,
    shapes: Mapping[str, LayerShape],
    *,
    settings: PerturbationSettings | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> ProbeScores:
    """A score a module: the mean absolute difference of outputs that Gaussian noise on its weight alone causes.

    The model is the same afterwards, to the bit and to the tensor, also when the probe is interrupted. The noise is
    a function of (seed, module, trial, copy), so neither the order nor the choice of modules changes a score.

    Args:
        model: in eval mode.
        inputs: the probe texts.
        shapes: the modules to probe, as `linear_shapes` names them.
        settings: by default the paper's.
        seed: any integer.
        progress: told of every module in every batch.

    Raises:
        MismatchError: the model lacks a module or has it in another shape.
        UnsupportedError: a weight is quantised or shared, or the model lacks the output that is asked for.
        InputError: the model is in training mode, or its outputs are not finite.

    Reference: arXiv 2408.09015, Algorithm 1.
    Deviations: each module is reset before the next (the published code leaves the noise in place); with a causal
        model the default output is the logits at the last position where the code reads BERT's pooled vector.
    """
    chosen = settings or PerturbationSettings()
    if model.training:
        raise InputError("the model is in training mode, where dropout shakes every output", remedy="call model.eval()")
    layers = adapted_layers(model, shapes)
    _check_weights(model, layers)
    observe = _observer(model, chosen.output)
    values: dict[str, list[Tensor]] = {name: [] for name in layers}
    with torch.no_grad():
        for number, ids in enumerate(inputs.batches):
            run = partial(observe, ids.to(model.device))
            recording = record(model, layers, run)
            for index, (name, layer) in enumerate(layers.items()):
                with skipping(recording, name):
                    values[name].append(_disagreements(name, layer, recording, run, chosen, seed))
                progress(f"probing {name}", number * len(layers) + index + 1, len(inputs.batches) * len(layers))
    scores = {name: _score(name, shapes[name], torch.cat(parts, dim=1)) for name, parts in values.items()}
    return ProbeScores(scores, "perturbation", asdict(chosen), seed, inputs.text_sha256)


def _disagreements(
    name: str,
    layer: nn.Module,
    recording: Recording,
    run: Callable[[], Tensor],
    settings: PerturbationSettings,
    seed: int,
) -> Float[Tensor, "trials texts"]:
    """How far outputs lie apart when this layer alone is shaken."""

    def shaken(trial: int, copy: int) -> Tensor:
        with perturbed(layer, _generator(seed, name, trial, copy), scale=settings.scale, bias=settings.bias):
            return run()

    rows: list[Tensor] = []
    for trial in range(settings.trials):
        other = shaken(trial, 1) if settings.compare == "copies" else recording.output
        rows.append(mean_absolute_difference(shaken(trial, 0), other))
    return torch.stack(rows).cpu()


def mean_absolute_difference(
    a: Float[Tensor, "texts *rest"], b: Float[Tensor, "texts *rest"]
) -> Float[Tensor, " texts"]:
    """The l1 disagreement of every text: mean over all that `rest` holds, in float32 at least."""
    return (a.float() - b.float()).abs().flatten(1).mean(dim=1)


def _score(name: str, shape: LayerShape, values: Float[Tensor, "trials texts"]) -> ModuleScore:
    if not torch.isfinite(values).all():
        raise InputError("the perturbed outputs hold NaN or Inf", where=name, remedy="use float32 or less noise")
    return ModuleScore(shape, tuple(tuple(float(value) for value in row) for row in values))


def _generator(seed: int, name: str, trial: int, copy: int) -> torch.Generator:
    """A generator of its own for this draw; on the CPU, so that it is the same whatever device the model is on."""
    digest = hashlib.sha256(f"{seed}/{name}/{trial}/{copy}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextlib.contextmanager
def perturbed(
    layer: nn.Module, generator: torch.Generator, *, scale: float = 1.0, bias: bool = False
) -> Iterator[None]:
    """Until the block ends, the layer's weight W is W + N(0, (scale·std(W))²); with `bias`, its bias likewise.

    The stored tensors are never written: the parameter points to a noisy copy and then to its own tensor again.
    """
    parameters = [layer.get_parameter("weight")]
    if bias and getattr(layer, "bias", None) is not None:
        parameters.append(layer.get_parameter("bias"))
    stored = [parameter.data for parameter in parameters]
    try:
        for parameter, tensor in zip(parameters, stored, strict=True):
            noise = torch.randn(tensor.shape, generator=generator)
            deviation = scale * tensor.float().std(correction=0)
            parameter.data = tensor + (noise.to(tensor.device) * deviation).to(tensor.dtype)
        yield
    finally:
        for parameter, tensor in zip(parameters, stored, strict=True):
            parameter.data = tensor


def _check_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse weights that cannot be shaken, or not alone."""
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
                f"its weight is shared ({' = '.join(sharing)}), so it cannot be shaken alone",
                where=name,
                remedy="leave this module out of the plan",
            )


def _observer(model: PreTrainedModel, output: str) -> Observe:
    """The function from token ids to what is compared, asking the model for no more than that."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, int | bool] = {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    if output == "last" and "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1

    def observe(ids: Int[Tensor, "texts tokens"]) -> Tensor:
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            tensors["decoder_input_ids"] = _shifted(ids, model)
        if output == "hidden":
            return _field(model.base_model(**tensors), "last_hidden_state", "last or all")
        logits = _field(model(**tensors, **options), "logits", "hidden")
        return logits[:, -1] if output == "last" and logits.ndim == 3 else logits

    return observe


def _field(result: object, name: str, instead: str) -> Tensor:
    value = getattr(result, name, None)
    if not isinstance(value, Tensor):
        raise UnsupportedError(f"the model returns no {name}", remedy=f"probe with output = {instead}")
    return value


def _shifted(ids: Int[Tensor, "texts tokens"], model: PreTrainedModel) -> Int[Tensor, "texts tokens"]:
    """The ids one to the right, as a decoder is fed, so that it reads the probe text as well."""
    start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
    return torch.cat([start, ids[:, :-1]], dim=1)
