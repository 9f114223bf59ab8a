"""Every module's score at once: the norm of the output's Jacobian, by random projections, a backward pass each."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial as bound
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from treadle.errors import InputError
from treadle.family.plan import LayerShape
from treadle.progress import Progress, silent
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.noise import deviation, drawn
from treadle.ranks.outputs import Observe, Output, check_called, memory_for, observer
from treadle.ranks.partial import PartialProbe
from treadle.ranks.probing import Probing, Recipe
from treadle.ranks.scores import ProbeScores
from treadle.ranks.weight_gradients import squared_norms

NAME = "jacobian"


@dataclass(frozen=True)
class JacobianSettings:
    """What is projected.

    Attributes:
        projections: random directions of the output a text; each costs one backward pass.
        output: "last", "all" or "hidden", as in `PerturbationSettings`.

    Raises:
        InputError: no projection.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    projections: int = 5
    output: Output = "last"

    def __post_init__(self) -> None:
        if self.projections < 1:
            raise InputError(f"{self.projections} projections probe nothing", remedy="use at least 1 projection")


def jacobian(
    model: PreTrainedModel,
    inputs: ProbeInputs,
    shapes: Mapping[str, LayerShape],
    *,
    settings: JacobianSettings | None = None,
    seed: int = 0,
    progress: Progress = silent,
    partial: PartialProbe | None = None,
) -> ProbeScores:
    """A score a module: by how much its weight's own deviation σ of noise would move the outputs, were they linear.

    A value is σ·‖J_mᵀv‖/√n for one text, n its number of outputs and v ~ N(0, 1)ⁿ; J_mᵀv is the gradient of v·y at
    the weight. Its square has the expectation σ²‖J_m‖²_F/n, which is the expected mean square of the change J_m·δ that
    noise δ ~ N(0, σ²) causes, and σ·‖J_mᵀv‖ is distributed as ‖J_m·δ‖ is: both are quadratic forms with the
    eigenvalues of J_mJ_mᵀ. So scores compare, without a factor, with those of `perturbation` under
    metric = "l2", compare = "pristine" and little noise; √2 is missing to two copies, and √(2/π) to l1 where
    the change is Gaussian.

    No weight is touched. The projections are a function of (seed, batch, number), so neither the order nor the choice
    of modules changes a score.

    Args:
        model: in eval mode; its parameters may be frozen.
        inputs: the probe texts.
        shapes: the modules to probe, as `linear_shapes` names them.
        settings: by default 5 projections of the logits at the last position.
        seed: any integer.
        progress: told of every projection of every batch.
        partial: what an interrupted probe has left, to go on from.

    Raises:
        MismatchError: the model lacks a module or has it in another shape; `partial` is of another probe.
        UnsupportedError: a weight is quantised or shared, a module is never called or its input is not laid out by
            texts, or the model lacks the output that is asked for.
        InputError: the model is in training mode, or its outputs are not finite.
        UnavailableError: memory does not suffice.

    Deviations: not in arXiv 2408.09015, whose probe it approximates to the first order of the noise.
    """
    chosen = settings or JacobianSettings()
    recipe = Recipe(NAME, asdict(chosen), chosen.projections, seed)
    probing = Probing.begin(recipe, model, inputs, shapes, progress=progress, partial=partial)
    observe = observer(model, chosen.output)
    deviations = {name: deviation(layer.get_parameter("weight")) for name, layer in probing.layers.items()}
    places = range(len(inputs.batches))
    missing = {number: probing.partial.missing(number, chosen.projections, list(shapes)) for number in places}
    if any(missing.values()):
        check_called(probing.layers, inputs.batches, observe)
    for number in filter(missing.get, places):
        with memory_for(inputs.batches[number]):
            _measure(probing, number, missing[number], observe, deviations)
    return probing.scores()


def _measure(
    probing: Probing, number: int, missing: list[int], observe: Observe, deviations: Mapping[str, Tensor]
) -> None:
    """One batch: a forward pass, and a backward pass for each projection that is missing."""
    ids, sizes = probing.inputs.batches[number], list[int]()

    def run(ids: Tensor) -> Tensor:
        output = observe(ids)
        sizes.append(output[0].numel())
        return output

    def take(turn: int, norms: Mapping[str, Tensor]) -> None:
        values = {name: deviations[name] * (square / sizes[0]).sqrt() for name, square in norms.items()}
        probing.partial.add(number, missing[turn], values)
        done = number * probing.recipe.trials + missing[turn] + 1
        probing.progress("probing all modules", done, len(probing.inputs.batches) * probing.recipe.trials)

    scalars = [bound(_projected, (probing.recipe.seed, "projection", number, place)) for place in missing]
    squared_norms(probing.model, probing.layers, ids=ids, run=run, scalars=scalars, take=take)


def _projected(key: tuple[str | int, ...], output: Float[Tensor, "texts *rest"]) -> Float[Tensor, ""]:
    """Σ v·y over the texts, v drawn by the key."""
    v = torch.randn(output.shape, generator=drawn(*key))
    return (v.to(output.device) * output.float()).sum()
