"""The texts that a probe runs, as tokens: batches of equal length, so that no output hangs on padding."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from treadle import files
from treadle.data.prompts import Example, cut_prompt
from treadle.data.public_text import public_texts
from treadle.errors import InputError

IGNORED = -100
"""The label of a token that is no part of an answer."""


@dataclass(frozen=True)
class ProbeInputs:
    """The texts of a probe, in batches of equal length.

    Attributes:
        batches: token ids, (texts, tokens) each.
        text_sha256: the SHA-256 of the texts, and of their answers, that they came from.
        labels: a batch each, for probes that need answers: the classes, (texts,), or the ids of the tokens that are
            answered and `IGNORED` elsewhere, (texts, tokens).

    Raises:
        InputError: there is no batch, or labels stand beside other batches.
    """

    batches: tuple[Int[Tensor, "_texts _tokens"], ...]
    text_sha256: str
    labels: tuple[Int[Tensor, "_texts *_tokens"], ...] | None = None

    def __post_init__(self) -> None:
        if not self.batches:
            raise InputError("there is no probe text", remedy="give at least one text")
        shapes = [batch.shape for batch in self.batches]
        if self.labels is not None and not (
            len(shapes) == len(self.labels)
            and all(label.shape == shape[: label.ndim] for shape, label in zip(shapes, self.labels, strict=True))
        ):
            raise InputError("texts and labels do not lie side by side", remedy="give each text its own labels")

    @staticmethod
    def of_texts(
        tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, tokens: int = 32, batch: int = 8
    ) -> "ProbeInputs":
        """The texts cut to at most `tokens` tokens and batched, at most `batch` of equal length together.

        Raises:
            InputError: no text, a text of fewer than two tokens or of special ones alone, or limits below 2 tokens or
                1 text.
        """
        _check_limits(tokens, batch)
        rows: list[tuple[list[int], list[int] | int | None]] = []
        for index, text in enumerate(texts):
            encoding = tokenizer(text, truncation=True, max_length=tokens, return_special_tokens_mask=True)
            ids = list(encoding["input_ids"])
            _check_text(ids, sum(encoding["special_tokens_mask"]), where=f"probe text {index + 1}")
            rows.append((ids, None))
        return _batched(rows, batch, hashlib.sha256(files.canonical_json(list(texts))).hexdigest())

    @staticmethod
    def of_public_text(
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequences: int,
        tokens: int = 32,
        source: str = "pydoc",
        seed: int = 0,
        batch: int = 8,
    ) -> "ProbeInputs":
        """`sequences` passages that nobody owns (see `public_texts`), as `of_texts` reads them.

        Raises:
            InputError, FormatError: see `public_texts` and `of_texts`.
        """
        # two words a token, so that even a passage of half that length fills its tokens
        passages = public_texts(source, limit=sequences, words=2 * tokens, seed=seed).passages
        return ProbeInputs.of_texts(tokenizer, passages, tokens=tokens, batch=batch)

    @staticmethod
    def of_examples(
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        *,
        classes: Mapping[str, int] | None = None,
        tokens: int = 64,
        batch: int = 8,
    ) -> "ProbeInputs":
        """Prompts with their answers as labels, cut to `tokens` tokens as training cuts them, batched as texts are.

        Args:
            tokenizer: the model's.
            examples: an answer is their completion.
            classes: a classifier's name → number, `model.config.label2id`; without it the completion is a
                continuation, which stands behind the prompt and ends with the end of sequence.
            tokens: at most so many a text.
            batch: at most so many texts together.

        Raises:
            InputError: no example, an answer that is empty, too long or no class, or a classifier's text or limits as
                in `of_texts`.
        """
        _check_limits(tokens, batch)
        rows = [
            _labelled(tokenizer, example, classes, (f"example {index + 1}", tokens))
            for index, example in enumerate(examples)
        ]
        content = [[example.prompt, example.completion] for example in examples]
        return _batched(rows, batch, hashlib.sha256(files.canonical_json(content)).hexdigest())


def _check_limits(tokens: int, batch: int) -> None:
    if tokens < 2 or batch < 1:
        raise InputError(f"cannot probe with {tokens} tokens in batches of {batch}", remedy="use at least 2 and 1")


def _check_text(ids: Sequence[int], special: int, *, where: str) -> None:
    if len(ids) < 2:
        raise InputError("it has fewer than two tokens", where=where, remedy="give longer texts")
    if len(ids) <= special:
        raise InputError(
            f"of its text nothing is among its {len(ids)} tokens, which are all special",
            where=where,
            remedy="give longer texts, or more tokens",
        )


def _batched(rows: Sequence[tuple[list[int], list[int] | int | None]], batch: int, text_sha256: str) -> ProbeInputs:
    """Rows of ids and labels, those of equal length together."""
    by_length: dict[int, list[tuple[list[int], list[int] | int | None]]] = {}
    for row in rows:
        by_length.setdefault(len(row[0]), []).append(row)
    groups = [
        same[start : start + batch] for _, same in sorted(by_length.items()) for start in range(0, len(same), batch)
    ]
    batches = tuple(torch.tensor([ids for ids, _ in group]) for group in groups)
    labels = tuple(torch.tensor([label for _, label in group]) for group in groups if group[0][1] is not None)
    return ProbeInputs(batches, text_sha256, labels or None)


def _labelled(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    classes: Mapping[str, int] | None,
    place: tuple[str, int],
) -> tuple[list[int], list[int] | int]:
    where, tokens = place
    encoding = tokenizer(example.prompt, return_special_tokens_mask=True)
    prompt, special = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])

    def cut(room: int) -> list[int]:
        return prompt if len(prompt) <= room else list(cut_prompt(prompt, special, room))

    if classes is not None:
        answer = example.completion.strip()
        if answer not in classes:
            raise InputError(
                f"{answer!r} is no class of the model", where=where, remedy=f"choose among {', '.join(classes)}"
            )
        kept = cut(tokens)
        _check_text(kept, sum(special), where=where)
        return kept, int(classes[answer])
    target = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"])
    if not target or not prompt:
        raise InputError("its prompt or its answer has no token", where=where, remedy="drop it or fill its fields")
    if isinstance(end := tokenizer.eos_token_id, int):
        target.append(end)
    if len(target) >= tokens:
        raise InputError(
            f"its answer alone has {len(target)} tokens of {tokens}", where=where, remedy="allow more tokens"
        )
    kept = cut(tokens - len(target))
    return kept + target, [IGNORED] * len(kept) + target
