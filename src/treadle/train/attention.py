"""Which of a model's implementations of attention its training steps run."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

_LONGEST = 256
"""Tokens up to which the plain implementation is at least as fast; it keeps their square for the backward pass."""


@contextlib.contextmanager
def quick_attention(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """A block in which bfloat16 attention on a CPU is plain matrix products, if rows are short.

    torch's fused kernel takes ten times as long backward as forward there: a step of SmolLM2 on 16 rows of 26 or 64
    tokens is 1.5 times as fast without it, of MiniLM 2.1 to 2.4 times (docs/log.md). In float32 there is no difference.

    Args:
        model: whose attention returns to what it was with the block's end.
        tokens: of the longest row.
    """
    fused = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    slow = model.device.type == "cpu" and model.dtype == torch.bfloat16 and tokens <= _LONGEST
    if fused != "sdpa" or not slow:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(fused)
