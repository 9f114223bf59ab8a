"""Statistics of public prompts: weights that are optimal for the covariance they saw, every adapter's its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank, save_bank
from treadle.routing.calibration import PromptStatistics, PublicCalibration
from treadle.routing.calibration.prompts import SHRINKAGE, layer_weights, prompt_statistics

MODULES = ("a", "b", "c")


def table(prompts: int = 400) -> Tensor:
    """Scores of three layers: the first two say nearly the same, the third is on its own and noisier."""
    draw = torch.Generator().manual_seed(3)
    shared, noise = torch.randn(prompts, 1, generator=draw), torch.randn(prompts, 3, generator=draw)
    return (torch.cat([shared, shared, 1.5 * noise[:, 2:]], 1) + 0.1 * noise).double()


def test_the_weights_are_the_best_for_a_common_shift() -> None:
    """Among weights of sum 1, the inverse covariance's have the least variance: a property of its definition."""
    scores = table()
    covariance = torch.cov(scores.T, correction=0)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(3)
    w = layer_weights(scores)
    assert float(w.sum()) == pytest.approx(1.0, abs=1e-12)
    for other in torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)):
        rival = w + (other - other.mean())  # any other weights of sum 1
        assert float(rival @ shrunk @ rival) > float(w @ shrunk @ w)
    assert float(w[0]) == pytest.approx(float(w[1]), rel=0.05)  # twins share, up to their own little noise


def test_layers_that_do_not_vary_weigh_the_same() -> None:
    assert layer_weights(torch.ones(5, 4, dtype=torch.float64)).tolist() == [0.25] * 4
    assert layer_weights(torch.randn(1, 2, dtype=torch.float64)).tolist() == [0.5, 0.5]


def statistics(norms: Tensor, *, places: tuple[int, ...] = (0, 1)) -> PromptStatistics:
    mean = {module: torch.ones(2, dtype=torch.float64) for module in MODULES}
    passages = {(module, place): norms[:, i] * (1 + place) for i, module in enumerate(MODULES) for place in places}
    return prompt_statistics(passages, mean, mean, reading=set(MODULES))


def test_scores_are_deviations_of_public_prompts() -> None:
    norms = table() + 9.0
    found = statistics(norms)
    assert set(found.weight) == set(MODULES)
    scores = norms - 1.0  # z of mean 1 and deviation 1
    summed = torch.stack([found.weight[module][0] * scores[:, i] for i, module in enumerate(MODULES)]).sum(0)
    torch.testing.assert_close(summed - found.centre[0], found.public[:, 0])
    assert float(found.public[:, 0].mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(found.public[:, 0].std(correction=0)) == pytest.approx(1.0, abs=1e-9)


def test_an_adapter_of_which_nothing_was_read_is_unknown() -> None:
    found = statistics(table() + 9.0, places=(1,))
    assert bool(found.centre[0].isnan())
    assert bool(found.public[:, 0].isnan().all())
    assert bool(found.public[:, 1].isfinite().all())


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    return make.bank(tiny_llama, tiny_tokenizer)


def prompts_of(bank: AdapterBank) -> dict[str, Tensor]:
    assert bank.statistics is not None
    assert bank.statistics.prompts is not None
    return bank.statistics.prompts.tensors()


def test_no_adapter_moves_a_bit_of_anothers(
    bank: AdapterBank, make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = AdapterBank.build(bank.family, bank.adapters[1:2])
    alone = alone.calibrate(PublicCalibration(make.passages), model=tiny_llama, tokenizer=tiny_tokenizer)
    together = prompts_of(bank)
    for name, values in prompts_of(alone).items():
        assert torch.equal(values[..., 0], together[name][..., 1])


def test_statistics_follow_their_adapters_from_bank_to_bank(bank: AdapterBank) -> None:
    whole = prompts_of(bank)
    order = [0, 2, 3, 4]
    for name, values in prompts_of(bank.remove("beta")).items():
        torch.testing.assert_close(values, whole[name][..., order], rtol=0.0, atol=0.0, equal_nan=True)
    apart = bank.remove("beta").merge(AdapterBank.build(bank.family, [bank.adapter("beta")]))
    for name, values in prompts_of(apart).items():
        torch.testing.assert_close(values[..., :4], whole[name][..., order], rtol=0.0, atol=0.0, equal_nan=True)
        assert bool(values[..., 4].isnan().all())


def test_a_folder_keeps_them(bank: AdapterBank, tmp_path: Path) -> None:
    save_bank(bank, tmp_path / "bank")
    found = prompts_of(load_bank(tmp_path / "bank"))
    for name, values in prompts_of(bank).items():
        torch.testing.assert_close(found[name], values, rtol=0.0, atol=0.0, equal_nan=True)


def test_layers_outside_of_an_adapter_weigh_nothing() -> None:
    mean = {module: torch.ones(2, dtype=torch.float64) for module in MODULES}
    norms = table() + 9.0
    passages = {(module, place): norms[:, i] for i, module in enumerate(MODULES) for place in (0, 1)}
    del passages["b", 1]
    found = prompt_statistics(passages, mean, mean, reading=set(MODULES))
    assert float(found.weight["b"][1]) == 0.0 != float(found.weight["b"][0])


def test_only_leading_blocks_are_read_for_it(bank: AdapterBank) -> None:
    names = {name.removeprefix("weight/") for name in prompts_of(bank) if name.startswith("weight/")}
    assert names == {name for name in bank.layers if name.startswith("model.layers.0.")}
