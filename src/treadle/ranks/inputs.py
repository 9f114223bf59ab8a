"""The texts that a probe runs, as tokens: batches of equal length, so that no output hangs on padding."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from treadle import files
from treadle.errors import InputError


@dataclass(frozen=True)
class ProbeInputs:
    """Token ids, (texts, tokens) a batch, and the SHA-256 of the texts that they came from."""

    batches: tuple[Int[Tensor, "_texts _tokens"], ...]
    text_sha256: str

    @staticmethod
    def of_texts(
        tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, tokens: int = 32, batch: int = 8
    ) -> "ProbeInputs":
        """The texts cut to at most `tokens` tokens and batched, at most `batch` of equal length together.

        Raises:
            InputError: no text, a text of fewer than two tokens, or limits below 2 tokens or 1 text.
        """
        if tokens < 2 or batch < 1:
            raise InputError(f"cannot probe with {tokens} tokens in batches of {batch}", remedy="use at least 2 and 1")
        if not texts:
            raise InputError("there is no probe text", remedy="give at least one text")
        by_length: dict[int, list[list[int]]] = {}
        for index, text in enumerate(texts):
            ids = list(tokenizer(text, truncation=True, max_length=tokens)["input_ids"])
            if len(ids) < 2:
                raise InputError(f"probe text {index + 1} has fewer than two tokens", remedy="give longer texts")
            by_length.setdefault(len(ids), []).append(ids)
        batches = tuple(
            torch.tensor(rows[start : start + batch])
            for _, rows in sorted(by_length.items())
            for start in range(0, len(rows), batch)
        )
        return ProbeInputs(batches, hashlib.sha256(files.canonical_json(list(texts))).hexdigest())
