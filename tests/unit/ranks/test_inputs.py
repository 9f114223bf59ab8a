import copy

import pytest
import torch
from tokenizers import processors
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from treadle.data.prompts import Example
from treadle.errors import InputError
from treadle.ranks.inputs import IGNORED, ProbeInputs
from treadle.train.rows import encoded
from treadle.train.settings import SftSettings


def test_public_passages_fill_their_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    inputs = ProbeInputs.of_public_text(tiny_tokenizer, sequences=5, tokens=12, seed=3)
    assert sum(map(len, inputs.batches)) == 5
    assert {batch.shape[1] for batch in inputs.batches} == {12}
    again = ProbeInputs.of_public_text(tiny_tokenizer, sequences=5, tokens=12, seed=3)
    assert again.text_sha256 == inputs.text_sha256
    other = ProbeInputs.of_public_text(tiny_tokenizer, sequences=5, tokens=12, seed=4)
    assert other.text_sha256 != inputs.text_sha256


def test_batches_hold_equal_lengths_and_no_padding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["the film is good", "yes", "a question of colour and much more", "no", "why is the film bad"]
    inputs = ProbeInputs.of_texts(tiny_tokenizer, texts, tokens=5, batch=2)
    assert [tuple(batch.shape) for batch in inputs.batches] == [(2, 2), (2, 5), (1, 5)]
    rows = {tuple(row.tolist()) for batch in inputs.batches for row in batch}
    assert rows == {tuple(tiny_tokenizer(text)["input_ids"][:5]) for text in texts}
    assert all(batch.dtype == torch.int64 for batch in inputs.batches)


def test_the_digest_is_the_texts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def digest(*texts: str) -> str:
        return ProbeInputs.of_texts(tiny_tokenizer, texts).text_sha256

    assert digest("a b", "c") == digest("a b", "c") != digest("a", "b c")


@pytest.mark.parametrize(
    ("texts", "tokens", "batch", "message"),
    [
        ([], 32, 8, "no probe text"),
        (["yes no", ""], 32, 8, "probe text 2: it has fewer than two tokens"),
        (["yes"], 1, 8, "1 tokens"),
        (["yes"], 32, 0, "batches of 0"),
    ],
)
def test_wrong_texts_are_one_line(
    tiny_tokenizer: PreTrainedTokenizerFast, texts: list[str], tokens: int, batch: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ProbeInputs.of_texts(tiny_tokenizer, texts, tokens=tokens, batch=batch)


@pytest.fixture
def bracketing(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Puts `<bos>` first and `<eos>` last, as BERT's does with [CLS] and [SEP]."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(("text", "tokens"), [("", 32), ("the film is good", 2)])
def test_special_tokens_are_no_text(bracketing: PreTrainedTokenizerFast, text: str, tokens: int) -> None:
    message = "1: of its text nothing is among its 2 tokens, which are all special; give longer texts, or more tokens$"
    with pytest.raises(InputError, match=f"^probe text {message}"):
        ProbeInputs.of_texts(bracketing, [text, "yes"], tokens=tokens)
    with pytest.raises(InputError, match=f"^example {message}"):
        ProbeInputs.of_examples(bracketing, [Example(text, "bad")], classes={"bad": 0}, tokens=tokens)


def test_no_batch_is_no_probe() -> None:
    with pytest.raises(InputError, match="no probe text"):
        ProbeInputs((), "0" * 64)


@pytest.mark.parametrize(
    "labels", [(), (torch.zeros(2, 3),), (torch.zeros(3),), (torch.zeros(2), torch.zeros(2)), (torch.zeros(2, 4, 1),)]
)
def test_labels_lie_beside_their_texts(labels: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(InputError, match="side by side"):
        ProbeInputs((torch.zeros(2, 4, dtype=torch.long),), "0" * 64, tuple(label.long() for label in labels))


def test_answers_stand_behind_their_prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example("the film is", " good"), Example("w40 w41 w42 w43 w44 w45", " not bad"), Example("why", " yes")]
    inputs = ProbeInputs.of_examples(tiny_tokenizer, examples, tokens=6, batch=2)
    assert inputs.labels is not None
    found = {
        tuple(row.tolist()): tuple(label.tolist())
        for batch, labels in zip(inputs.batches, inputs.labels, strict=True)
        for row, label in zip(batch, labels, strict=True)
    }

    def ids(text: str) -> list[int]:
        return list(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])

    end = [tiny_tokenizer.eos_token_id]
    good, bad = ids("good") + end, ids("not bad") + end
    assert found == {
        (1, *ids("the film is"), *good): (*[IGNORED] * 4, *good),
        (1, *ids("w44 w45"), *bad): (*[IGNORED] * 3, *bad),  # the end of a prompt that is too long, behind <bos>
        (1, *ids("why yes"), *end): (IGNORED, IGNORED, *ids("yes"), *end),
    }
    other = ProbeInputs.of_examples(tiny_tokenizer, [Example("the film is", " bad"), *examples[1:]])
    assert other.text_sha256 != inputs.text_sha256


def test_classes_are_labels(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [Example("the film is", " good"), Example("a film not bad", " bad"), Example("is the film", "bad")]
    inputs = ProbeInputs.of_examples(tiny_tokenizer, examples, classes={"bad": 0, "good": 1}, tokens=4)
    assert inputs.labels is not None
    (batch,), (labels,) = inputs.batches, inputs.labels
    assert batch.shape == (3, 4)
    assert labels.tolist() == [1, 0, 0]


def test_a_classifiers_prompt_that_is_too_long_is_cut_as_in_training(
    tiny_bert: BertForSequenceClassification, bracketing: PreTrainedTokenizerFast
) -> None:
    tokenizer = bracketing
    example = Example("a b c d e f g", "LABEL_1")
    classes = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    (batch,) = ProbeInputs.of_examples(tokenizer, [example], classes=classes, tokens=5).batches
    assert tokenizer.convert_ids_to_tokens(batch[0].tolist()) == ["<bos>", "e", "f", "g", "<eos>"]
    (row,) = encoded(tiny_bert, tokenizer, [example], SftSettings(max_length=5))
    assert row.prompt == tuple(batch[0].tolist())


@pytest.mark.parametrize(
    ("example", "classes", "message"),
    [
        (Example("the film", " great"), {"bad": 0, "good": 1}, r"example 2: 'great' is no class .* bad, good"),
        (Example("the film", ""), None, "example 2: its prompt or its answer has no token"),
        (Example("the film", " a b c d e f g h"), None, "example 2: its answer alone has 9 tokens of 8"),
    ],
)
def test_answers_that_are_none(
    tiny_tokenizer: PreTrainedTokenizerFast, example: Example, classes: dict[str, int] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ProbeInputs.of_examples(tiny_tokenizer, [Example("a film", " good"), example], classes=classes, tokens=8)


def test_no_example_is_no_probe(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="no probe text"):
        ProbeInputs.of_examples(tiny_tokenizer, [])
