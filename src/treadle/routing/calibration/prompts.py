"""What public prompts say about layers: how their scores of a prompt should add up, and how common a score is.

A prompt has one mean z-score a layer. Over prompts these scores vary together, by how much depends on the layer, and
an adapter's own prompts raise them all. For a common shift of variables with covariance C the best linear score has
the weights C⁻¹1 (generalised least squares; Fisher's discriminant for that shift), so layers that only repeat what
others say, or that any prompt moves, count less. C is of public prompts, shrunk towards a multiple of the identity.

Two scores of one kind: *choosing* takes the leading blocks, which tell adapters apart best; *knowing* takes all, which
tell the bank's prompts from foreign ones best. docs/log.md has what they were chosen against.

Reference: Aitken 1935; Ledoit and Wolf 2004 for the shape of the shrinkage. Deviation: its share is fixed, not
estimated: it was chosen on validation prompts for what it does to routing.
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
class LayerWeights:
    """A weighted sum of layers' mean z-scores; every adapter has its own.

    Attributes:
        weight: module → (adapters,), 0 or NaN where a layer does not count.
        centre: (adapters,), what the sum is for public prompts on average; NaN where nothing is known.
    """

    weight: Mapping[str, Float[Tensor, " adapters"]]
    centre: Float[Tensor, " adapters"]


@dataclass(frozen=True)
class PromptStatistics:
    """What public prompts say about layers.

    Attributes:
        choosing: the score that adapters are compared by.
        knowing: the score that says whether a prompt looks like anything in the bank, in deviations of public prompts.
        public: (prompts, adapters), the knowing score of each public prompt; NaN where unknown.
    """

    choosing: LayerWeights
    knowing: LayerWeights
    public: Float[Tensor, "prompts adapters"]

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, the last dimension that of the adapters."""
        found = {"choosing": self.choosing.centre, "knowing": self.knowing.centre, "public": self.public}
        found |= {f"choosing/{module}": values for module, values in self.choosing.weight.items()}
        return found | {f"knowing/{module}": values for module, values in self.knowing.weight.items()}

    @staticmethod
    def of_tensors(tensors: Mapping[str, Tensor]) -> "PromptStatistics":
        """What `tensors` gave.

        Raises:
            KeyError: something is missing.
        """

        def weights(kind: str) -> LayerWeights:
            found = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{kind}/")}
            return LayerWeights(found, tensors[kind])

        return PromptStatistics(weights("choosing"), weights("knowing"), tensors["public"])


def prompt_statistics(
    passages: Mapping[tuple[str, int], Float[Tensor, " prompts"]],
    mean: Mapping[str, Float[Tensor, " adapters"]],
    std: Mapping[str, Float[Tensor, " adapters"]],
    leading: Collection[str],
    reading: Collection[str],
) -> PromptStatistics:
    """The statistics of public prompts; every adapter's are computed apart, so that no other moves a bit of them.

    Args:
        passages: (module, place in the bank) → the mean norm of each prompt.
        mean: module → of the norms of all tokens.
        std: likewise their deviation.
        leading: the modules that choose.
        reading: all modules that see a prompt.
    """
    prompts, adapters = len(next(iter(passages.values()))), len(next(iter(mean.values())))
    zero = torch.zeros(adapters, dtype=torch.float64)
    unknown = torch.full_like(zero, torch.nan)
    choosing = LayerWeights({module: zero.clone() for module in mean if module in leading}, unknown.clone())
    knowing = LayerWeights({module: zero.clone() for module in mean if module in reading}, unknown.clone())
    public = torch.full((prompts, adapters), torch.nan, dtype=torch.float64)
    for place in range(adapters):
        scores = {
            module: (values - mean[module][place]) / std[module][place]
            for (module, other), values in passages.items()
            if other == place and has_spread(mean[module][place], std[module][place])
        }
        _fill(choosing, place, scores)
        found = _fill(knowing, place, scores)
        if found is None:
            continue
        spread = found.std(correction=0).clamp_min(torch.finfo(torch.float64).tiny)
        for weight in knowing.weight.values():
            weight[place] /= spread
        knowing.centre[place] /= spread
        public[:, place] = found / spread - knowing.centre[place]
    return PromptStatistics(choosing, knowing, public)


def _fill(weights: LayerWeights, place: int, scores: Mapping[str, Tensor]) -> Tensor | None:
    """Write one adapter's weights, of sum 1, and centre; each prompt's weighted sum, None where no layer counts."""
    names = [module for module in weights.weight if module in scores]
    if not names:
        return None
    table = torch.stack([scores[module] for module in names], 1)
    w = layer_weights(table)
    for module, value in zip(names, w, strict=True):
        weights.weight[module][place] = value
    found = table @ w
    weights.centre[place] = found.mean()
    return found


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
    sources: Iterable[PromptStatistics | None], sizes: Iterable[int], order: Tensor, like: PromptStatistics
) -> PromptStatistics:
    """The statistics of these adapters side by side, NaN for those of a source without any.

    Args:
        sources: of every bank.
        sizes: how many adapters each has.
        order: the columns to take.
        like: says how many prompts there are.
    """
    parts = [({} if source is None else source.tensors(), size) for source, size in zip(sources, sizes, strict=True)]
    names = dict.fromkeys(name for tensors, _ in parts for name in tensors)

    def column(name: str) -> Tensor:
        lead = like.public.shape[:1] if name == "public" else ()
        blank = [torch.full((*lead, size), torch.nan, dtype=torch.float64) for _, size in parts]
        filled = [tensors.get(name, filler) for (tensors, _), filler in zip(parts, blank, strict=True)]
        return torch.cat(filled, -1)[..., order]

    return PromptStatistics.of_tensors({name: column(name) for name in names})
