"""The labelled peer of AdaRank's probe: how steep the loss of the right answers is at every module."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial as bound
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from treadle.errors import InputError, UnsupportedError
from treadle.family.plan import LayerShape
from treadle.progress import Progress, silent
from treadle.ranks.inputs import IGNORED, ProbeInputs
from treadle.ranks.outputs import check_called, memory_for, observer
from treadle.ranks.partial import PartialProbe
from treadle.ranks.probing import Probing, Recipe
from treadle.ranks.scores import ProbeScores
from treadle.ranks.weight_gradients import squared_norms

NAME = "gradient"


@dataclass(frozen=True)
class GradientSettings:
    """Nothing to choose: every text is answered once, and nothing is drawn."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


def gradient(
    model: PreTrainedModel,
    inputs: ProbeInputs,
    shapes: Mapping[str, LayerShape],
    *,
    settings: GradientSettings | None = None,
    seed: int = 0,
    progress: Progress = silent,
    partial: PartialProbe | None = None,
) -> ProbeScores:
    """A score a module: the mean over texts of ‖∂loss/∂W‖²_F, the trace of the module's empirical Fisher matrix.

    A text's loss is the sum of the cross-entropies of its answer's tokens, or that of its class. One backward pass a
    batch scores every module; no weight is touched.

    Args:
        model: in eval mode; its parameters may be frozen.
        inputs: texts with labels, as `ProbeInputs.of_examples` makes them.
        shapes: the modules to probe.
        settings: there is nothing to set.
        seed: recorded; nothing is drawn.
        progress: told of every batch.
        partial: what an interrupted probe has left, to go on from.

    Raises:
        InputError: there are no labels, they do not fit the model, or as for `jacobian`.
        UnsupportedError: an encoder-decoder, or as for `jacobian`.
    """
    if inputs.labels is None:
        raise InputError("the gradient probe needs labels", remedy="give examples with answers, or use another probe")
    if model.config.is_encoder_decoder:
        raise UnsupportedError("the gradient probe knows no encoder-decoders", remedy="use another probe")
    recipe = Recipe(NAME, asdict(settings or GradientSettings()), 1, seed)
    probing = Probing.begin(recipe, model, inputs, shapes, progress=progress, partial=partial)
    observe = observer(model, "all")
    if any(probing.partial.missing(number, 1, list(shapes)) for number in range(len(inputs.batches))):
        check_called(probing.layers, inputs.batches, observe)
    for number, (ids, labels) in enumerate(zip(inputs.batches, inputs.labels, strict=True)):
        if probing.partial.missing(number, 1, list(shapes)):

            def take(_: int, norms: Mapping[str, Tensor], number: int = number) -> None:
                probing.partial.add(number, 0, norms)

            scalars = [bound(_summed_loss, labels.to(model.device))]
            with memory_for(ids):
                squared_norms(model, probing.layers, ids=ids, run=observe, scalars=scalars, take=take)
        progress("probing all modules", number + 1, len(inputs.batches))
    return probing.scores()


def _summed_loss(
    labels: Int[Tensor, "texts *tokens"], logits: Float[Tensor, "texts *positions classes"]
) -> Float[Tensor, ""]:
    """The cross-entropy of everything that is answered, summed."""
    if labels.ndim != logits.ndim - 1:
        wanted = "a class a text" if logits.ndim == 2 else "a label a token"
        raise InputError(f"the labels do not fit the model, which wants {wanted}", remedy="make them for this model")
    if labels.ndim == 2:  # a token is answered at the position before it
        labels, logits = labels[:, 1:], logits[:, :-1]
    answered = labels[labels != IGNORED]
    if not len(answered) or not 0 <= int(answered.min()) <= int(answered.max()) < logits.shape[-1]:
        raise InputError(f"a label is outside 0..{logits.shape[-1] - 1}", remedy="label what the model can answer")
    return cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
