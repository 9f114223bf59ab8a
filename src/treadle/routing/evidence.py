"""Why a prompt was routed as it was: every token's and every layer's part in the score."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from treadle.errors import InputError
from treadle.routing.access import permitted_mask
from treadle.routing.calibration import counted
from treadle.routing.routed import RoutedLayer, RoutedModel


@dataclass(frozen=True)
class Evidence:
    """The scores of one prompt as the base alone reads it, for the adapters permitted to the caller and no others.

    Attributes:
        names: the permitted adapters, in the bank's order.
        tokens: score over the layers that choose at each token, as `RoutedModel.choose` adds layers up; NaN where an
            adapter is eligible nowhere.
        running: mean of that over the counted tokens so far; its last row decides for `sequence`.
        layers: module → mean score over the counted tokens, NaN where an adapter is not eligible.
        counted: which tokens count: not the special ones.
    """

    names: tuple[str, ...]
    tokens: Float[Tensor, "tokens adapters"]
    running: Float[Tensor, "tokens adapters"]
    layers: Mapping[str, Float[Tensor, " adapters"]]
    counted: Bool[Tensor, " tokens"]


def prompt_evidence(
    model: RoutedModel, input_ids: Int[Tensor, "1 tokens"], *, permitted: Collection[str] | None = None
) -> Evidence:
    """What `RoutedModel.choose` sums up for this prompt, token by token and layer by layer.

    A layer that sees the prompt as one vector (a pooler) counts at the last token.

    Raises:
        AccessError: a permitted set is missing or names an unknown adapter.
        InputError: nobody is permitted, so there is nothing to score.
    """
    bank = model.bank
    mask = permitted_mask(
        bank.names, None if permitted is None else [permitted], rows=1, required=bank.access == "required"
    )
    keep = torch.ones(len(bank.names), dtype=torch.bool) if mask is None else mask[0]
    if not bool(keep.any()):
        raise InputError("no adapter is permitted, so there is no evidence", remedy="permit at least one")
    tallies = _read(model, input_ids, keep)
    weight = counted(input_ids, None, bank.ignored_tokens)[0].cpu()
    weighted = weight[:, None].double()
    if model.prompts is None:
        sums = torch.stack([tally.sums for tally in tallies.values()]).sum(0)
        counts = torch.stack([tally.counts for tally in tallies.values()]).sum(0)
        tokens, running = sums / counts, (sums * weighted).cumsum(0) / (counts * weighted).cumsum(0)
    else:
        weights = {module: model.prompts.weight_of(module)[keep] for module in tallies}
        parts = [tally.sums * weights[module] for module, tally in tallies.items()]
        tokens = torch.stack(parts).sum(0) - model.prompts.centre[keep]
        running = (tokens * weighted).cumsum(0) / weighted.cumsum(0)
    return Evidence(
        tuple(name for name, kept in zip(bank.names, keep.tolist(), strict=True) if kept),
        tokens,
        running,
        {
            module: (tally.sums * weighted).sum(0) / (tally.counts * weighted).sum(0)
            for module, tally in tallies.items()
        },
        weight,
    )


@dataclass(frozen=True)
class _Tally:
    """One layer's scores of the prompt, (tokens, permitted adapters): sums over its calls, and how many."""

    sums: Tensor
    counts: Tensor


def _read(model: RoutedModel, input_ids: Tensor, keep: Tensor) -> dict[str, _Tally]:
    """Every layer's scores as the base, alone, reads the prompt; forbidden adapters' columns are left out."""
    length, width = input_ids.shape[1], int(keep.sum())
    found: dict[str, _Tally] = {}
    allowed = keep.to(input_ids.device)

    def note(layer: RoutedLayer, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        permitted = allowed.expand(flat.shape[0], -1)
        value = model.scorer.scores(layer.factors, flat, permitted).value[:, allowed].double().cpu()
        place = slice(None) if flat.shape[0] == length else slice(length - 1, length)
        there = value > -torch.inf
        tally = found.setdefault(
            layer.factors.module, _Tally(torch.zeros(length, width).double(), torch.zeros(length, width).double())
        )
        scored, number = torch.where(there, value, 0.0), there.double()
        if flat.shape[0] != length:
            scored, number = scored.sum(0, keepdim=True), number.sum(0, keepdim=True)
        tally.sums[place] += scored
        tally.counts[place] += number

    model.read(input_ids, torch.ones_like(input_ids), note, modules=model.choosing)
    return found
