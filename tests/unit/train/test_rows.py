"""Examples become token numbers: apart, ended, cut from the left, and refused where nothing can be learnt."""

import copy
from collections import Counter

import pytest
from tokenizers import normalizers
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from treadle.data.prompts import Example
from treadle.errors import InputError
from treadle.train.rows import Row, data_sha256, digest, encoded, mixed, shuffled, within_budget
from treadle.train.settings import SftSettings

SETTINGS = SftSettings()


def test_a_row_is_the_prompt_and_the_completion_with_its_end(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,) = encoded(tiny_llama, tiny_tokenizer, [Example("the film is", " good")], SETTINGS)
    names = tiny_tokenizer.convert_ids_to_tokens([*row.prompt, *row.target])
    assert names == ["<bos>", "the", "film", "is", "good", "<eos>"]
    assert (len(row.prompt), len(row.target), row.tokens, row.truncated) == (4, 2, 6, False)


def test_what_is_too_long_loses_the_beginning_of_its_prompt_but_not_its_bos(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,) = encoded(tiny_llama, tiny_tokenizer, [Example("a b c d e f", " good")], SftSettings(max_length=5))
    assert tiny_tokenizer.convert_ids_to_tokens([*row.prompt, *row.target]) == ["<bos>", "e", "f", "good", "<eos>"]
    assert row.truncated


def test_with_room_for_one_token_only_the_last_stays(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,) = encoded(tiny_llama, tiny_tokenizer, [Example("a b c", " good")], SftSettings(max_length=3))
    assert tiny_tokenizer.convert_ids_to_tokens(list(row.prompt)) == ["c"]


def test_the_models_own_positions_are_a_limit(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,) = encoded(tiny_llama, tiny_tokenizer, [Example("a " * 300, " good")], SETTINGS)
    assert row.tokens == tiny_llama.config.max_position_embeddings


def test_an_encoder_decoder_keeps_the_limit_for_either_side(
    tiny_t5: T5ForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,) = encoded(tiny_t5, tiny_tokenizer, [Example("a b c", "good film")], SftSettings(max_length=4))
    assert (len(row.prompt), len(row.target), row.truncated) == (4, 3, False)


def test_a_classifiers_target_is_the_number_of_its_class(
    tiny_bert: BertForSequenceClassification, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,) = encoded(tiny_bert, tiny_tokenizer, [Example("a b", " LABEL_2")], SETTINGS)
    assert row.target == (2,)


