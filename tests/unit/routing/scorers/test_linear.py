"""The trained router: a minimum of what it minimises, tuned on validation, stored, and blind to the forbidden."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import FormatError, InputError
from treadle.logistic import PENALTIES
from treadle.routing.bank import AdapterBank
from treadle.routing.routed import RoutedModel
from treadle.routing.scorers.linear import LinearRouter, fit, linear, pooled

# Prompts of two adapters that share no content word, so that pooled activations tell them apart.
TRAIN = {
    "alpha": [f"the film is good w{20 + i}" for i in range(8)],
    "beta": [f"who where when number w{20 + i}" for i in range(8)],
}
VALIDATION = {
    "alpha": [f"film good the is w{40 + i}" for i in range(4)],
    "beta": [f"number where when who w{40 + i}" for i in range(4)],
}


@pytest.fixture
def router(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> LinearRouter:
    base = make.family(tiny_llama).base
    return fit(tiny_llama, tiny_tokenizer, base=base, train=TRAIN, validation=VALIDATION)


def test_it_learns_whose_prompts_are_whose(
    router: LinearRouter, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> None:
    assert router.accuracy == 1.0
    assert router.penalty == max(PENALTIES)  # the strongest of those that tie
    model = RoutedModel(tiny_llama, bank := make.bank(tiny_llama, tiny_tokenizer), scorer=linear(router, bank))
    for name, texts in VALIDATION.items():
        ids = tiny_tokenizer(texts, return_tensors="pt", padding=True)
        decision = model.choose(ids["input_ids"], ids["attention_mask"])
        assert [bank.names[place] for place in decision.winner.tolist()] == [name] * len(texts)
        # It knows two of the bank's five adapters, so one of these is all there is to come second.
        assert {bank.names[place] for place in decision.runner_up.tolist()} == {"alpha", "beta"} - {name}


def test_a_forbidden_adapter_leaves_no_trace_in_the_score(
    router: LinearRouter, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> None:
    """The probabilities are over the permitted, so nothing of the others moves even a margin."""
    bank: AdapterBank = make.bank(tiny_llama, tiny_tokenizer)
    names = ("alpha", "beta", "gamma")
    weight = torch.randn(3, 32)
    three = replace(router, names=names, weight=weight, bias=torch.zeros(3))
    spoilt = replace(three, weight=torch.cat([weight[:2], torch.full((1, 32), torch.nan)]))
    ids = torch.tensor([[1, 40, 41, 42]])
    found = []
    for each in (three, spoilt):
        model = RoutedModel(tiny_llama, bank, scorer=linear(each, bank))
        found.append(model.choose(ids, permitted=[{"alpha", "beta", "stranger"}]))
        model.unwrap()
    assert torch.equal(found[0].winner, found[1].winner)
    assert torch.equal(found[0].margin, found[1].margin)
    assert bool(found[0].margin.isfinite().all())


def test_the_features_are_the_mean_over_what_counts(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.tensor([[0, 0, 1, 40, 41], [1, 50, 51, 52, 53]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = pooled(tiny_llama, ids, mask, (0, 1, 2))
    for row, (start, first) in enumerate(((2, 1), (0, 1))):  # padding and <bos> do not count
        states = tiny_llama.model(input_ids=ids[row : row + 1, start:]).last_hidden_state[0]
        torch.testing.assert_close(found[row], states[first:].mean(0), rtol=0, atol=1e-5)


def test_it_is_stored_and_read_back(router: LinearRouter, tmp_path: Path) -> None:
    router.save(tmp_path / "router")
    again = LinearRouter.load(tmp_path / "router")
    for part in ("shift", "scale", "weight", "bias"):
        assert torch.equal(getattr(again, part), getattr(router, part))
    for part in ("base", "names", "ignored", "penalty", "accuracy"):
        assert getattr(again, part) == getattr(router, part)
    with pytest.raises(InputError, match="exists"):
        router.save(tmp_path / "router")


WRONG = [("format", "x", "format"), ("names", ["alpha"], "weights"), ("base", 1, "missing or wrong")]


@pytest.mark.parametrize(("key", "value", "said"), WRONG)
def test_a_damaged_folder_is_refused(router: LinearRouter, tmp_path: Path, key: str, value: object, said: str) -> None:
    router.save(tmp_path / "router")
    path = tmp_path / "router" / "router.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(FormatError, match=said):
        LinearRouter.load(tmp_path / "router")


def test_too_little_to_learn_from(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> None:
    base = make.family(tiny_llama).base
    for train, validation in (({"alpha": ["a"]}, {"alpha": ["a"]}), (TRAIN, {"alpha": ["a"]})):
        with pytest.raises(InputError, match="needs prompts of two adapters"):
            fit(tiny_llama, tiny_tokenizer, base=base, train=train, validation=validation)
