"""One prompt through a bank: the record agrees with what the routed model does."""

from pathlib import Path

import pytest
import torch

from treadle.errors import AccessError, InputError
from treadle.models.loading import load_model, load_tokenizer
from treadle.recipes.route import RouteSettings, route
from treadle.routing.bank_files import load_bank
from treadle.routing.routed import RoutedModel

TEXT = "the film is not good, why?"


def test_sequence_names_the_choice_and_its_evidence(built_bank: Path) -> None:
    result = route(built_bank, TEXT, RouteSettings(max_new_tokens=3, compare_base=True, abstain=1.0))
    assert result.choice is not None
    last = result.tokens[-1].running
    ranked = sorted(last, key=lambda name: -last[name])
    assert [result.choice.winner, result.choice.runner_up] == ranked[:2]
    assert result.choice.margin == pytest.approx(last[ranked[0]] - last[ranked[1]], abs=1e-5)
    assert result.tokens[0].text == "<bos>"
    assert not result.tokens[0].counted
    assert [token.text.strip() for token in result.tokens[1:4]] == ["the", "film", "is"]
    assert len(result.layers) == 3  # of the first of two blocks, which chooses
    assert result.continuation is not None
    assert result.base_continuation is not None


def test_a_prompt_that_is_nobodys_is_left_to_the_base(built_bank: Path) -> None:
    asked = RouteSettings(max_new_tokens=0, abstain=0.0)
    result = route(built_bank, TEXT, asked)
    assert result.choice is not None
    assert result.choice.winner is None
    last = result.tokens[-1].running
    assert result.choice.runner_up == max(last, key=lambda name: last[name])
    assert result.choice.chance is not None
    assert 0.0 < result.choice.chance <= 1.0


def test_token_shares_are_the_trace(built_bank: Path, small_fleet: Path) -> None:
    result = route(built_bank, TEXT, RouteSettings(granularity="token", max_new_tokens=0))
    base = str(small_fleet / "base")
    model = RoutedModel(load_model(base), load_bank(built_bank), granularity="token")
    ids = load_tokenizer(base)(TEXT, return_tensors="pt")["input_ids"]
    with torch.inference_mode(), model.trace() as trace:
        model(ids)
    assert [dict(token.shares) for token in result.tokens] == trace.tokens(0)
    assert all(sum(token.shares.values()) == pytest.approx(1.0) for token in result.tokens)
    assert {layer.module: list(layer.winners) for layer in result.layers} == trace.winners(0)
    assert result.choice is None
    assert result.continuation is None


def test_the_continuation_is_that_of_generate(built_bank: Path, small_fleet: Path) -> None:
    result = route(built_bank, TEXT, RouteSettings(permitted=frozenset({"films"}), max_new_tokens=4))
    base = str(small_fleet / "base")
    tokenizer, model = load_tokenizer(base), RoutedModel(load_model(base), load_bank(built_bank))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    made = model.generate(ids, permitted=[{"films"}], max_new_tokens=4, do_sample=False)
    assert result.continuation == tokenizer.decode(made[0][ids.shape[1] :], skip_special_tokens=True)


def test_the_forbidden_are_nowhere_in_the_result(built_bank: Path) -> None:
    for granularity in ("sequence", "token"):
        permitted = frozenset({"films", "sums"})
        settings = RouteSettings(granularity=granularity, permitted=permitted, max_new_tokens=0)
        result = route(built_bank, TEXT, settings)
        assert result.adapters == ("sums", "films")
        assert "colours" not in repr(result)


def test_nobody_permitted_is_the_base(built_bank: Path) -> None:
    settings = RouteSettings(permitted=frozenset(), max_new_tokens=3, compare_base=True)
    result = route(built_bank, TEXT, settings)
    assert result.choice is not None
    assert result.choice.winner is None
    assert result.continuation == result.base_continuation


def test_a_scorer_that_mixes_names_no_winner(built_bank: Path) -> None:
    result = route(built_bank, TEXT, RouteSettings(scorer="mean", max_new_tokens=0))
    assert result.settings.granularity == "token"
    assert not any(token.shares for token in result.tokens)


@pytest.mark.parametrize(
    ("text", "settings", "error", "match"),
    [
        ("  ", RouteSettings(), InputError, "the text is empty"),
        (TEXT, RouteSettings(max_new_tokens=-1), InputError, "max_new_tokens is -1"),
        (TEXT, RouteSettings(scorer="best"), InputError, "no such scorer"),
        (TEXT, RouteSettings(permitted=frozenset({"nosuch"})), AccessError, "unknown adapter"),
    ],
)
def test_refusals(built_bank: Path, text: str, settings: RouteSettings, error: type[InputError], match: str) -> None:
    with pytest.raises(error, match=match):
        route(built_bank, text, settings)
