"""The probes by name, and one way to call any of them.

The settings say which probe is meant: `PROBES[name]()` are the default ones of the probe of that name.
"""

from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from treadle.family.plan import LayerShape
from treadle.progress import Progress, silent
from treadle.ranks import accumulating, eva, gradient, jacobian, lowrank, perturbation
from treadle.ranks.accumulating import AccumulatingSettings, perturbation_accumulating
from treadle.ranks.eva import EvaSettings
from treadle.ranks.gradient import GradientSettings
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.jacobian import JacobianSettings
from treadle.ranks.lowrank import LowRankSettings, perturbation_lowrank
from treadle.ranks.partial import PartialProbe
from treadle.ranks.perturbation import PerturbationSettings
from treadle.ranks.scores import ProbeScores

ProbeSettings = (
    PerturbationSettings | LowRankSettings | AccumulatingSettings | JacobianSettings | GradientSettings | EvaSettings
)

PROBES: Mapping[str, Callable[[], ProbeSettings]] = {
    perturbation.NAME: PerturbationSettings,
    lowrank.NAME: LowRankSettings,
    accumulating.NAME: AccumulatingSettings,
    jacobian.NAME: JacobianSettings,
    gradient.NAME: GradientSettings,
    eva.NAME: EvaSettings,
}


def probe_scores(
    model: PreTrainedModel,
    inputs: ProbeInputs,
    shapes: Mapping[str, LayerShape],
    *,
    settings: ProbeSettings,
    seed: int = 0,
    progress: Progress = silent,
    partial: PartialProbe | None = None,
) -> ProbeScores:
    """The scores of these modules by the probe whose settings are given; see the probe's own function for the rest.

    Whatever the probe, the model is the same afterwards, to the bit and to the tensor, and scores are finite and not
    negative, one value a trial and text.
    """
    match settings:
        case PerturbationSettings():
            return perturbation.perturbation(
                model, inputs, shapes, settings=settings, seed=seed, progress=progress, partial=partial
            )
        case LowRankSettings():
            return perturbation_lowrank(
                model, inputs, shapes, settings=settings, seed=seed, progress=progress, partial=partial
            )
        case AccumulatingSettings():
            return perturbation_accumulating(
                model, inputs, shapes, settings=settings, seed=seed, progress=progress, partial=partial
            )
        case JacobianSettings():
            return jacobian.jacobian(
                model, inputs, shapes, settings=settings, seed=seed, progress=progress, partial=partial
            )
        case GradientSettings():
            return gradient.gradient(
                model, inputs, shapes, settings=settings, seed=seed, progress=progress, partial=partial
            )
        case EvaSettings():
            return eva.eva(model, inputs, shapes, settings=settings, seed=seed, progress=progress, partial=partial)
