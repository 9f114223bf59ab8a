"""Traffic: aggregates that merge, and not a word of any prompt."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import FormatError, InputError, MismatchError
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import TrafficCalibration, TrafficStatistics, read_traffic

PROMPTS = [f"the film is w{i} and not w{i + 1} ?" for i in range(64)]


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM) -> AdapterBank:
    family = make.family(tiny_llama)
    return AdapterBank.build(family, [make.adapter(family, "alpha"), make.foreign(family, "stranger")])


def read(
    bank: AdapterBank,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str] | list[list[int]],
    tenant: str = "clinic",
) -> TrafficStatistics:
    return read_traffic(model, tokenizer, bank.layers, bank.adapters, prompts, tenant)


def assert_alike(one: TrafficStatistics, other: TrafficStatistics, rtol: float) -> None:
    assert (one.tenant, one.prompts, one.tokens) == (other.tenant, other.prompts, other.tokens)
    for module, moments in one.moments.items():
        assert torch.allclose(moments.mean, other.moments[module].mean, rtol=rtol, equal_nan=True)
        assert torch.allclose(moments.std, other.moments[module].std, rtol=10 * rtol, equal_nan=True)


def test_several_servers_are_one(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = read(bank, tiny_llama, tiny_tokenizer, PROMPTS)
    parts = [read(bank, tiny_llama, tiny_tokenizer, part) for part in (PROMPTS[:10], PROMPTS[10:40], PROMPTS[40:])]
    for place, part in enumerate(parts):
        part.save(tmp_path / f"{place}.safetensors")
    opened = [TrafficStatistics.load(tmp_path / f"{place}.safetensors") for place in range(3)]
    assert_alike(opened[0].merge(opened[1]).merge(opened[2]), whole, rtol=1e-5)  # other batches of a float32 model
    assert_alike(opened[2].merge(opened[0].merge(opened[1])), whole, rtol=1e-5)
    assert opened[0].date == parts[0].date


def test_token_ids_are_as_good_as_text(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert_alike(
        read(bank, tiny_llama, tiny_tokenizer, ids), read(bank, tiny_llama, tiny_tokenizer, PROMPTS), rtol=1e-15
    )


def test_nothing_of_a_prompt_is_written(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    read(bank, tiny_llama, tiny_tokenizer, PROMPTS).save(tmp_path / "t.safetensors")
    assert b"film" not in (tmp_path / "t.safetensors").read_bytes()
    numbers = sum(value.numel() for value in load_file(tmp_path / "t.safetensors").values())
    assert numbers == 2 * len(bank.layers) * len(bank.adapters)  # a mean and a spread, whatever the prompts


def test_too_little_traffic_says_how_much_is_missing(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = read(bank, tiny_llama, tiny_tokenizer, PROMPTS[:40]).tokens
    calibration = TrafficCalibration(PROMPTS[:40], "clinic")
    with pytest.raises(InputError, match=f"traffic:clinic: .*: 24 more prompts and {1024 - tokens} more tokens needed"):
        bank.calibrate(calibration, model=tiny_llama, tokenizer=tiny_tokenizer)
    enough = TrafficCalibration(PROMPTS[:40], "clinic", minimum_prompts=40, minimum_tokens=tokens)
    found = bank.calibrate(enough, model=tiny_llama, tokenizer=tiny_tokenizer)
    assert found.statistics is not None
    assert found.statistics.source == "traffic:clinic"
    assert bank.statistics is None  # a new bank came back


def test_what_does_not_belong_together_is_not_merged(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    one = read(bank, tiny_llama, tiny_tokenizer, PROMPTS[:4])
    with pytest.raises(MismatchError, match="of another tenant or of other adapters"):
        one.merge(replace(one, tenant="bakery"))
    with pytest.raises(MismatchError, match="of another tenant or of other adapters"):
        one.merge(replace(one, adapters=dict(one.adapters) | {"alpha": "0" * 64}))
    with pytest.raises(InputError, match="cannot be a name"):
        TrafficCalibration(PROMPTS, "../clinic")


def test_an_adapter_that_changed_since_is_unknown(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> None:
    seen = read(bank, tiny_llama, tiny_tokenizer, PROMPTS)
    old = bank.adapter("alpha")
    changed = bank.update(replace(old, lora_B={module: 2 * B for module, B in old.lora_B.items()}))
    found = seen.statistics(changed.adapters, minimum_tokens=1)
    assert found.B_digests == ("", bank.adapter("stranger").digest)
    assert all(bool(mean[0].isnan()) for mean in found.mean.values())
    assert changed.with_statistics(found).layers[next(iter(found.mean))].eligible.tolist()[0] is False


def test_a_file_that_is_no_traffic_is_refused(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputError, match="no such file"):
        TrafficStatistics.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="no traffic file"):
        TrafficStatistics.load(path)
    read(bank, tiny_llama, tiny_tokenizer, PROMPTS[:4]).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FormatError, match="no traffic file"):
        TrafficStatistics.load(path)


def test_two_readings_are_not_of_one_source(
    bank: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> None:
    one, other = [
        read(bank, tiny_llama, tiny_tokenizer, prompts).statistics(bank.adapters, minimum_prompts=1, minimum_tokens=1)
        for prompts in (PROMPTS[:32], PROMPTS[32:])
    ]
    assert one.alike(one)
    assert not one.alike(other)
    alone = AdapterBank.build(bank.family, [make.adapter(bank.family, "beta")])
    calibration = TrafficCalibration(PROMPTS[:32], "clinic", minimum_prompts=1, minimum_tokens=1)
    late = alone.calibrate(calibration, model=tiny_llama, tokenizer=tiny_tokenizer)
    found = bank.with_statistics(other).merge(late).statistics
    assert found is not None
    assert found.B_digests == (*other.B_digests, "")  # beta's norms are on other prompts than the others'
