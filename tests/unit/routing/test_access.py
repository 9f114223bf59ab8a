"""Law 4: forbidden adapters change nothing, and every mistake about permission is an error."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import AccessError
from treadle.family.injection import inject
from treadle.routing.access import permitted_mask
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank, save_bank
from treadle.routing.decision import BASE
from treadle.routing.factors import LayerFactors
from treadle.routing.routed import RoutedModel
from treadle.routing.scorers import SCORERS

SETTINGS = [(scorer, granularity) for scorer in SCORERS for granularity in ("token", "sequence")]
IDS = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]])
ALLOWED = [{"beta", "delta"}, {"delta"}]
FORBIDDEN = (0, 2, 4)  # alpha, gamma, and the stranger


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    return make.bank(tiny_llama, tiny_tokenizer)


def poisoned(bank: AdapterBank, value: float) -> AdapterBank:
    """The bank with all that is known of its forbidden adapters replaced."""
    return replace(
        bank,
        layers=MappingProxyType({module: poisoned_layer(factors, value) for module, factors in bank.layers.items()}),
    )


def poisoned_layer(factors: LayerFactors, value: float) -> LayerFactors:
    groups = []
    for group in factors.groups:
        rows = [row for row, column in enumerate(group.columns.tolist()) if column in FORBIDDEN]
        grams, norms = group.grams.clone(), group.norms.clone()
        grams[rows], norms[rows] = value, value
        A = torch.full_like(group.A, value) if group.columns.tolist() == [4] else group.A
        groups.append(replace(group, grams=grams, norms=norms, A=A))
    mean, std = factors.mean.clone(), factors.std.clone()
    mean[list(FORBIDDEN)], std[list(FORBIDDEN)] = value, value

    def folded_B(adapter: int) -> torch.Tensor:
        B = factors.folded_B(adapter)
        return torch.full_like(B, value) if adapter in FORBIDDEN else B

    return replace(factors, groups=tuple(groups), mean=mean, std=std, folded_B=folded_B)


def with_poisoned_directions(model: RoutedModel, value: float) -> RoutedModel:
    for layer in model.layers.values():
        if layer.factors.directions is not None:
            directions = layer.factors.directions.clone()
            directions[list(FORBIDDEN)] = value
            layer.factors = replace(layer.factors, directions=directions)
    return model


def everything(model: RoutedModel) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Logits, generated ids and the trace of one fixed set of calls."""
    with torch.inference_mode(), model.trace() as trace:
        logits = model(IDS, permitted=ALLOWED).logits
        ids = model.generate(IDS, permitted=ALLOWED, max_new_tokens=4, do_sample=False)
    return logits, ids, json.dumps(trace.to_json(), allow_nan=False) + repr([trace.shares(0), trace.tokens(1)])


@pytest.mark.filterwarnings("ignore:.*SVD.*")
@pytest.mark.parametrize(("scorer", "granularity"), SETTINGS)
def test_poison_in_forbidden_adapters_changes_no_bit(
    scorer: str, granularity: Any, bank: AdapterBank, tiny_llama: LlamaForCausalLM
) -> None:
    clean = RoutedModel(tiny_llama, bank, scorer=scorer, granularity=granularity)
    expected = everything(clean)
    clean.unwrap()
    for value in (torch.nan, torch.inf, -torch.inf, 1e30, 0.0):
        if scorer == "arrow":  # its directions are made of B when the model is wrapped, so they are poisoned after
            model = with_poisoned_directions(
                RoutedModel(tiny_llama, bank, scorer=scorer, granularity=granularity), value
            )
        else:
            model = RoutedModel(tiny_llama, poisoned(bank, value), scorer=scorer, granularity=granularity)
        found = everything(model)
        model.unwrap()
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert found[2] == expected[2]


@pytest.mark.parametrize(("scorer", "granularity"), SETTINGS)
def test_poison_in_permitted_adapters_is_felt(
    scorer: str, granularity: Any, bank: AdapterBank, tiny_llama: LlamaForCausalLM
) -> None:
    """The test above would notice: without a permitted set the same poison changes the outputs."""
    clean = RoutedModel(tiny_llama, bank, scorer=scorer, granularity=granularity)
    expected = clean(IDS).logits
    clean.unwrap()
    if scorer == "arrow":
        model = with_poisoned_directions(RoutedModel(tiny_llama, bank, scorer=scorer, granularity=granularity), 1e30)
    else:
        model = RoutedModel(tiny_llama, poisoned(bank, 1e30), scorer=scorer, granularity=granularity)
    assert not torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(("scorer", "granularity"), SETTINGS)
