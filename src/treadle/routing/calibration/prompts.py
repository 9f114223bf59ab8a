"""A prompt's score in deviations of public prompts: what chooses an adapter, or tells that nobody is meant.

A prompt has one mean z-score a layer. Over prompts these scores vary together, by how much depends on the layer, and
an adapter's own prompts raise them all. For a common shift of variables with covariance C the best linear score has
the weights C⁻¹1 (generalised least squares; Fisher's discriminant for that shift), so layers that only repeat what
others say, or that any prompt moves, count less. C is of public prompts, shrunk towards a multiple of the identity.

Reference: Aitken 1935; Ledoit and Wolf 2004 for the shape of the shrinkage. Deviation: its share is fixed, not
estimated. docs/log.md says what the weights were tried against.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from treadle.routing.factors import has_spread

SHRINKAGE = 0.7
"""The identity's share in the shrunk covariance."""


@dataclass(frozen=True)
class PromptStatistics:
    """How an adapter's layers add up to a score in deviations of public prompts, and what those score.

    Attributes:
        weight: module → (adapters,), 0 or NaN where a layer does not count.
        centre: (adapters,), of the weighted sum over public prompts; NaN for an adapter of which nothing is known.
        public: (prompts, adapters), the score of each public prompt, less the centre; NaN where unknown.
    """

    weight: Mapping[str, Float[Tensor, " adapters"]]
    centre: Float[Tensor, " adapters"]
    public: Float[Tensor, "prompts adapters"]

    def weight_of(self, module: str) -> Float[Tensor, " adapters"]:
        """The module's weights, 0 where it does not count, as one that joined the bank later does not."""
        found = self.weight.get(module)
        return torch.zeros_like(self.centre) if found is None else found.nan_to_num()

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, the last dimension that of the adapters."""
        found = {"centre": self.centre, "public": self.public}
        return found | {f"weight/{module}": values for module, values in self.weight.items()}

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> "PromptStatistics":
        """What `tensors` gave.

        Raises:
            KeyError: something is missing.
        """
        weight = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith("weight/")}
        return PromptStatistics(weight, tensors["centre"], tensors["public"])


def prompt_statistics(
    passages: Mapping[tuple[str, int], Float[Tensor, " prompts"]],
    mean: Mapping[str, Float[Tensor, " adapters"]],
    std: Mapping[str, Float[Tensor, " adapters"]],
    reading: Collection[str],
) -> PromptStatistics:
    """The statistics of public prompts; every adapter's are computed apart, so that no other moves a bit of them.

    Args:
        passages: (module, place in the bank) → the mean norm of each prompt.
        mean: module → of the norms of all tokens of the calibration text.
        std: likewise their deviation.
        reading: the modules that see a prompt.
    """
    prompts, adapters = len(next(iter(passages.values()))), len(next(iter(mean.values())))
    weight = {module: torch.zeros(adapters, dtype=torch.float64) for module in mean if module in reading}
    centre = torch.full((adapters,), torch.nan, dtype=torch.float64)
    public = torch.full((prompts, adapters), torch.nan, dtype=torch.float64)
    for place in range(adapters):
        names = [
            module
            for module in weight
            if (module, place) in passages and has_spread(mean[module][place], std[module][place])
        ]
        if not names:
            continue
        columns = [(passages[module, place] - mean[module][place]) / std[module][place] for module in names]
        table = torch.stack(columns, 1)
        w = layer_weights(table)
        spread = (table @ w).std(correction=0)
        w = w / torch.where(spread > 0, spread, 1.0)
        for module, value in zip(names, w, strict=True):
            weight[module][place] = value
        centre[place] = (table @ w).mean()
        public[:, place] = table @ w - centre[place]
    return PromptStatistics(weight, centre, public)


def layer_weights(table: Float[Tensor, "prompts layers"]) -> Float[Tensor, " layers"]:
    """C⁻¹1 / 1ᵀC⁻¹1 of the shrunk covariance of the columns; equal weights where they do not vary."""
    layers = table.shape[1]
    covariance = torch.cov(table.T, correction=0).reshape(layers, layers)
    scale = covariance.diagonal().mean()
    if not bool(scale > 0):
        return torch.full((layers,), 1.0 / layers, dtype=table.dtype)
    shrunk = (1.0 - SHRINKAGE) * covariance + SHRINKAGE * scale * torch.eye(layers, dtype=table.dtype)
    w = torch.linalg.solve(shrunk, torch.ones(layers, dtype=table.dtype))
    return w / w.sum()


def joined(
    sources: Iterable[PromptStatistics | None],
    sizes: Iterable[int],
    order: Tensor,
    like: PromptStatistics,
    modules: Collection[str],
) -> PromptStatistics:
    """The statistics of these adapters side by side, NaN for those of a source without any.

    Args:
        sources: of every bank.
        sizes: how many adapters each has.
        order: the columns to take.
        like: says how many prompts there are.
        modules: of the new bank; what others weigh goes.
    """
    parts = [({} if source is None else source.tensors(), size) for source, size in zip(sources, sizes, strict=True)]
    found = dict.fromkeys(name for tensors, _ in parts for name in tensors)
    names = [name for name in found if not name.startswith("weight/") or name.partition("/")[2] in modules]

    def column(name: str) -> Tensor:
        lead = like.public.shape[:1] if name == "public" else ()
        blank = [torch.full((*lead, size), torch.nan, dtype=torch.float64) for _, size in parts]
        filled = [tensors.get(name, filler) for (tensors, _), filler in zip(parts, blank, strict=True)]
        return torch.cat(filled, -1)[..., order]

    return PromptStatistics.of_tensors({name: column(name) for name in names})
