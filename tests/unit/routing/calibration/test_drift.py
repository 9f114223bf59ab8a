"""Drift: none from the same text, and as much as was put in."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import InputError, MismatchError
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import (
    Drift,
    PublicCalibration,
    Statistics,
    TrafficStatistics,
    drift,
    read_traffic,
)

TEXTS = [f"the film is w{i} and not w{i + 1} ? " + "w3 w4 w5 w6 w7 w8 w9 " * 2 for i in range(64)]


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    family = make.family(tiny_llama)
    adapters = [make.adapter(family, "alpha"), make.foreign(family, "stranger")]
    return AdapterBank.build(
        family, adapters, calibration=PublicCalibration(TEXTS), model=tiny_llama, tokenizer=tiny_tokenizer
    )


@pytest.fixture
def seen(bank: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> TrafficStatistics:
    return read_traffic(tiny_llama, tiny_tokenizer, bank.layers, bank.adapters, TEXTS, "clinic")


@pytest.fixture
def statistics(bank: AdapterBank) -> Statistics:
    assert bank.statistics is not None
    return bank.statistics


def moved(statistics: Statistics, shift: float, ratio: float, place: int) -> Statistics:
    """The statistics from which this traffic is off by so many deviations, with so many times the spread."""
    here = torch.arange(2) == place
    std = {m: torch.where(here, values / ratio, values) for m, values in statistics.std.items()}
    mean = {m: torch.where(here, values - shift * std[m], values) for m, values in statistics.mean.items()}
    return replace(statistics, mean=mean, std=std)


def of(found: Drift, name: str) -> tuple[float, float, float]:
    return found.of_adapter(name).shift, found.of_adapter(name).bias, found.of_adapter(name).ratio


def test_modules_that_go_up_and_down_do_not_cancel(
    bank: AdapterBank, statistics: Statistics, seen: TrafficStatistics
) -> None:
    signs = {module: 0.6 * (-1) ** place for place, module in enumerate(statistics.mean)}
    mean = {module: values - signs[module] * statistics.std[module] for module, values in statistics.mean.items()}
    found = drift(replace(statistics, mean=mean), seen, bank.adapters)
    assert len(signs) % 2 == 0
    assert of(found, "alpha") == pytest.approx((0.6, 0.0, 1.0), abs=1e-9)
    assert found.stale_adapters == bank.names


def test_the_same_text_has_not_moved(bank: AdapterBank, statistics: Statistics, seen: TrafficStatistics) -> None:
    found = drift(statistics, seen, bank.adapters)
    assert not found.stale
    for name in bank.names:
        assert of(found, name) == pytest.approx((0.0, 0.0, 1.0), abs=1e-9)
    assert found.kinds[0] == "q_proj"
    assert found.of_kind("down_proj") == pytest.approx((0.0, 0.0), abs=1e-9)


@pytest.mark.parametrize(
    ("shift", "ratio", "stale"),
    [(0.45, 1.0, False), (0.55, 1.0, True), (-0.55, 1.0, True), (0.0, 1.4, False), (0.0, 1.6, True), (0.0, 0.6, True)],
)
def test_the_verdict_is_the_stated_one(
    shift: float, ratio: float, stale: bool, bank: AdapterBank, statistics: Statistics, seen: TrafficStatistics
) -> None:
    found = drift(moved(statistics, shift, ratio, 1), seen, bank.adapters)
    assert of(found, "stranger") == pytest.approx((abs(shift), shift, max(ratio, 1 / ratio)), abs=1e-9)
    assert of(found, "alpha") == pytest.approx((0.0, 0.0, 1.0), abs=1e-9)
    assert found.stale_adapters == (("stranger",) if stale else ())
    lenient = drift(moved(statistics, shift, ratio, 1), seen, bank.adapters, shift_limit=1.0, ratio_limit=2.0)
    assert not lenient.stale


def test_an_adapter_without_statistics_is_stale(
    bank: AdapterBank, statistics: Statistics, seen: TrafficStatistics
) -> None:
    unknown = {m: torch.where(torch.arange(2) == 0, torch.nan, values) for m, values in statistics.mean.items()}
    found = drift(replace(statistics, mean=unknown, B_digests=("", statistics.B_digests[1])), seen, bank.adapters)
    assert found.stale_adapters == ("alpha",)


def test_traffic_of_other_adapters_says_nothing(
    bank: AdapterBank, statistics: Statistics, seen: TrafficStatistics
) -> None:
    with pytest.raises(MismatchError, match="alpha: the traffic was read with another lora_B"):
        drift(statistics, replace(seen, adapters=dict(seen.adapters) | {"alpha": "0" * 64}), bank.adapters)
    with pytest.raises(InputError, match="24 more prompts"):
        drift(statistics, replace(seen, prompts=40), bank.adapters)
