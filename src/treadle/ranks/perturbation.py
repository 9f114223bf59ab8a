"""AdaRank's probe: how much the outputs move when one module's weights are shaken."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from torch import nn
from transformers import PreTrainedModel

from treadle.errors import InputError
from treadle.family.plan import LayerShape
from treadle.progress import Progress, silent
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.noise import drawn, noisy, shaken_parameters
from treadle.ranks.outputs import Metric, Output, observer
from treadle.ranks.partial import PartialProbe
from treadle.ranks.probing import Probing, Recipe
from treadle.ranks.scores import ProbeScores
from treadle.ranks.trials import Noisy, Shaking, shake_each

NAME = "perturbation"


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
        metric: "l1", the mean absolute difference (the paper), or "l2", the root of the mean square difference.
        bias: whether the module's bias is shaken too, by its own deviation. The official code does so on BERT; a
            LoRA cannot move a bias and most causal models have none, so the default is no.

    Raises:
        InputError: no trial, or a scale that is not positive.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    trials: int = 5
    scale: float = 1.0
    compare: Literal["copies", "pristine"] = "copies"
    output: Output = "last"
    metric: Metric = "l1"
    bias: bool = False

    def __post_init__(self) -> None:
        check_shaking(self.trials, self.scale)


def check_shaking(trials: int, scale: float) -> None:
    """Nothing, where that many trials with noise of that scale are a probe.

    Raises:
        InputError: they are none.
    """
    if trials < 1:
        raise InputError(f"{trials} trials probe nothing", remedy="use at least 1 trial")
    if not 0 < scale < float("inf"):
        raise InputError(f"a noise scale of {scale} is not positive", remedy="use a scale > 0")


def perturbation(
    model: PreTrainedModel,
    inputs: ProbeInputs,
    shapes: Mapping[str, LayerShape],
    *,
    settings: PerturbationSettings | None = None,
    seed: int = 0,
    progress: Progress = silent,
    partial: PartialProbe | None = None,
) -> ProbeScores:
    """A score a module: the mean difference of outputs that Gaussian noise on its weight alone causes.

    The model is the same afterwards, to the bit and to the tensor, also when the probe is interrupted. The noise is
    a function of (seed, module, trial, copy), so neither the order nor the choice of modules changes a score.

    Args:
        model: in eval mode.
        inputs: the probe texts.
        shapes: the modules to probe, as `linear_shapes` names them.
        settings: by default the paper's.
        seed: any integer.
        progress: told of every module in every batch.
        partial: what an interrupted probe has left, to go on from.

    Raises:
        MismatchError: the model lacks a module or has it in another shape; `partial` is of another probe.
        UnsupportedError: a weight is quantised or shared, or the model lacks the output that is asked for.
        InputError: the model is in training mode, or its outputs are not finite.
        UnavailableError: memory does not suffice.

    Reference: arXiv 2408.09015, Algorithm 1.
    Deviations: each module is reset before the next (the published code leaves the noise in place); with a causal
        model the default output is the logits at the last position where the code reads BERT's pooled vector.
    """
    chosen = settings or PerturbationSettings()
    recipe = Recipe(NAME, asdict(chosen), chosen.trials, seed)
    probing = Probing.begin(recipe, model, inputs, shapes, progress=progress, partial=partial)

    def shake(name: str, layer: nn.Module, trial: int, copy: int) -> Noisy:
        parameters, generator = shaken_parameters(layer, bias=chosen.bias), drawn(seed, name, trial, copy)
        return Noisy(parameters, [noisy(parameter.data, chosen.scale, generator) for parameter in parameters])

    shake_each(probing, observer(model, chosen.output), Shaking(shake, chosen.compare == "copies", chosen.metric))
    return probing.scores()
