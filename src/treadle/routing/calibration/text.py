"""Running the base over text: which tokens count, in which batches they are read, and who sees a layer's inputs."""

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from threading import get_ident

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from treadle.errors import InputError, UnsupportedError
from treadle.family.injection import Attachment, Delta, adapted_layers
from treadle.family.plan import LayerShape
from treadle.models.positions import positions_of
from treadle.progress import Progress, silent
from treadle.routing.rows import layouts

Passages = Sequence[str] | Sequence[Sequence[int]]
"""Texts, or the token ids that a tokenizer made of them."""

Observer = Callable[[Tensor, Tensor], None]
"""Told a layer's inputs, (tokens, inner), at the tokens that count, and each one's passage: the place of its row in
the batch."""


def check_passages(texts: Passages, where: str) -> None:
    """Return if this is a list of passages, not one string.

    Raises:
        InputError: it is one string, which is a sequence of strings too, one letter each.
    """
    if isinstance(texts, str):
        raise InputError("one string is not a list of passages", where=where, remedy="give a list")


def texts_digest(texts: Sequence[str]) -> str:
    """SHA-256 of the texts in their order."""
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()


def ignored_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the special tokens (beginning, separators, padding), whose outlier norms would drown the text's."""
    return tuple(sorted(tokenizer.all_special_ids))


def counted(input_ids: Tensor, attention_mask: Tensor | None, ignored: Sequence[int]) -> Bool[Tensor, "rows tokens"]:
    """Which tokens count in prompt scores: neither padding nor special.

    A row that consists of special tokens alone counts with all its unpadded tokens, so that it still has a score.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    plain = real & ~_special(input_ids, ignored)
    return torch.where(plain.any(1, keepdim=True), plain, real)


def _special(input_ids: Tensor, ignored: Sequence[int]) -> Bool[Tensor, "rows tokens"]:
    return torch.isin(input_ids, torch.tensor(list(ignored), dtype=torch.long, device=input_ids.device))


def read_text(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    ignored: Sequence[int],
    observers: Mapping[str, tuple[LayerShape, Observer]],
    progress: Progress = silent,
) -> None:
    """Run the base alone over the batches and tell every observer its layer's inputs; returns nothing.

    Neither padding nor special tokens are told, nor what other threads ask of the model meanwhile.

    Args:
        model: the base model; its dropout is off while it reads.
        batches: of `text_batches`.
        ignored: the token ids that do not count.
        observers: module → its shape and who is told.
        progress: told of every batch.

    Raises:
        InputError: no token counts, or a layer never ran.
        UnsupportedError: a layer's inputs cannot be told apart by row and token.

    Where the rows of a batch do not surely come first in all of these layers, every text is read alone.

    Deviations: the decoder of an encoder–decoder reads the same text as its encoder, after the start token.
    """
    masks: list[Tensor] = []
    ran: set[str] = set()
    reader = get_ident()

    def hook(module: str, observer: Observer) -> Delta:
        def observe(x: Tensor) -> None:
            if get_ident() != reader:  # another thread's prompts are not calibration text
                return
            kept, rows = _selected(x, masks, module)
            if kept.shape[0] > 0:
                ran.add(module)
                observer(kept.cpu(), rows.cpu())  # where the adapters' factors are

        return observe

    targets = adapted_layers(model, {module: shape for module, (shape, _) in observers.items()})
    hooks = {module: hook(module, observer) for module, (_, observer) in observers.items()}
    with torch.no_grad(), _evaluating(model):
        if len(layouts(model, targets)) < len(targets):
            batches = [row for batch in batches for row in _rows_alone(batch)]
    with torch.no_grad(), _evaluating(model), Attachment(targets, hooks):
        for done, batch in enumerate(batches):
            progress("calibrating", done, len(batches))
            ids, attention = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            masks[:] = [attention.bool() & ~_special(ids, ignored)]
            if model.config.is_encoder_decoder:
                masks.append(nn.functional.pad(masks[0], (1, 0)))
            _read(model, ids, attention)
    progress("calibrating", len(batches), len(batches))
    if not ran:
        raise InputError("the calibration text has no token that counts", remedy="give longer text")
    for module in observers:
        if module not in ran:
            raise InputError("this layer never ran while reading text", where=module, remedy="leave it out of the plan")


def _rows_alone(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each row as a batch of its own, without padding."""
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        alone = ids[mask.bool()][None]
        yield {"input_ids": alone, "attention_mask": torch.ones_like(alone)}


