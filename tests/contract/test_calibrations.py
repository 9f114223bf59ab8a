"""What every calibration promises, whatever it reads."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import MismatchError
from treadle.family.adapter import Adapter, Provenance
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank, save_bank
from treadle.routing.calibration import (
    AnalyticCalibration,
    Calibration,
    OwnCalibration,
    PublicCalibration,
    Statistics,
    TrafficCalibration,
)
from treadle.routing.routed import RoutedModel

Make = Callable[[list[str]], Calibration]

NAMES = ("alpha", "beta", "gamma", "stranger", "zero")


def traffic(texts: list[str]) -> TrafficCalibration:
    return TrafficCalibration(texts, "clinic", minimum_prompts=1, minimum_tokens=1)


CALIBRATIONS: dict[str, Make] = {
    "own": lambda texts: OwnCalibration(dict.fromkeys(NAMES, texts)),
    "public": PublicCalibration,
    "analytic": AnalyticCalibration,
    "traffic": traffic,
}


@pytest.fixture(params=sorted(CALIBRATIONS))
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def calibration(method: str) -> Make:
    return CALIBRATIONS[method]


def members(make: SimpleNamespace, model: Any, names: tuple[str, ...]) -> tuple[Any, list[Adapter]]:
    family = make.family(model)

    def adapter(name: str) -> Adapter:
        if name == "stranger":
            return make.foreign(family, name)
        if name == "zero":
            rows = family.plan.modules
            blank = {module: torch.zeros(row.out_features, row.rank) for module, row in rows.items()}
            return Adapter.of_family(family, name, blank, provenance=Provenance("test"))
        return make.adapter(family, name)

    return family, [adapter(name) for name in names]


def build(
    make: SimpleNamespace, model: Any, tokenizer: Any, calibration: Calibration, names: tuple[str, ...] = NAMES
) -> AdapterBank:
    family, adapters = members(make, model, names)
    return AdapterBank.build(family, adapters, calibration=calibration, model=model, tokenizer=tokenizer)


def statistics_of(bank: AdapterBank) -> Statistics:
    assert bank.statistics is not None
    return bank.statistics


def assert_same_row(one: Statistics, place: int, other: Statistics, there: int) -> None:
    for module in one.mean.keys() & other.mean.keys():
        for mine, theirs in ((one.mean, other.mean), (one.std, other.std)):
            assert torch.equal(mine[module][place].view(torch.int64), theirs[module][there].view(torch.int64))


def test_it_says_what_it_is(
    method: str,
    calibration: Make,
    make: SimpleNamespace,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    bank = build(make, tiny_llama, tiny_tokenizer, calibration(make.passages))
    found = statistics_of(bank)
    assert found.method == method
    assert found.source == {"own": "own", "traffic": "traffic:clinic"}.get(method, "public")
    assert len(found.digest) == (0 if method == "own" else 64)
    assert found.spends_privacy == (method == "own")
    assert found.B_digests == tuple(adapter.digest for adapter in bank.adapters)
    assert len(found.date) == len("2026-01-31")
    words = sum(len(tiny_tokenizer(text)["input_ids"]) - 1 for text in make.passages)  # <bos> does not count
    assert found.tokens == words
    assert bool(found.moments) == (method == "analytic")


def test_untrained_and_absent_modules_are_ineligible(
    calibration: Make, make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bank = build(make, tiny_llama, tiny_tokenizer, calibration(make.passages))
    stranger = bank.adapter("stranger")
    for module, factors in bank.layers.items():
        there = module in stranger.plan.modules
        assert factors.eligible.tolist() == [True, True, True, there, False]
        assert factors.mean[3].isnan().item() is not there
    ids = torch.tensor([[1, 40, 41, 42]])
    model = RoutedModel(tiny_llama, bank, granularity="token")
    assert torch.equal(model(ids, permitted=[{"zero"}]).logits, tiny_llama(ids).logits)


def test_neighbours_and_the_order_of_texts_change_no_bit(
    calibration: Make, make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = statistics_of(build(make, tiny_llama, tiny_tokenizer, calibration(list(make.passages))))
    few = ("stranger", "beta")
    part = statistics_of(build(make, tiny_llama, tiny_tokenizer, calibration(list(make.passages)[::-1]), few))
    for there, name in enumerate(few):
        assert_same_row(whole, NAMES.index(name), part, there)


def test_padding_and_special_tokens_do_not_count(
    calibration: Make, make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = list(make.passages)
    plain = statistics_of(build(make, tiny_llama, tiny_tokenizer, calibration(texts)))
    noisy = statistics_of(build(make, tiny_llama, tiny_tokenizer, calibration([*texts, " ", "<eos> <eos>"])))
    right = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="right",
    )
    turned = statistics_of(build(make, tiny_llama, right, calibration(texts)))
    for other in (noisy, turned):
        assert other.tokens == plain.tokens
        for module in plain.mean:
            # Other batches, other roundings of the float32 model: 1e-6 a norm, more in a small spread.
            assert torch.allclose(other.mean[module], plain.mean[module], rtol=1e-5, equal_nan=True)
            assert torch.allclose(other.std[module], plain.std[module], rtol=1e-4, equal_nan=True)


def test_dropout_is_off_and_the_mode_is_restored(
    calibration: Make,
    make: SimpleNamespace,
    tiny_bert: BertForSequenceClassification,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    calm = statistics_of(build(make, tiny_bert, tiny_tokenizer, calibration(make.passages), ("alpha", "beta")))
    tiny_bert.train()
    found = statistics_of(build(make, tiny_bert, tiny_tokenizer, calibration(make.passages), ("alpha", "beta")))
    assert tiny_bert.training
    for place in (0, 1):
        assert_same_row(calm, place, found, place)


def test_a_calibration_made_for_another_lora_B_is_refused(
    calibration: Make,
    make: SimpleNamespace,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    bank = build(make, tiny_llama, tiny_tokenizer, calibration(make.passages), ("alpha", "beta"))
    found = statistics_of(bank)
    stronger = replace(bank.adapter("beta"), lora_B={m: 2 * B for m, B in bank.adapter("beta").lora_B.items()})
    other = AdapterBank.build(bank.family, [bank.adapter("alpha"), stronger])
    with pytest.raises(MismatchError, match=r"^beta: .* another lora_B; run `treadle bank calibrate`"):
        other.with_statistics(found)
    with pytest.raises(MismatchError, match="alpha: .* another lora_B"):  # taking the digests away is no way round
        other.with_statistics(replace(found, B_digests=("", "")))
    with pytest.raises(MismatchError, match="describes 2 adapters, the bank has 1"):
        bank.remove("beta").with_statistics(found)
    save_bank(bank, tmp_path / "bank")
    content = json.loads((tmp_path / "bank" / "bank.json").read_text())
    content["adapters"][1]["folded_B_sha256"] = stronger.digest  # as a bank would say whose lora_B was exchanged
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="beta: .* another lora_B"):
        load_bank(tmp_path / "bank")


def test_a_folder_keeps_all_of_it(
    calibration: Make,
    make: SimpleNamespace,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    bank = build(make, tiny_llama, tiny_tokenizer, calibration(make.passages))
    found = statistics_of(bank)
    save_bank(bank.with_statistics(replace(found, date="2026-01-31")), tmp_path / "bank")
    opened = statistics_of(load_bank(tmp_path / "bank"))
    for place in range(len(NAMES)):
        assert_same_row(opened, place, found, place)
    assert opened.alike(found)
    assert opened.date == "2026-01-31"
    assert (opened.B_digests, opened.tokens) == (found.B_digests, found.tokens)
    assert opened.moments.keys() == found.moments.keys()
    for module, moments in found.moments.items():
        assert opened.moments[module].count == moments.count
        assert torch.equal(opened.moments[module].mean, moments.mean)
        assert torch.equal(opened.moments[module].scatter, moments.scatter)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e-300, -5.0])
def test_statistics_of_the_forbidden_change_no_bit(
    poison: float,
    calibration: Make,
    make: SimpleNamespace,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    bank = build(make, tiny_llama, tiny_tokenizer, calibration(make.passages), ("alpha", "beta", "gamma"))
    found = statistics_of(bank)

    def poisoned(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {module: torch.where(torch.arange(3) == 1, poison, row) for module, row in values.items()}

    harmed = bank.with_statistics(replace(found, mean=poisoned(dict(found.mean)), std=poisoned(dict(found.std))))
    ids = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]])
    for granularity in ("token", "sequence"):
        answers = [
            RoutedModel(tiny_llama, each, granularity=granularity)(ids, permitted=[{"alpha", "gamma"}] * 2).logits
            for each in (bank, harmed)
        ]
        assert torch.equal(answers[0], answers[1])
