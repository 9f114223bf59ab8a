"""Whose token is whose: the rows of a caller's batch in what a layer sees, beams and flattened tokens included."""

from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from treadle.errors import UnsupportedError

Layout = Literal["rows", "row", "tokens"]
"""What a layer sees: (rows, tokens, inner), one vector a row, or the tokens of all rows one after another."""

_ROWS, _TOKENS, _WRITTEN = 7, 5, 3  # primes, so that no other axis of a model is taken for rows


def prompt_modules(model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> frozenset[str]:
    """The layers that see the prompt itself: all of them, but for an encoder–decoder its encoder's."""
    if not model.config.is_encoder_decoder:
        return frozenset(targets)
    encoder = set(model.get_encoder().modules())
    return frozenset(name for name, module in targets.items() if module in encoder)


def alike(values: Tensor) -> bool:
    """Whether every row is the same."""
    return bool((values == values[:1]).all())


def layouts(model: PreTrainedModel, targets: Mapping[str, nn.Module]) -> dict[str, Layout]:
    """How the rows of a batch lie in what each layer sees, found by letting the base read some rows once.

    Left out is every layer of which that cannot be said: it does not run, its rows are not on the first axis (some
    encoders compute time first), or it is an expert, which sees some tokens of some rows in whatever order.

    Args:
        model: read on a few made-up tokens, without gradients.
        targets: name → layer.
    """
    seen: dict[str, set[Layout | None]] = {}
    reader = get_ident()

    def watch(name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> None:
            if get_ident() != reader:  # another thread's rows are others
                return
            x = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
            seen.setdefault(name, set()).add(None if x is None else _layout(x))

        return note

    watches = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in targets.items()]
    size = model.config.get_text_config().vocab_size
    ids = (torch.arange(_ROWS * _TOKENS, device=model.device) * 7 % size).reshape(_ROWS, _TOKENS)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :_WRITTEN]
    try:
        with torch.no_grad():
            model(**given)
    except Exception:  # a base that needs more than tokens proves nothing, and is trusted with nothing
        return {}
    finally:
        for watch_ in watches:
            watch_.remove()
    found: dict[str, Layout] = {}
    for name, kinds in seen.items():
        kind, *others = kinds
        if kind is not None and not others and "expert" not in name.lower():
            found[name] = kind
    return found


def _layout(x: Tensor) -> Layout | None:
    if x.dim() > 2:
        return "rows" if x.shape[0] == _ROWS else None
    if x.shape[0] == _ROWS:
        return "row"
    return "tokens" if x.shape[0] in (_ROWS * _TOKENS, _ROWS * _WRITTEN) else None


def check_rows(x: Tensor, rows: int, batch: tuple[int, int], module: str, layout: Layout | None) -> None:
    """Return if the rows of x are surely those of the caller, in order: another's rights must not be taken for them.

    Args:
        x: what the layer sees.
        rows: of the caller.
        batch: (rows, tokens) that the base reads, beams included.
        module: the layer's name.
        layout: of the layer; None where `layouts` could not tell.

    Raises:
        UnsupportedError: they are not, or it cannot be said.
    """
    count = x.shape[0]
    flat = x.dim() == 2
    known = {"rows": not flat, "row": flat and count == batch[0], "tokens": flat and count == batch[0] * batch[1]}
    if layout is None or not known[layout] or count % rows != 0:
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
