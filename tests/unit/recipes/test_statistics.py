"""A silo releases an adapter's own statistics once, pays for them, and a bank is calibrated by what it said."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import BudgetError, InputError, MismatchError
from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.ledger import Budget, Ledger
from treadle.privacy.noise import SeededRandomness
from treadle.privacy.statistics import StatisticsSettings
from treadle.recipes.fleet_privacy import fleet_privacy
from treadle.recipes.statistics import Payer, release_statistics
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank, save_bank
from treadle.routing.calibration import OwnCalibration, PrivateCalibration, PublicCalibration, ReleasedNorms

TEXTS = [f"question w{10 + i} is good ? yes w{31 + i}" for i in range(20)]
SETTINGS = StatisticsSettings(2.0, 1e-3, 20)


@pytest.fixture
def family(make: SimpleNamespace, tiny_llama: LlamaForCausalLM) -> AdapterFamily:
    return make.family(tiny_llama)


@pytest.fixture
def adapter(make: SimpleNamespace, family: AdapterFamily) -> Adapter:
    B = make.adapter(family, "ward").lora_B
    return Adapter.of_family(family, "ward", B, provenance=Provenance("dp-sgd", epsilon=3.0, delta=1e-3))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger.create(tmp_path / "silo.ledger")
    made.register("ward", budget=Budget(2.5, 1e-3), source=b"rows")
    return made


@pytest.fixture
def measured(
    make: SimpleNamespace,
    family: AdapterFamily,
    adapter: Adapter,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> AdapterBank:
    """A bank of the adapter alone, calibrated on public text."""
    calibration = PublicCalibration(make.passages)
    return AdapterBank.build(family, [adapter], calibration=calibration, model=tiny_llama, tokenizer=tiny_tokenizer)


@pytest.fixture
def ask(measured: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, ledger: Ledger):
    def released(settings: StatisticsSettings = SETTINGS, payer: Payer | None = None) -> ReleasedNorms:
        payer = payer or Payer(ledger, "ward")
        return release_statistics(measured, tiny_llama, tiny_tokenizer, TEXTS, settings=settings, payer=payer)

    return released


def test_without_noise_they_are_the_adapters_own_statistics(
    ask, tmp_path: Path, measured: AdapterBank, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    open_ended = Ledger.create(tmp_path / "open.ledger")
    open_ended.register("ward", budget=Budget(float("inf"), 1e-3), source=b"rows")
    found = ask(StatisticsSettings(float("inf"), 1e-3, 20, clip=1e6), Payer(open_ended, "ward"))
    own = OwnCalibration({"ward": TEXTS})  # texts of one length, so rows and tokens weigh alike
    expected = measured.calibrate(own, model=tiny_llama, tokenizer=tiny_tokenizer).statistics
    assert expected is not None
    for module in measured.layers:
        # A batch of one row and one of twenty round differently, in float32.
        assert found.mean[module] == pytest.approx(expected.mean[module].item(), rel=1e-4)
        assert found.std[module] == pytest.approx(expected.std[module].item(), rel=1e-3)
    assert found.epsilon is None
    assert open_ended.spent("ward") == float("inf")


def test_a_release_is_paid_for_once_and_repeated_for_free(ask, ledger: Ledger) -> None:
    first = ask()
    noise = SETTINGS.plan(len(first.mean)).noise_multiplier
    spent = ledger.spent("ward")
    assert spent == epsilon_of([MechanismEvent(noise, 1.0, 1)], delta=1e-3)
    assert spent == pytest.approx(2.0, rel=1e-3)
    assert ask() == first
    assert ledger.spent("ward") == spent
    with pytest.raises(BudgetError, match="data set 'ward'"):  # again with fresh noise is another release
        ask(payer=Payer(ledger, "ward", run="once more"))


def test_seeded_noise_is_not_accounted_as_private(ask, ledger: Ledger) -> None:
    with pytest.raises(BudgetError, match="no ε accounts for"):
        ask(payer=Payer(ledger, "ward", randomness=SeededRandomness(1)))


def test_a_bank_of_released_statistics_states_what_they_cost(
    ask,
    tmp_path: Path,
    family: AdapterFamily,
    adapter: Adapter,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    released = ask()
    calibration = PrivateCalibration({"ward": released})
    bank = AdapterBank.build(family, [adapter], calibration=calibration, model=tiny_llama, tokenizer=tiny_tokenizer)
    save_bank(bank, tmp_path / "bank")
    for found in (bank, load_bank(tmp_path / "bank")):
        statistics = found.statistics
        assert statistics is not None
        assert (statistics.method, statistics.epsilon, statistics.delta) == ("private", 2.0, 1e-3)
        assert (statistics.tokens, statistics.digest, statistics.spends_privacy) == (0, "", False)
        for module, mean in statistics.mean.items():
            assert mean.tolist() == [released.mean[module]]
            assert statistics.std[module].tolist() == [released.std[module]]
        assert (fleet_privacy(found).epsilon_disjoint, fleet_privacy(found).reason) == (5.0, "")  # 3 of training, 2


def test_statistics_that_nothing_accounts_for_leave_the_fleet_without_a_bound(
    family: AdapterFamily, adapter: Adapter, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ones = dict.fromkeys(family.plan.modules, 1.0)
    bare = PrivateCalibration({"ward": ReleasedNorms(ones, ones, adapter.digest, None, 1e-3)})
    bank = AdapterBank.build(family, [adapter], calibration=bare, model=tiny_llama, tokenizer=tiny_tokenizer)
    assert fleet_privacy(bank).statement == "none (the calibration read the adapters' own data)"


def test_what_was_released_belongs_to_one_adapter(
    make: SimpleNamespace,
    family: AdapterFamily,
    adapter: Adapter,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ones = dict.fromkeys(family.plan.modules, 1.0)
    about_another = PrivateCalibration({"ward": ReleasedNorms(ones, ones, "0" * 64, 1.0, 1e-3)})
    for calibration, kind, said in (
        (about_another, MismatchError, "ward: was released about another lora_B"),
        (PrivateCalibration({}), InputError, "ward: nothing was released about it"),
    ):
        with pytest.raises(kind, match=said):
            AdapterBank.build(family, [adapter], calibration=calibration, model=tiny_llama, tokenizer=tiny_tokenizer)


def test_a_bank_that_cannot_be_measured_is_refused_and_nothing_is_spent(
    make: SimpleNamespace,
    family: AdapterFamily,
    adapter: Adapter,
    measured: AdapterBank,
    ledger: Ledger,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    blank = {module: torch.zeros(row.out_features, row.rank) for module, row in family.plan.modules.items()}
    untrained = Adapter.of_family(family, "ward", blank, provenance=Provenance("test"))
    public = PublicCalibration(make.passages)
    parts = {"model": tiny_llama, "tokenizer": tiny_tokenizer}
    for bank, said in (
        (AdapterBank.build(family, [adapter]), "no statistics of public text"),
        (make.bank(tiny_llama, tiny_tokenizer), "the bank holds 5 adapters"),
        (AdapterBank.build(family, [untrained], calibration=public, **parts), "ward: the adapter is untrained"),
    ):
        with pytest.raises(InputError, match=said):
            release_statistics(bank, *parts.values(), TEXTS, settings=SETTINGS, payer=Payer(ledger, "ward"))
    assert ledger.spent("ward") == 0.0
