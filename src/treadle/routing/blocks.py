"""The numbered blocks of a model, and which of them are enough to tell whose prompt it is."""

import math
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel

from treadle.family.injection import adapted_layers
from treadle.routing.factors import LayerFactors
from treadle.routing.rows import prompt_modules

LEADING_SHARE = 0.5
"""The share of the blocks that chooses, and says whether to choose: later ones cost more, say less (docs/log.md)."""


def block_of(module: str) -> str:
    """The innermost numbered block that a layer belongs to; a layer outside of every block is one of its own."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else module


def leading_modules(model: nn.Module, modules: Iterable[str], share: float = LEADING_SHARE) -> frozenset[str]:
    """Those of the modules in the first `share` of the model's blocks, rounded up; all where none of them is there.

    An encoder–decoder has two stacks of blocks. What stands outside of every block (a pooler, a head) is left out.
    """
    stacks: dict[str, set[int]] = {}
    for name, _ in model.named_modules():
        stack, number = _place(name)
        if number is not None:
            stacks.setdefault(stack, set()).add(number)
    kept = {stack: set(sorted(numbers)[: math.ceil(share * len(numbers))]) for stack, numbers in stacks.items()}
    places = {module: _place(module) for module in modules}
    found = frozenset(module for module, (stack, number) in places.items() if number in kept.get(stack, set()))
    return found or frozenset(places)


def prompt_layers(model: PreTrainedModel, layers: Mapping[str, LayerFactors]) -> frozenset[str]:
    """The layers of a bank that see a prompt and are in the leading blocks."""
    targets = adapted_layers(model, {module: factors.shape for module, factors in layers.items()})
    return leading_modules(model, prompt_modules(model, targets))


def _place(module: str) -> tuple[str, int | None]:
    """The outermost stack of blocks that a module is in, and the number of its block there."""
    parts = module.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return module, None
