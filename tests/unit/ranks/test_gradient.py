import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from treadle.data.prompts import Example
from treadle.errors import InputError, UnsupportedError
from treadle.family.injection import linear_shapes
from treadle.ranks.gradient import gradient
from treadle.ranks.inputs import IGNORED, ProbeInputs


def test_values_are_squared_gradients_of_the_answers_loss(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = [Example("the film is", " good"), Example("why is the film not", " bad film"), Example("a b", " yes")]
    inputs = ProbeInputs.of_examples(tiny_tokenizer, examples, batch=2)
    shapes = linear_shapes(tiny_llama)
    found = gradient(tiny_llama, inputs, shapes)
    tiny_llama.requires_grad_(True)
    place = 0
    assert inputs.labels is not None
    for ids, labels in zip(inputs.batches, inputs.labels, strict=True):
        for row, label in zip(ids, labels, strict=True):
            answered = int((label != IGNORED).sum())
            loss = tiny_llama(input_ids=row[None], labels=label[None]).loss * answered  # transformers takes the mean
            names = list(shapes)
            gradients = torch.autograd.grad(loss, [tiny_llama.get_submodule(name).weight for name in names])
            for name, wanted in zip(names, gradients, strict=True):
                assert found.modules[name].values[0][place] == pytest.approx(float(wanted.square().sum()), rel=1e-3)
            place += 1
    assert place == 3


def test_a_classifiers_answers_are_classes(tiny_bert: BertForSequenceClassification) -> None:
    ids, labels = torch.randint(4, 128, (3, 5)), torch.tensor([0, 2, 1])
    name = "bert.encoder.layer.0.output.dense"
    shapes = {name: linear_shapes(tiny_bert)[name]}
    found = gradient(tiny_bert, ProbeInputs((ids,), "0" * 64, (labels,)), shapes).modules[name].values[0]
    weight = tiny_bert.get_submodule(name).weight.requires_grad_(True)
    for place in range(3):
        loss = tiny_bert(input_ids=ids[place : place + 1], labels=labels[place : place + 1]).loss
        assert found[place] == pytest.approx(float(torch.autograd.grad(loss, weight)[0].square().sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels; give examples with answers"),
        (torch.tensor([0, 1]), "which wants a label a token"),
        (torch.full((2, 4), IGNORED), "a label is outside 0..127"),
        (torch.full((2, 4), 128), "a label is outside 0..127"),
    ],
)
def test_labels_that_are_no_answers(tiny_llama: LlamaForCausalLM, labels: torch.Tensor | None, message: str) -> None:
    inputs = ProbeInputs((torch.full((2, 4), 9),), "0" * 64, None if labels is None else (labels,))
    with pytest.raises(InputError, match=message) as caught:
        gradient(tiny_llama, inputs, linear_shapes(tiny_llama))
    assert "\n" not in str(caught.value)


def test_labels_of_tokens_are_nothing_for_a_classifier(tiny_bert: BertForSequenceClassification) -> None:
    inputs = ProbeInputs((torch.full((2, 4), 9),), "0" * 64, (torch.full((2, 4), 1),))
    with pytest.raises(InputError, match="which wants a class a text"):
        gradient(tiny_bert, inputs, linear_shapes(tiny_bert))


def test_encoder_decoders_are_refused(tiny_t5: T5ForConditionalGeneration) -> None:
    inputs = ProbeInputs((torch.full((2, 4), 9),), "0" * 64, (torch.full((2, 4), 1),))
    with pytest.raises(UnsupportedError, match="no encoder-decoders"):
        gradient(tiny_t5, inputs, linear_shapes(tiny_t5))
