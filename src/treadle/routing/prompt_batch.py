"""Prompts as a scorer of whole prompts gets them, with what may be asked of the model about them."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class PromptBatch:
    """Prompts, who may act on them, and the model.

    Attributes:
        input_ids: padded on either side.
        attention: 1 on tokens, 0 on padding.
        counted: which tokens count: neither padding nor special.
        permitted: who may act on each row.
        model: the base; calls through it are not routed.
        logits: (place, rows) → (rows, tokens, vocabulary), with the adapter at this place in the bank acting alone.
    """

    input_ids: Int[Tensor, "rows tokens"]
    attention: Int[Tensor, "rows tokens"]
    counted: Bool[Tensor, "rows tokens"]
    permitted: Bool[Tensor, "rows adapters"]
    model: PreTrainedModel
    logits: Callable[[int, Int[Tensor, " some"]], Float[Tensor, "some tokens vocabulary"]]