def longest_passage(model: PreTrainedModel) -> int:
    """How many tokens of a passage are read: 512, or as many as the model has positions."""
    return min(512, positions_of(model) or 512)


def _selected(x: Tensor, masks: Sequence[Tensor], module: str) -> tuple[Tensor, Tensor]:
    """The layer's inputs at the tokens that count, and the row of each; of a layer that sees one vector a row (a
    pooler) every row counts.
    """
    flat = x.reshape(-1, x.shape[-1])
    for mask in masks:
        if flat.shape[0] == mask.numel():
            return flat[mask.flatten()], mask.nonzero()[:, 0]
    if flat.shape[0] == masks[0].shape[0]:
        rows = masks[0].any(1)
        return flat[rows], rows.nonzero()[:, 0]
    raise UnsupportedError(
        "its inputs cannot be told apart by row and token", where=module, remedy="leave it out of the plan"
    )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout is off until the block ends."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def text_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Passages, *, tokens: int = 2048, longest: int = 512
) -> list[dict[str, Tensor]]:
    """The texts as padded batches of about `tokens` tokens, shortest first, each text cut at `longest` tokens.

    The order of the texts changes nothing.

    Raises:
        InputError: there is no text.
    """
    rows = sorted((len(ids), ids) for ids in (_ids_of(tokenizer, text, longest) for text in texts if text) if ids)
    if not rows:
        raise InputError("there is no calibration text", remedy="give at least one passage")
    groups: list[list[list[int]]] = [[]]
    for length, ids in rows:
        if groups[-1] and (len(groups[-1]) + 1) * length > tokens:
            groups.append([])
        groups[-1].append(ids)
    return [_padded(tokenizer, group) for group in groups]


def _padded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The rows as one rectangle, padded on the tokenizer's side."""
    width, left = max(map(len, rows)), tokenizer.padding_side == "left"
    padding = tokenizer.pad_token_id  # RoBERTa's kin tell padding by its id, the others by the mask alone
    ids = torch.full((len(rows), width), padding if isinstance(padding, int) else 0)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[place, span], mask[place, span] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str | Sequence[int], longest: int) -> list[int]:
    if not isinstance(text, str):
        return list(text)[:longest]
    return tokenizer(text, truncation=True, max_length=longest)["input_ids"]


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that ignore left padding, 0 on the padding itself."""
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)


def read_prompt(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor
) -> Float[Tensor, "rows tokens hidden"]:
    """The last hidden state of what reads a prompt: the trunk of a decoder or encoder, the encoder of an
    encoder–decoder; no head.
    """
    trunk = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    if wants_positions(model, trunk):
        return trunk(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask)
        ).last_hidden_state
    return trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _read(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run every layer over the text; the decoder of an encoder–decoder reads it too, one place to the right."""
    if not model.config.is_encoder_decoder:
        read_prompt(model, input_ids, attention_mask)
        return
    start = model.config.decoder_start_token_id
    start = model.config.pad_token_id if start is None else start
    model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        decoder_input_ids=nn.functional.pad(input_ids, (1, 0), value=start or 0),
        decoder_attention_mask=nn.functional.pad(attention_mask, (1, 0), value=1),
    )


# What RoBERTa's kin, which count positions from the padding id on by themselves, call how they do it.
_OWN_POSITIONS = "create_position_ids_from_input_ids"


def wants_positions(model: PreTrainedModel, part: nn.Module | None = None) -> bool:
    """Whether padded rows need `positions` to be read as they would be alone: not where a model counts by itself.

    Args:
        model: the whole model.
        part: what shall be called, if not the whole.
    """
    if model.config.is_encoder_decoder:
        return False
    parts = [model, *(module for module in model.modules() if "mbedding" in type(module).__name__)]
    kinds = {kind for module in parts for kind in type(module).__mro__}
    if any(hasattr(kind, _OWN_POSITIONS) or hasattr(sys.modules[kind.__module__], _OWN_POSITIONS) for kind in kinds):
        return False
    return "position_ids" in signature((part or model).forward).parameters
