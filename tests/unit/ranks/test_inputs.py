import pytest
import torch
from transformers import PreTrainedTokenizerFast

from treadle.errors import InputError
from treadle.ranks.inputs import ProbeInputs


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
        (["yes no", ""], 32, 8, "probe text 2 has fewer than two tokens"),
        (["yes"], 1, 8, "1 tokens"),
        (["yes"], 32, 0, "batches of 0"),
    ],
)
def test_wrong_texts_are_one_line(
    tiny_tokenizer: PreTrainedTokenizerFast, texts: list[str], tokens: int, batch: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ProbeInputs.of_texts(tiny_tokenizer, texts, tokens=tokens, batch=batch)
