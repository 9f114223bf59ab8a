"""Building and changing banks."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import InputError, MismatchError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.models.identity import BaseIdentity
from treadle.models.loading import identity_of
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import PublicCalibration
from treadle.routing.decision import decide
from treadle.routing.factors import build_factors
from treadle.routing.routed import RoutedModel
from treadle.routing.scorers import SCORERS, norm

IDS = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]])


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    return make.bank(tiny_llama, tiny_tokenizer)


def test_adapters_keep_their_order_and_modules_the_familys(bank: AdapterBank) -> None:
    assert bank.names == ("alpha", "beta", "gamma", "delta", "stranger")
    assert list(bank.layers) == list(bank.family.plan.modules)
    assert bank.adapter("gamma").name == "gamma"
    with pytest.raises(InputError, match="no adapter 'omega' in the bank; choose among alpha, beta"):
        bank.adapter("omega")


def test_what_cannot_be_a_bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM) -> None:
    family = make.family(tiny_llama)
    alpha = make.adapter(family, "alpha")
    with pytest.raises(InputError, match="at least one adapter"):
        AdapterBank.build(family, [])
    with pytest.raises(InputError, match="alpha: this adapter name is taken"):
        AdapterBank.build(family, [alpha, alpha])
    with pytest.raises((InputError, TypeCheckError)):
        AdapterBank.build(family, [alpha], access="Required")  # type: ignore[arg-type]


def test_adapters_of_another_family_or_base_are_refused_in_one_line(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM
) -> None:
    family = make.family(tiny_llama)
    other = AdapterFamily.create(base=family.base, plan=family.plan, seed=99)
    foreign = make.foreign(family, "stranger")
    wrong_base = replace(foreign, base=BaseIdentity("another", "1" * 64))
    wide = {module: torch.cat([B, B]) for module, B in foreign.lora_B.items()}
    rows = {m: replace(r, out_features=2 * r.out_features) for m, r in foreign.plan.modules.items()}
    wrong_shape = replace(foreign, plan=replace(foreign.plan, modules=rows), lora_B=wide)
    cases: list[tuple[Adapter, str]] = [
        (make.adapter(other, "alpha"), "belongs to family"),
        (wrong_base, "trained on base 'another'"),
        (wrong_shape, "the family's base"),
    ]
    for adapter, message in cases:
        with pytest.raises(MismatchError, match=message) as caught:
            AdapterBank.build(family, [adapter])
        assert "\n" not in str(caught.value)


def test_adding_and_removing_leaves_the_others_as_they_were(
    bank: AdapterBank, make: SimpleNamespace, tiny_llama: LlamaForCausalLM
) -> None:
    late = make.adapter(bank.family, "late")
    there_and_back = bank.add(late).remove("late")
    model = RoutedModel(tiny_llama, bank, granularity="token")
    expected = model(IDS).logits
    model.unwrap()
    assert torch.equal(RoutedModel(tiny_llama, there_and_back, granularity="token")(IDS).logits, expected)
    grown = bank.add(late)
    assert grown.names == (*bank.names, "late")
    assert bank.names == ("alpha", "beta", "gamma", "delta", "stranger")
    for module, factors in bank.layers.items():
        wider = grown.layers[module]
        assert torch.equal(wider.mean[:5].nan_to_num(-1), factors.mean.nan_to_num(-1))
        assert wider.mean[5].isnan()
        assert torch.equal(wider.groups[0].grams[:4], factors.groups[0].grams)
    with pytest.raises(InputError, match="name is taken"):
        bank.add(bank.adapter("alpha"))
    with pytest.raises(InputError, match="no adapter 'omega'"):
        bank.remove("omega")
    with pytest.raises(InputError, match="at least one adapter"):
        AdapterBank.build(bank.family, [late]).remove("late")


def test_removing_reorders_nothing(bank: AdapterBank) -> None:
    smaller = bank.remove("beta")
    assert smaller.names == ("alpha", "gamma", "delta", "stranger")
    assert bank.statistics is not None
    assert smaller.statistics is not None
    for module in smaller.layers:
        kept = bank.statistics.mean[module][[0, 2, 3, 4]]
        assert torch.equal(smaller.statistics.mean[module].nan_to_num(-1), kept.nan_to_num(-1))
    assert smaller.access == bank.access


def test_a_bank_of_strangers_is_decided_exactly(make: SimpleNamespace, tiny_llama: LlamaForCausalLM) -> None:
    """Own A, own ranks, a subset of modules each: ‖B_i A_i x‖ per adapter, no shared A anywhere."""
    family = make.family(tiny_llama)
    strangers = [make.foreign(family, "one", rank=2), make.foreign(family, "two", rank=7, every=1)]
    bank = AdapterBank.build(family, strangers)
    for module, factors in bank.layers.items():
        having = [i for i, adapter in enumerate(strangers) if module in adapter.plan.modules]
        assert [group.columns.tolist() for group in factors.groups] == [[i] for i in having]
        x = torch.randn(200, factors.shape.in_features)
        decision = decide(factors, x, SCORERS["norm"].scores(factors, x, None), norm.form(factors))
        norms = torch.full((200, 2), -1.0).double()
        for i in having:
            adapter = strangers[i]
            update = adapter.folded_B(module).double() @ adapter.lora_A[module].double()
            norms[:, i] = (x.double() @ update.T).norm(dim=1)
        assert torch.equal(decision.winner, norms.argmax(1))


def test_factors_do_not_depend_on_the_scale_of_B(make: SimpleNamespace, tiny_llama: LlamaForCausalLM) -> None:
    """A B of 1e-25 or 1e25, whose Gram float32 cannot hold, has the same normalised Gram."""
    family = make.family(tiny_llama)
    alpha = make.adapter(family, "alpha")
    module = next(iter(family.plan.modules))
    plain = build_factors(module, [alpha]).groups[0]
    for scale in (2.0**-80, 2.0**80):
        scaled = replace(alpha, lora_B={name: B * scale for name, B in alpha.lora_B.items()})
        group = build_factors(module, [scaled]).groups[0]
        assert torch.allclose(group.grams, plain.grams, rtol=1e-6)
        assert group.norms.item() == pytest.approx(plain.norms.item() * scale, rel=1e-12)


def test_models_are_checked_against_every_adapter(bank: AdapterBank, tiny_bert: torch.nn.Module) -> None:
    with pytest.raises(MismatchError, match="alpha: the model has no module"):
        bank.check_model(tiny_bert)  # type: ignore[arg-type]


def test_another_base_of_the_same_name_is_not_read(
    make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    for seed, place in enumerate(("here", "there")):
        make.llama(seed=seed).save_pretrained(tmp_path / place / "base")
        tiny_tokenizer.save_pretrained(tmp_path / place / "base")
    monkeypatch.chdir(tmp_path / "here")
    family = AdapterFamily.create(base=identity_of("base"), plan=make.family(make.llama(seed=0)).plan, seed=3)
    bank = AdapterBank.build(family, [make.adapter(family, "alpha")])
    calibration = PublicCalibration(make.passages)
    assert bank.calibrate(calibration).statistics is not None
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(MismatchError, match="base: the model of this name has other weights than the bank's base"):
        bank.calibrate(calibration)
