"""Statistics without any text of the adapter: closed forms of its B and of the family's moments of z = A·x.

One run of the base over public text gives, per module, mean m and covariance C of z, once a family. For a Gaussian z

    E‖Bz‖² = tr(GC) + mᵀGm        Var‖Bz‖² = 2·tr((GC)²) + 4·mᵀGCGm        G = BᵀB

describe any adapter of the family, those to come included, at O(rank³) a module and with no model at hand. The score
needs mean and deviation of the norm itself: the squared norm is taken for Gamma distributed (`algebra.root_moments`).
A second-order delta method was as near on average for SmolLM2-135M's trained adapters, but its errors differ more
between adapters, which is what an argmax feels, and it fails where tails are heavy. docs/calibration.md has the errors
by kind of module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from treadle.algebra import root_moments, squared_norm_moments
from treadle.family.adapter import Adapter
from treadle.progress import Progress, silent
from treadle.routing.calibration.moments import LatentMoments
from treadle.routing.calibration.public import PublicText
from treadle.routing.calibration.statistics import Method, Statistics
from treadle.routing.calibration.text import Observer, read_text
from treadle.routing.factors import LayerFactors, latent


@dataclass(frozen=True)
class AnalyticCalibration(PublicText):
    """Every adapter's norms by closed form from one public text's moments of z; costs no privacy.

    Adding a member of the family later needs neither text nor model. A foreign adapter has latents of its own, whose
    moments the same run takes; one that is added later needs a run of its own.

    Reference: none; beyond arXiv 2509.18093.
    """

    @property
    def method(self) -> Method:
        """How the bank's files name it."""
        return "analytic"


def latent_moments(
    model: PreTrainedModel,
    layers: Mapping[str, LayerFactors],
    batches: Sequence[Mapping[str, Tensor]],
    ignored: Sequence[int],
    progress: Progress = silent,
) -> dict[str, list[LatentMoments]]:
    """Module → the moments of z of each of its groups, in their order, over the tokens that count.

    Args:
        model: the base model.
        layers: the factors, by module.
        batches: of `text_batches`.
        ignored: the token ids that do not count.
        progress: told of every batch.

    Raises:
        InputError: no token counts, or a layer never ran.
        UnsupportedError: a layer's inputs cannot be told apart by row and token.
    """
    found: dict[str, list[LatentMoments]] = {}

    def observer(factors: LayerFactors) -> Observer:
        def observe(x: Tensor, _: Tensor) -> None:
            new = [LatentMoments.of(latent(group, x)) for group in factors.groups]
            old = found.get(factors.module)
            found[factors.module] = new if old is None else [a.merge(b) for a, b in zip(old, new, strict=True)]

        return observe

    observers = {name: (factors.shape, observer(factors)) for name, factors in layers.items()}
    read_text(model, batches, ignored, observers, progress)
    return found


def closed_form(B: Tensor, moments: LatentMoments) -> tuple[float, float]:
    """Mean and standard deviation of ‖B z‖, B (out, rank), for a Gaussian z of these moments; see the module's head."""
    size = float(torch.linalg.matrix_norm(B.double()))
    if size == 0.0:
        return 0.0, 0.0
    # B of norm 1, so that no scale of B under- or overflows when it is raised to the fourth power.
    mean, std = root_moments(*squared_norm_moments(B.double() / size, moments.mean, moments.covariance))
    return size * mean, size * std


def completed(statistics: Statistics, layers: Mapping[str, LayerFactors], adapters: Sequence[Adapter]) -> Statistics:
    """The statistics with rows for the family's members that have none, by closed form; no model is needed.

    Every other row keeps its bits. Nothing changes unless the statistics are `analytic`; foreign adapters are left as
    they are, and so are members with a module that the family's moments do not cover.

    Args:
        statistics: of the bank, with unknown rows.
        layers: the bank's factors.
        adapters: the bank's, in order.
    """
    missing = [
        place
        for place, adapter in enumerate(adapters)
        if not statistics.B_digests[place]
        and adapter.family is not None
        and statistics.moments.keys() >= adapter.plan.modules.keys()
    ]
    if not missing:
        return statistics
    mean = {module: values.clone() for module, values in statistics.mean.items()}
    std = {module: values.clone() for module, values in statistics.std.items()}
    digests = list(statistics.B_digests)
    for place in missing:
        digests[place] = adapters[place].digest
        for module in adapters[place].plan.modules:
            row = closed_form(layers[module].folded_B(place), statistics.moments[module])
            mean[module][place], std[module][place] = row
    return replace(statistics, mean=mean, std=std, B_digests=tuple(digests))