def test_forbidding_is_like_not_having(
    scorer: str, granularity: Any, bank: AdapterBank, tiny_llama: LlamaForCausalLM
) -> None:
    smaller = bank.remove("alpha").remove("gamma").remove("stranger")
    masked = RoutedModel(tiny_llama, bank, scorer=scorer, granularity=granularity)
    with masked.trace() as trace, torch.inference_mode():
        expected = masked(IDS, permitted=[{"beta", "delta"}] * 2).logits
    without = RoutedModel(tiny_llama, smaller, scorer=scorer, granularity=granularity)
    with without.trace() as other, torch.inference_mode():
        found = without(IDS).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert [other.winners(row) for row in (0, 1)] == [trace.winners(row) for row in (0, 1)]
    assert [other.shares(row) for row in (0, 1)] == [trace.shares(row) for row in (0, 1)]


@pytest.mark.parametrize(("scorer", "granularity"), SETTINGS)
def test_an_empty_set_is_the_base_exactly(
    scorer: str, granularity: Any, bank: AdapterBank, tiny_llama: LlamaForCausalLM
) -> None:
    expected = tiny_llama(IDS).logits
    model = RoutedModel(tiny_llama, bank, scorer=scorer, granularity=granularity)
    assert torch.equal(model(IDS, permitted=[set(), set()]).logits, expected)
    mixed = model(IDS, permitted=[set(), {"beta"}]).logits
    assert torch.allclose(mixed[0], expected[0], atol=1e-6)
    assert not torch.allclose(mixed[1], expected[1], atol=1e-3)


@pytest.mark.parametrize("call", ["forward", "generate", "choose"])
def test_mistakes_are_errors(
    call: str, make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer, access="required"))
    run: Callable[..., Any] = model if call == "forward" else getattr(model, call)
    if call == "generate":
        run = partial(run, max_new_tokens=1, do_sample=False)
    for permitted, message in [
        (None, "requires a set"),
        ([{"beta"}, None], "requires a set"),
        ([{"beta"}], "1 permitted sets for 2 rows"),
        ([{"beta"}] * 3, "3 permitted sets for 2 rows"),
        ([{"beta"}, {"omega"}], "unknown adapter 'omega'"),
        ([{"beta"}, "beta"], "a string is not a set"),
        ("beta", "a string is not a set"),
    ]:
        with pytest.raises(AccessError, match=message):
            run(IDS, permitted=permitted)
    assert run(IDS, permitted=[{"beta"}, []]) is not None


def test_a_choice_does_not_outlive_the_rights_it_was_made_under(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM
) -> None:
    base = tiny_llama(IDS).logits
    model = RoutedModel(tiny_llama, bank)
    chosen = model.choose(IDS)
    others = [set(bank.names) - {bank.names[int(place)]} for place in chosen.winner]
    assert torch.equal(model(IDS, permitted=others, chosen=chosen).logits, base)
    assert not torch.equal(model(IDS, chosen=chosen).logits, base)


def test_access_survives_the_disk(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    save_bank(make.bank(tiny_llama, tiny_tokenizer, access="required"), tmp_path / "bank")
    with pytest.raises(AccessError, match="requires a set"):
        RoutedModel(tiny_llama, load_bank(tmp_path / "bank"))(IDS)


def test_the_mask() -> None:
    names = ("a", "b", "c")
    assert permitted_mask(names, None, rows=2, required=False) is None
    mask = permitted_mask(names, [{"b"}, None, ["a", "c"], []], rows=4, required=False)
    assert mask is not None
    assert mask.tolist() == [[False, True, False], [True] * 3, [True, False, True], [False] * 3]


def test_choices_are_permitted_ones_for_every_row(bank: AdapterBank, tiny_llama: LlamaForCausalLM) -> None:
    model = RoutedModel(tiny_llama, bank, granularity="token")
    sets: list[Mapping[str, None]] = [dict.fromkeys(["alpha", "gamma"]), dict.fromkeys(["stranger"])]
    with model.trace() as trace:
        model(IDS, permitted=sets)
    for row, allowed in enumerate(sets):
        seen = {name for names in trace.winners(row).values() for name in names}
        assert seen <= {*allowed, None}
        runners = {trace.name(int(i)) for parts in trace.layers.values() for part in parts for i in part.runner_up[row]}
        assert runners <= {*allowed, None}
    decision = model.choose(IDS, permitted=[set(), {"delta"}])
    assert decision.winner.tolist() == [BASE, 3]
    assert decision.runner_up.tolist() == [BASE, BASE]


def test_one_adapter_permitted_is_that_adapter_in_each_row_of_its_own(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM
) -> None:
    model = RoutedModel(tiny_llama, bank, granularity="token")
    routed = model(IDS, permitted=[{"alpha"}, {"beta"}]).logits
    for row, name in enumerate(["alpha", "beta"]):
        adapter = bank.adapter(name)
        with inject(tiny_llama, adapter.lora_A, adapter.folded()):
            assert torch.allclose(tiny_llama(IDS[row : row + 1]).logits[0], routed[row], atol=1e-5)
