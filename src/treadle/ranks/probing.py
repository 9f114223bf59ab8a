"""What every probe begins and ends with: layers that may be probed, values to measure, scores."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from treadle.family.plan import LayerShape
from treadle.progress import Progress
from treadle.ranks.inputs import ProbeInputs
from treadle.ranks.outputs import probed_layers
from treadle.ranks.partial import PartialProbe, inputs_sha256, model_sha256
from treadle.ranks.scores import ModuleScore, ProbeScores, Value

COUNTS = ("trials", "projections")
"""What the settings of probes call the number of their trials: more of them are surer, and not of another kind."""


@dataclass(frozen=True)
class Recipe:
    """What is done: the probe's name, its settings, how many trials they ask for, and the seed of its draws.

    `independent`: a trial's values are the same however many there are.
    """

    probe: str
    settings: Mapping[str, Value]
    trials: int
    seed: int
    independent: bool = True

    def facts(self) -> dict[str, object]:
        """What decides a value: where trials are independent, more of them add values and change none."""
        added = COUNTS if self.independent else ()
        kept = {key: value for key, value in self.settings.items() if key not in added}
        return {"probe": self.probe, "settings": kept, "seed": self.seed}


@dataclass(frozen=True)
class Probing:
    """A probe under way."""

    recipe: Recipe
    model: PreTrainedModel
    inputs: ProbeInputs
    shapes: Mapping[str, LayerShape]
    layers: Mapping[str, nn.Module]
    partial: PartialProbe
    progress: Progress

    @staticmethod
    def begin(
        recipe: Recipe,
        model: PreTrainedModel,
        inputs: ProbeInputs,
        shapes: Mapping[str, LayerShape],
        *,
        progress: Progress,
        partial: PartialProbe | None,
    ) -> "Probing":
        """The probe, its layers checked and what was measured earlier taken up.

        Raises:
            InputError: the model is in training mode, or no layer is named.
            MismatchError: the model lacks a layer, or what was measured earlier is of another probe.
            UnsupportedError: a weight is quantised or shared.
        """
        layers = probed_layers(model, shapes)
        chosen = partial or PartialProbe()
        # Reading every weight takes a second or more, which only a file outliving this process is worth.
        model_fact = id(model) if chosen.path is None else model_sha256(model)
        facts = {"model": model_fact, "texts": inputs_sha256(inputs), "modules": list(shapes)}
        chosen.begin(recipe.facts() | facts)
        return Probing(recipe, model, inputs, shapes, layers, chosen, progress)

    def scores(self, *, batches: int | None = None) -> ProbeScores:
        """The scores of everything that was measured, in as many batches as the inputs have or as are said."""
        trials, batches = self.recipe.trials, len(self.inputs.batches) if batches is None else batches
        modules = {
            name: ModuleScore(shape, self.partial.values(name, trials=trials, batches=batches))
            for name, shape in self.shapes.items()
        }
        recipe = self.recipe
        return ProbeScores(modules, recipe.probe, recipe.settings, recipe.seed, self.inputs.text_sha256)
