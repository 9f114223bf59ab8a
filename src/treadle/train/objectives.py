"""What each kind of model is trained to minimise, on a padded batch."""

import inspect
from collections.abc import Callable, Sequence
from enum import Enum

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from treadle.errors import UnsupportedError

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and target of a row."""

_IGNORED = -100


class Kind(Enum):
    """How a model answers; the value is PEFT's task type.

    A classifier has none: "SEQ_CLS" would make PEFT train and store the head, which belongs to the base.
    """

    CAUSAL = "CAUSAL_LM"
    SEQ2SEQ = "SEQ_2_SEQ_LM"
    CLASSIFIER = None


def kind_of(model: PreTrainedModel) -> Kind:
    """The kind of the model.

    Raises:
        UnsupportedError: it neither generates nor classifies.
    """
    if type(model).__name__.endswith("ForSequenceClassification"):
        if len(model.config.label2id or {}) < 2:
            raise UnsupportedError("the model's head has fewer than two classes", remedy="give it a head of classes")
        return Kind.CLASSIFIER
    if not model.can_generate():
        raise UnsupportedError(
            f"a {type(model).__name__} neither generates nor classifies",
            remedy="give it a head with `treadle models with-head`",
        )
    return Kind.SEQ2SEQ if model.config.is_encoder_decoder else Kind.CAUSAL


def summed_loss(model: PreTrainedModel, batch: Sequence[Pair]) -> Float[Tensor, ""]:
    """The sum of the cross-entropy (nats) over the batch's target tokens, or classes; see `weight`."""
    logits, labels = _ANSWERS[kind_of(model)](model, batch)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORED, reduction="sum"
    )


def mean_losses(model: PreTrainedModel, batch: Sequence[Pair]) -> Float[Tensor, " rows"]:
    """The mean cross-entropy (nats) over each row's target tokens, so that rows count alike however long they are."""
    logits, labels = _ANSWERS[kind_of(model)](model, batch)
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=_IGNORED, reduction="none"
    ).view_as(labels)
    return each.sum(1) / (labels != _IGNORED).sum(1)


def rightly_answered(model: PreTrainedModel, batch: Sequence[Pair]) -> list[bool]:
    """Of every row whether its class is the likeliest, or its target what greedy decoding would write.

    Greedy decoding writes a target exactly if each of its tokens is the likeliest after those before it, so that one
    pass tells it.
    """
    logits, labels = _ANSWERS[kind_of(model)](model, batch)
    return ((logits.argmax(-1) == labels) | (labels == _IGNORED)).all(1).tolist()


def weight(kind: Kind, batch: Sequence[Pair]) -> int:
    """How many cross-entropies `summed_loss` adds up."""
    return len(batch) if kind is Kind.CLASSIFIER else sum(len(target) for _, target in batch)


Answers = tuple[Float[Tensor, "rows kept classes"], Int[Tensor, "rows kept"]]
"""Logits where something is to be answered, and what is to be answered there; what is not counts for nothing."""


def _causal(model: PreTrainedModel, batch: Sequence[Pair]) -> Answers:
    """Rows are padded on the left, so that targets end together and only the last logits need computing."""
    kept = max(len(target) for _, target in batch)
    tokens, mask = padded([p + t for p, t in batch], _filler(model), left=True, device=model.device)
    labels, _ = padded([t for _, t in batch], _IGNORED, left=True, device=model.device)
    accepted = inspect.signature(model.forward).parameters
    optional = {
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "logits_to_keep": kept + 1,
        "use_cache": False,
    }
    named = {name: value for name, value in optional.items() if name in accepted}
    return model(input_ids=tokens, attention_mask=mask, **named).logits[:, -kept - 1 : -1], labels


def _seq2seq(model: PreTrainedModel, batch: Sequence[Pair]) -> Answers:
    tokens, mask = padded([p for p, _ in batch], _filler(model), left=False, device=model.device)
    labels, _ = padded([t for _, t in batch], _IGNORED, left=False, device=model.device)
    return model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).logits, labels


def _classifier(model: PreTrainedModel, batch: Sequence[Pair]) -> Answers:
    tokens, mask = padded([p for p, _ in batch], _filler(model), left=False, device=model.device)
    classes = torch.tensor([[target[0]] for _, target in batch], device=model.device)
    return model(input_ids=tokens, attention_mask=mask).logits[:, None], classes


def _filler(model: PreTrainedModel) -> int:
    """The number for padding; it is masked, but a classifier may look for it to find a row's end."""
    padding = model.config.get_text_config().pad_token_id
    return padding if isinstance(padding, int) else 0


def padded(
    rows: Sequence[Sequence[int]], filler: int, *, left: bool, device: torch.device
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """The rows at one width, and the mask that is 1 where a row is."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return tokens.to(device), mask.to(device)


_ANSWERS: dict[Kind, Callable[[PreTrainedModel, Sequence[Pair]], Answers]] = {
    Kind.CAUSAL: _causal,
    Kind.SEQ2SEQ: _seq2seq,
    Kind.CLASSIFIER: _classifier,
}
