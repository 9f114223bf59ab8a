"""The ablation of AdaRank's probe that does what the published code does: noise is never taken back."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.family.plan import LayerShape
from treadle.progress import Progress, silent
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.noise import drawn, noisy, pointed, shaken_parameters
from treadle.ranks.outputs import Metric, Output, disagreement, memory_for, observer
from treadle.ranks.partial import PartialProbe
from treadle.ranks.perturbation import check_shaking
from treadle.ranks.probing import Probing, Recipe
from treadle.ranks.scores import ProbeScores

NAME = "perturbation-accumulating"


@dataclass(frozen=True)
class AccumulatingSettings:
    """How noise is piled up; the one copy is always compared with the pristine model, as the published code does.

    Attributes:
        trials: draws of noise a module.
        scale: noise as a multiple of the weight's own standard deviation.
        output: "last", "all" or "hidden".
        metric: "l1" or "l2".
        bias: whether a module's bias is shaken too, as in the published code.

    Raises:
        InputError: no trial, or a scale that is not positive.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    trials: int = 5
    scale: float = 1.0
    output: Output = "last"
    metric: Metric = "l1"
    bias: bool = True

    def __post_init__(self) -> None:
        check_shaking(self.trials, self.scale)


def perturbation_accumulating(
    model: PreTrainedModel,
    inputs: ProbeInputs,
    shapes: Mapping[str, LayerShape],
    *,
    settings: AccumulatingSettings | None = None,
    seed: int = 0,
    progress: Progress = silent,
    partial: PartialProbe | None = None,
) -> ProbeScores:
    """A score a module that is NOT its own: what the noise on it and on all modules and trials before it causes.

    An ablation, to see what the missing reset of the published code does. Nothing is taken back until the probe
    ends; then the model is the same as before, to the bit and to the tensor, also when it is interrupted. Scores hang
    on the order of `shapes`.

    Args and Raises: as for `perturbation`; `progress` is told of every module.

    Reference: arXiv 2408.09015, the published code.
    Deviations: noise is always relative to the pristine weight's deviation; whether the code's grows with the noise
        that has piled up is unknown to us.
    """
    chosen = settings or AccumulatingSettings()
    recipe = Recipe(NAME, asdict(chosen), chosen.trials, seed, independent=False)
    probing = Probing.begin(recipe, model, inputs, shapes, progress=progress, partial=partial)
    with torch.no_grad(), _restored(list(probing.layers.values()), bias=chosen.bias):
        _pile_up(probing, chosen, observer(model, chosen.output))
    return probing.scores()


def _pile_up(probing: Probing, chosen: AccumulatingSettings, observe: Callable[[Tensor], Tensor]) -> None:
    batches, recipe, layers = probing.inputs.batches, probing.recipe, probing.layers
    names = list(layers)
    left = any(probing.partial.missing(number, recipe.trials, names) for number in range(len(batches)))
    clean = [_outputs(observe, ids) for ids in batches] if left else []
    for index, (name, layer) in enumerate(layers.items()):
        parameters = shaken_parameters(layer, bias=chosen.bias)
        pristine = [parameter.data for parameter in parameters]
        for trial in range(recipe.trials):
            generator = drawn(recipe.seed, "piling up", name, trial)
            for parameter, own in zip(parameters, pristine, strict=True):
                # What was drawn before an interruption is drawn again: later values stand on it.
                parameter.data = parameter.data + (noisy(own, chosen.scale, generator) - own)
            for number, ids in enumerate(batches):
                if trial in probing.partial.missing(number, recipe.trials, [name]):
                    values = disagreement(_outputs(observe, ids), clean[number], chosen.metric).cpu()
                    probing.partial.add(number, trial, {name: values})
        probing.progress(f"probing {name}", index + 1, len(layers))


def _outputs(observe: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    with memory_for(ids):
        return observe(ids).flatten(1)


@contextlib.contextmanager
def _restored(layers: Sequence[nn.Module], *, bias: bool) -> Iterator[None]:
    """A block after which the layers have the tensors that they had, which nothing in it writes to."""
    parameters = [parameter for layer in layers for parameter in shaken_parameters(layer, bias=bias)]
    with pointed(parameters, [parameter.data for parameter in parameters]):
        yield
