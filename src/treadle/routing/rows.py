"""Whose token is whose: the rows of a caller's batch in what a layer sees, beams and flattened tokens included."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.errors import UnsupportedError


def prompt_modules(model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> frozenset[str]:
    """The layers that see the prompt itself: all of them, but for an encoder–decoder its encoder's."""
    if not model.config.is_encoder_decoder:
        return frozenset(targets)
    encoder = set(model.get_encoder().modules())
    return frozenset(name for name, module in targets.items() if module in encoder)


def alike(values: Tensor) -> bool:
    """Whether every row is the same."""
    return bool((values == values[:1]).all())


def check_rows(x: Tensor, rows: int, batch: tuple[int, int], module: str) -> None:
    """Return if the rows of x are surely those of the caller, in order: another's rights must not be taken for them.

    A layer that sees (rows, tokens, inner) is trusted; one that sees (vectors, inner) only if these are all tokens of
    the batch, or one a row: an expert that sees some tokens of some rows is not.
    """
    known = x.shape[0] in (batch[0], batch[0] * batch[1]) if x.dim() == 2 else True
    if not known or x.shape[0] % rows != 0:
        raise UnsupportedError(
            "its inputs cannot be told apart by row", where=module, remedy="give one row, or leave it out of the plan"
        )


def real_tokens(x: Tensor, prompt: Tensor | None, batch: tuple[int, int]) -> Tensor:
    """Which of the layer's inputs are real tokens, shaped (rows, tokens) as the trace keeps them, beams as rows."""
    rows = batch[0] if x.dim() == 2 and x.shape[0] % batch[0] == 0 else x.shape[0]
    tokens = x.reshape(-1, x.shape[-1]).shape[0] // max(rows, 1)
    if prompt is None or prompt.shape[1] != tokens or rows % prompt.shape[0] != 0:
        return torch.ones(rows, tokens, dtype=torch.bool)
    return prompt.repeat_interleave(rows // prompt.shape[0], 0).cpu()


def spread(values: Tensor, tokens: int) -> Tensor:
    """One value a row → one a token: rows stay together, and beams of a row follow one another."""
    if tokens % values.shape[0] != 0:  # only where all rows are alike: see `check_rows`
        return values[:1].repeat_interleave(tokens, dim=0)
    return values.repeat_interleave(tokens // values.shape[0], dim=0)


def left_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with their padding moved to the left, as decoders need it to continue."""
    order = attention_mask.bool().int().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)
