"""The share of rows that greedy decoding would answer rightly, held against decoding with merged weights."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from treadle.family.factors import Factors
from treadle.train.accuracy import accuracy_of
from treadle.train.rows import Row

ROWS = 66  # more than one batch


def written(model: LlamaForCausalLM, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """What greedy decoding writes, one token at a time."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


@torch.inference_mode()
def test_accuracy_is_that_of_greedy_decoding_with_merged_weights(tiny_llama: LlamaForCausalLM) -> None:
    draw = torch.Generator().manual_seed(3)
    name = "model.layers.0.mlp.down_proj"
    weight = tiny_llama.get_submodule(name).weight
    A, B = torch.randn(2, weight.shape[1], generator=draw), torch.randn(weight.shape[0], 2, generator=draw)
    merged = copy.deepcopy(tiny_llama)
    merged.get_submodule(name).weight.add_(B @ A)
    vocabulary = tiny_llama.config.vocab_size
    rows, as_base = list[Row](), 0
    for place in range(ROWS):
        prompt = tuple(torch.randint(0, vocabulary, (2 + place % 5,), generator=draw).tolist())
        target = written(merged, prompt, 1 + place % 3)
        if place % 3 == 0:  # wrong in its last token alone
            target = (*target[:-1], (target[-1] + 1) % vocabulary)
        as_base += written(tiny_llama, prompt, len(target)) == target
        rows.append(Row(prompt, target))
    assert accuracy_of(tiny_llama, Factors({name: A}, {name: B}), rows) == pytest.approx(2 / 3)
    assert accuracy_of(tiny_llama, Factors({}, {}), rows) == pytest.approx(as_base / ROWS)
    assert as_base < 2 * ROWS / 3  # the factors decide
