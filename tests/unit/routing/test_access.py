"""Permitted sets: every mistake is an error, and what was chosen stays within them.

That forbidden adapters change nothing is `tests/contract/test_access.py`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
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
from treadle.routing.routed import RoutedModel

IDS = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]])


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    return make.bank(tiny_llama, tiny_tokenizer)


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
    model = RoutedModel(tiny_llama, bank, abstain=1.0)
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
    decision = RoutedModel(tiny_llama, bank, abstain=1.0).choose(IDS, permitted=[set(), {"delta"}])
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