@pytest.mark.parametrize(
    ("example", "settings", "message"),
    [
        (Example("a", ""), {}, "example 2: its completion is empty; drop it"),
        (Example("a", " \n"), {}, "example 2: its completion is empty"),
        (Example("a", "~"), {}, "example 2: its completion has no token"),
        (Example("a", " b c d e f g"), {"max_length": 6}, "example 2: its completion alone has 7 tokens of 6"),
        (Example("a", " b c d e f"), {"max_length": 6}, "example 2: its completion alone has 6 tokens of 6"),
        (Example("a b c d e", " f"), {"max_length": 6, "overlong": "refuse"}, "example 2: it has 8 tokens, at most 6"),
    ],
)
def test_what_cannot_be_learnt_is_refused_by_number(
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    example: Example,
    settings: dict[str, object],
    message: str,
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(InputError, match=message):
        encoded(tiny_llama, tokenizer, [Example("a", " b"), example], SftSettings(**settings))


def test_no_example_at_all_is_refused(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="there is no example to train on"):
        encoded(tiny_llama, tiny_tokenizer, [], SETTINGS)


def test_an_unknown_class_is_refused_with_the_known_ones(
    tiny_bert: BertForSequenceClassification, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(InputError, match="example 1: 'bad' is no class of the model; choose among LABEL_0, LABEL_1"):
        encoded(tiny_bert, tiny_tokenizer, [Example("a", " bad")], SETTINGS)


def test_a_tokenizer_without_an_end_of_sequence_is_refused(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end of sequence"):
        encoded(tiny_llama, tokenizer, [Example("a", " b")], SETTINGS)


ROWS = [Row((1,) * (i % 5 + 1), (2, 2)) for i in range(20)]


def test_the_budget_counts_every_epoch_and_is_never_passed() -> None:
    for budget in (10, 33, 60, 1000):
        for epochs in (1, 2):
            kept = within_budget(ROWS, SftSettings(max_tokens=budget, epochs=epochs, seed=4))
            spent = epochs * sum(ROWS[i].tokens for i in kept)
            assert spent <= budget
            assert len(kept) == 20 or spent + epochs * 7 > budget
            assert len(set(kept)) == len(kept)


def test_the_budget_draws_from_all_rows_and_keeps_its_draws_as_it_grows() -> None:
    small, large = (within_budget(ROWS, SftSettings(max_tokens=tokens, seed=4)) for tokens in (30, 60))
    assert large[: len(small)] == small
    assert max(small) > 10  # not the head of a sorted file


def test_a_budget_below_one_example_is_refused() -> None:
    with pytest.raises(InputError, match="max_tokens = 2 is less than one example needs"):
        within_budget(ROWS, SftSettings(max_tokens=2))


def test_an_order_is_a_function_of_seed_and_name() -> None:
    assert shuffled(10, 0, "golden") == [1, 0, 7, 8, 5, 3, 6, 9, 4, 2]
    assert shuffled(10, 1, "golden") != shuffled(10, 0, "golden") != shuffled(10, 0, "silver")


TRAINED, BARE, OTHER = (
    [Example(f"{form} {i}", f" {i}") for i in range(40)] for form in ("classify", "", "which class?")
)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_examples_drops_the_instruction(share: float) -> None:
    examples = mixed(TRAINED, (BARE, share), seed=1)
    assert [example.completion for example in examples] == [example.completion for example in TRAINED]
    assert Counter(example in BARE for example in examples)[True] == 40 * share


def test_who_drops_it_is_drawn_from_the_seed() -> None:
    assert mixed(TRAINED, (BARE, 0.5), seed=1) == mixed(TRAINED, (BARE, 0.5), seed=1)
    assert mixed(TRAINED, (BARE, 0.5), seed=1) != mixed(TRAINED, (BARE, 0.5), seed=2)


def test_each_other_form_gets_its_share_and_none_takes_anothers_place() -> None:
    examples = mixed(TRAINED, (BARE, 0.5), (OTHER, 0.25), seed=1)
    assert [example.completion for example in examples] == [example.completion for example in TRAINED]
    assert [sum(example in form for example in examples) for form in (TRAINED, BARE, OTHER)] == [10, 20, 10]
    alone = mixed(TRAINED, (BARE, 0.5), seed=1)
    assert [e in BARE for e in alone] == [e in BARE for e in examples]


def test_mixing_refuses_lists_that_are_no_pairs_and_shares_that_are_none() -> None:
    with pytest.raises(InputError, match="40 examples stand beside 39 in another form"):
        mixed(TRAINED, (BARE[1:], 0.5), seed=1)
    with pytest.raises(InputError, match=r"share of another form is 1\.5; it must be in"):
        mixed(TRAINED, (BARE, 1.5), seed=1)
    with pytest.raises(InputError, match="add up to more than 1"):
        mixed(TRAINED, (BARE, 0.5), (OTHER, 0.6), seed=1)


def test_the_digest_tells_where_the_prompt_ends() -> None:
    assert digest([Row((1, 2), (3,))]) != digest([Row((1,), (2, 3))])
    assert digest(ROWS) == digest(list(ROWS))


def test_the_datas_digest_is_one_of_their_texts_in_order() -> None:
    assert data_sha256(TRAINED) == data_sha256(list(TRAINED)) != data_sha256(TRAINED[::-1])
    assert data_sha256([Example("a", "bc")]) != data_sha256([Example("ab", "c")])
    assert data_sha256([Example("a", "b", label="x")]) == data_sha256([Example("a", "b")])
