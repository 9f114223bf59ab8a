"""How often a model answers rightly under the factors of an adapter."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from treadle.family.factors import Factors
from treadle.family.injection import inject
from treadle.train.objectives import rightly_answered
from treadle.train.rows import Row

_BATCH = 64


def accuracy_of(model: PreTrainedModel, factors: Factors, rows: Sequence[Row]) -> float:
    """The share of rows that are answered rightly under these factors; see `rightly_answered`."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].prompt))
    right = 0
    with torch.inference_mode(), inject(model, factors.lora_A, factors.lora_B):
        for begin in range(0, len(order), _BATCH):
            batch = [rows[place] for place in order[begin : begin + _BATCH]]
            right += sum(rightly_answered(model, [(row.prompt, row.target) for row in batch]))
    return right / len(rows)
