"""AdaRank's probe with the noise of a LoRA: B·A at a given rank, instead of a full matrix."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from torch import nn
from transformers import PreTrainedModel

from treadle.errors import InputError
from treadle.family.plan import LayerShape
from treadle.progress import Progress, silent
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.noise import drawn, noisy_at_rank, shaken_parameters
from treadle.ranks.outputs import Metric, Output, observer
from treadle.ranks.partial import PartialProbe
from treadle.ranks.perturbation import check_shaking
from treadle.ranks.probing import Probing, Recipe
from treadle.ranks.scores import ProbeScores
from treadle.ranks.trials import Noisy, Shaking, shake_each

NAME = "perturbation-lowrank"


@dataclass(frozen=True)
class LowRankSettings:
    """How modules are shaken by noise of low rank; but for `rank` as in `PerturbationSettings`.

    Attributes:
        rank: of the noise; where it is not below a layer's smaller side, the noise has full rank there.
        trials: perturbations a module, averaged.
        scale: noise as a multiple of the weight's own standard deviation.
        compare: "copies" or "pristine".
        output: "last", "all" or "hidden".
        metric: "l1" or "l2".

    Raises:
        InputError: a rank or trials below 1, or a scale that is not positive.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rank: int = 8
    trials: int = 5
    scale: float = 1.0
    compare: Literal["copies", "pristine"] = "copies"
    output: Output = "last"
    metric: Metric = "l1"

    def __post_init__(self) -> None:
        check_shaking(self.trials, self.scale)
        if self.rank < 1:
            raise InputError(f"noise of rank {self.rank} moves nothing", remedy="use a rank of at least 1")


def perturbation_lowrank(
    model: PreTrainedModel,
    inputs: ProbeInputs,
    shapes: Mapping[str, LayerShape],
    *,
    settings: LowRankSettings | None = None,
    seed: int = 0,
    progress: Progress = silent,
    partial: PartialProbe | None = None,
) -> ProbeScores:
    """A score a module: the mean difference of outputs that noise of the form B·A on its weight alone causes.

    B and A are Gaussian and scaled so that every entry of B·A has the variance of full noise; the expected square of
    its Frobenius norm, rows·columns·(scale·std)², is the same too. What differs is that the noise has a direction.

    Args, Raises and the model's state afterwards: as for `perturbation`.

    Deviations: not in the paper, whose noise has full rank.
    """
    chosen = settings or LowRankSettings()
    recipe = Recipe(NAME, asdict(chosen), chosen.trials, seed)
    probing = Probing.begin(recipe, model, inputs, shapes, progress=progress, partial=partial)

    def shake(name: str, layer: nn.Module, trial: int, copy: int) -> Noisy:
        parameters = shaken_parameters(layer, bias=False)
        generator = drawn(seed, "low rank", name, trial, copy)
        return Noisy(parameters, [noisy_at_rank(parameters[0].data, chosen.scale, chosen.rank, generator)])

    shake_each(probing, observer(model, chosen.output), Shaking(shake, chosen.compare == "copies", chosen.metric))
    return probing.scores()
