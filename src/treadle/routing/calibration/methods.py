"""The five calibrations by name, and the one function that carries any of them out."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.data.public_text import as_prompts
from treadle.family.adapter import Adapter
from treadle.progress import Progress, silent
from treadle.routing.blocks import prompt_layers
from treadle.routing.calibration.analytic import AnalyticCalibration, closed_form, latent_moments
from treadle.routing.calibration.moments import LatentMoments
from treadle.routing.calibration.norms import read_norms
from treadle.routing.calibration.own import OwnCalibration
from treadle.routing.calibration.private import PrivateCalibration
from treadle.routing.calibration.prompts import PromptStatistics, prompt_statistics
from treadle.routing.calibration.public import PublicCalibration, PublicText
from treadle.routing.calibration.statistics import Statistics
from treadle.routing.calibration.text import ignored_tokens, longest_passage, text_batches, texts_digest
from treadle.routing.calibration.traffic import TrafficCalibration, read_traffic
from treadle.routing.factors import LayerFactors

Calibration = OwnCalibration | PublicCalibration | AnalyticCalibration | TrafficCalibration | PrivateCalibration


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, LayerFactors],
    adapters: Sequence[Adapter],
    calibration: Calibration,
    *,
    progress: Progress = silent,
) -> Statistics:
    """Run the base over the calibration's texts and return the statistics of the adapters at every layer.

    The base acts alone and every adapter's statistics are computed apart, in float64: they are, bit for bit, the same
    whoever else is in the bank. Neither padding nor special tokens count.

    Args:
        model: the base model; its dropout is off while it reads.
        tokenizer: the base's.
        layers: the factors, by module.
        adapters: the bank's, in order.
        calibration: which texts, and how.
        progress: told of every batch.

    Raises:
        InputError: there is no text or too little traffic, it has no token that counts, or a layer never ran on it.
        UnsupportedError: a layer's inputs cannot be told apart by row and token.
    """
    if isinstance(calibration, TrafficCalibration):
        seen = read_traffic(model, tokenizer, layers, adapters, calibration.prompts, calibration.tenant, progress)
        enough = (calibration.minimum_prompts, calibration.minimum_tokens)
        return seen.statistics(adapters, minimum_prompts=enough[0], minimum_tokens=enough[1])
    ignored = ignored_tokens(tokenizer)
    if isinstance(calibration, PrivateCalibration):
        return calibration.statistics(layers, adapters, ignored)
    mean = {module: torch.full((len(adapters),), torch.nan, dtype=torch.float64) for module in layers}
    std = {module: torch.full((len(adapters),), torch.nan, dtype=torch.float64) for module in layers}
    moments: dict[str, LatentMoments] = {}
    prompts: PromptStatistics | None = None
    tokens = 0
    for texts, mine in _shared_texts(calibration, adapters).items():
        batches = text_batches(tokenizer, texts, longest=longest_passage(model))
        if isinstance(calibration, AnalyticCalibration):
            latents = latent_moments(model, layers, batches, ignored, progress)
            rows, counts = _closed_forms(layers, mine, latents), [groups[0].count for groups in latents.values()]
            moments = _of_family(layers, adapters, latents)
        else:
            found = read_norms(model, layers, mine, batches, ignored, progress)
            rows = {key: (moment.mean.item(), moment.std.item()) for key, moment in found.moments.items()}
            counts = [moment.count for moment in found.moments.values()]
        for (module, place), row in rows.items():
            mean[module][place], std[module][place] = row
        tokens = max(tokens, *counts)
    if isinstance(calibration, PublicCalibration):
        framed = text_batches(tokenizer, as_prompts(calibration.texts), longest=longest_passage(model))
        means = read_norms(model, layers, range(len(adapters)), framed, ignored, progress, by_passage=True).passages
        prompts = prompt_statistics(means, mean, std, prompt_layers(model, layers))
    return Statistics(
        mean,
        std,
        calibration.method,
        calibration.source,
        "" if isinstance(calibration, OwnCalibration) else texts_digest(calibration.texts),
        tokens,
        ignored,
        tuple(adapter.digest for adapter in adapters),
        moments,
        prompts,
    )


def _shared_texts(
    calibration: OwnCalibration | PublicText,
    adapters: Sequence[Adapter],
) -> dict[tuple[str, ...], list[int]]:
    """Passages → the places of the adapters that are to be described by them."""
    if not isinstance(calibration, OwnCalibration):
        return {tuple(calibration.texts): list(range(len(adapters)))}
    found: dict[tuple[str, ...], list[int]] = {}
    for place, adapter in enumerate(adapters):
        found.setdefault(tuple(calibration.texts_of(adapter.name)), []).append(place)
    return found


def _closed_forms(
    layers: Mapping[str, LayerFactors], places: Sequence[int], latents: Mapping[str, Sequence[LatentMoments]]
) -> dict[tuple[str, int], tuple[float, float]]:
    """(module, place) → mean and deviation, for every layer that an adapter has."""
    return {
        (module, place): closed_form(factors.folded_B(place), latents[module][factors.group_places[place]])
        for module, factors in layers.items()
        for place in places
        if place in factors.group_places
    }


def _of_family(
    layers: Mapping[str, LayerFactors], adapters: Sequence[Adapter], latents: Mapping[str, Sequence[LatentMoments]]
) -> dict[str, LatentMoments]:
    """Module → the moments of the family's latents, where the bank has a member of the family."""
    found: dict[str, LatentMoments] = {}
    for module, factors in layers.items():
        for group, moments in zip(factors.groups, latents[module], strict=True):
            if adapters[int(group.columns[0])].family is not None:
                found[module] = moments
    return found
