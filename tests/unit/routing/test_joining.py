"""A changed bank is the bank that would have been built, and nothing of the others was touched on the way."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import InputError, MismatchError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.routing import bank as bank_module
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import PrivateCalibration, PublicCalibration, ReleasedNorms
from treadle.routing.routed import RoutedModel

IDS = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]])


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    return make.bank(tiny_llama, tiny_tokenizer)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's own bits, so that NaN equals NaN and 0 is not -0."""
    return tensor.contiguous().view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


def assert_same_factors(found: AdapterBank, expected: AdapterBank) -> None:
    assert list(found.layers) == list(expected.layers)
    for module, factors in expected.layers.items():
        other = found.layers[module]
        assert torch.equal(other.present, factors.present)
        assert len(other.groups) == len(factors.groups)
        for mine, theirs in zip(other.groups, factors.groups, strict=True):
            assert mine.columns.tolist() == theirs.columns.tolist()
            for name in ("A", "grams", "norms"):
                assert torch.equal(bits(getattr(mine, name)), bits(getattr(theirs, name))), (module, name)
        for place in range(len(expected.adapters)):
            if factors.present[place]:
                assert torch.equal(other.folded_B(place), factors.folded_B(place))


def assert_same_statistics(found: AdapterBank, here: list[int], expected: AdapterBank, there: list[int]) -> None:
    assert found.statistics is not None
    assert expected.statistics is not None
    for kind in ("mean", "std"):
        for module, values in getattr(expected.statistics, kind).items():
            other = getattr(found.statistics, kind)[module]
            assert torch.equal(bits(other[here]), bits(values[there]))
            assert torch.equal(bits(getattr(found.layers[module], kind)[here]), bits(values[there]))


def built(bank: AdapterBank, *adapters: Adapter) -> AdapterBank:
    return AdapterBank.build(bank.family, adapters)


def test_every_change_ends_at_the_bank_that_would_have_been_built(bank: AdapterBank, make: SimpleNamespace) -> None:
    alpha, beta, gamma, delta, stranger = bank.adapters
    late, other = make.adapter(bank.family, "late"), make.foreign(bank.family, "other", rank=5, every=1)
    newer = replace(make.adapter(bank.family, "newer"), name="beta")
    assert_same_factors(bank.add(late), built(bank, *bank.adapters, late))
    assert_same_factors(bank.add(other), built(bank, *bank.adapters, other))
    assert_same_factors(bank.remove("gamma"), built(bank, alpha, beta, delta, stranger))
    assert_same_factors(bank.update(newer), built(bank, alpha, newer, gamma, delta, stranger))
    assert_same_factors(bank.merge(built(bank, other, late)), built(bank, *bank.adapters, other, late))
    foreign_beta = replace(other, name="beta")  # another form in the same place
    assert_same_factors(bank.update(foreign_beta), built(bank, alpha, foreign_beta, gamma, delta, stranger))
    assert_same_factors(bank.remove("stranger").remove("alpha"), built(bank, beta, gamma, delta))


def test_modules_come_and_go_with_the_only_adapter_that_has_them(make: SimpleNamespace, bank: AdapterBank) -> None:
    every, second = make.foreign(bank.family, "one", every=1), make.foreign(bank.family, "two", every=2)
    pair = built(bank, second, every)
    assert len(pair.layers) > len(pair.remove("one").layers)
    assert_same_factors(pair.remove("one"), built(bank, second))
    assert_same_factors(built(bank, second).add(every), pair)


def test_the_others_factors_and_statistics_keep_every_bit(bank: AdapterBank, make: SimpleNamespace) -> None:
    late = make.adapter(bank.family, "late")
    newer = replace(make.adapter(bank.family, "newer"), name="beta")
    everybody, others = [0, 1, 2, 3, 4], [0, 2, 3, 4]
    assert_same_statistics(bank.add(late), everybody, bank, everybody)
    assert_same_statistics(bank.update(newer), others, bank, others)
    assert_same_statistics(bank.remove("beta"), everybody[:4], bank, others)
    updated = bank.update(newer).layers[next(iter(bank.layers))]
    assert updated.mean[1].isnan()  # nothing is known of the new one's norms
    assert not updated.eligible[1]


def test_only_the_new_adapters_factors_are_computed(
    bank: AdapterBank, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    real = bank_module.build_factors
    monkeypatch.setattr(
        bank_module,
        "build_factors",
        lambda module, adapters: computed.extend(a.name for a in adapters) or real(module, adapters),
    )
    bank.add(make.adapter(bank.family, "late"))
    assert set(computed) == {"late"}
    computed.clear()
    bank.remove("beta").merge(bank.remove("alpha").remove("gamma").remove("delta").remove("stranger"))
    assert computed == []


def test_a_calibrated_newcomer_brings_its_statistics(
    bank: AdapterBank, make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    late = make.adapter(bank.family, "late")
    alone = AdapterBank.build(
        bank.family,
        [late],
        calibration=PublicCalibration(make.passages),
        model=tiny_llama,
        tokenizer=tiny_tokenizer,
    )
    grown = bank.merge(alone)
    whole = AdapterBank.build(
        bank.family,
        grown.adapters,
        calibration=PublicCalibration(make.passages),
        model=tiny_llama,
        tokenizer=tiny_tokenizer,
    )
    places = list(range(6))
    assert_same_statistics(grown, places, whole, places)
    elsewhere = alone.calibrate(PublicCalibration(["the film is bad"]), model=tiny_llama, tokenizer=tiny_tokenizer)
    strange = bank.merge(elsewhere)  # measured by another yardstick: not to be compared with the others
    assert strange.layers[next(iter(strange.layers))].mean[5].isnan()
    assert_same_statistics(strange, places[:5], bank, places[:5])


def test_what_cannot_be_joined(bank: AdapterBank, make: SimpleNamespace) -> None:
    other = AdapterFamily.create(base=bank.family.base, plan=bank.family.plan, seed=99)
    with pytest.raises(MismatchError, match="the other bank: its family is .*; merge banks of one family"):
        bank.merge(AdapterBank.build(other, [make.adapter(other, "late")]))
    with pytest.raises(InputError, match="gamma: this adapter name is taken; give it another name, update it"):
        bank.merge(bank.remove("alpha").remove("beta"))
    with pytest.raises(InputError, match="no adapter 'late' in the bank"):
        bank.update(make.adapter(bank.family, "late"))


def test_labels_and_access_follow_the_adapters(bank: AdapterBank, make: SimpleNamespace) -> None:
    labelled = bank.labelled("beta", frozenset({"dept=oncology"})).labelled("gamma", frozenset({"dept=billing"}))
    newer = replace(make.adapter(bank.family, "newer"), name="beta")
    assert labelled.update(newer).labels == labelled.labels
    assert dict(labelled.remove("beta").labels) == {"gamma": frozenset({"dept=billing"})}
    assert dict(labelled.labelled("beta", frozenset()).labels) == {"gamma": frozenset({"dept=billing"})}
    late = built(bank, make.adapter(bank.family, "late")).labelled("late", frozenset({"dept=law"}))
    assert labelled.merge(late).labels["late"] == {"dept=law"}
    assert bank.merge(replace(late, access="required")).access == "required"
    with pytest.raises(InputError, match="no adapter 'omega'"):
        bank.labelled("omega", frozenset())


def test_released_statistics_that_stand_side_by_side_cost_the_larger_epsilon_or_have_none(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    family = make.family(tiny_llama)
    ones = dict.fromkeys(family.plan.modules, 1.0)

    def released(name: str, epsilon: float | None, delta: float) -> AdapterBank:
        adapter = make.adapter(family, name)
        calibration = PrivateCalibration({name: ReleasedNorms(ones, ones, adapter.digest, epsilon, delta)})
        return AdapterBank.build(family, [adapter], calibration=calibration, model=tiny_llama, tokenizer=tiny_tokenizer)

    def cost(one: AdapterBank, other: AdapterBank) -> tuple[float | None, float, bool]:
        found = one.merge(other).statistics
        assert found is not None
        assert all(found.B_digests)
        return found.epsilon, found.delta, found.spends_privacy

    cheap, dear, free = released("alpha", 1.0, 1e-5), released("beta", 8.0, 1e-6), released("gamma", None, 1e-3)
    assert cost(cheap, dear) == cost(dear, cheap) == (8.0, 1e-5, False)
    assert cost(cheap, free) == cost(free, cheap) == (None, 1e-3, True)


@pytest.fixture
def wider(make: SimpleNamespace, tiny_llama: LlamaForCausalLM) -> Adapter:
    """A foreign adapter that alone changes v_proj."""
    return make.foreign(make.family(tiny_llama, kinds=["q_proj", "v_proj"]), "wider", every=1)


def test_without_the_only_adapter_of_a_module_the_bank_routes_as_if_it_had_never_been_there(
    make: SimpleNamespace, wider: Adapter, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    family = make.family(tiny_llama, kinds=["q_proj"])
    pair = [make.adapter(family, "alpha"), make.adapter(family, "beta")]
    answers = []
    for adapters in (pair, [*pair, wider]):
        bank = AdapterBank.build(
            family,
            adapters,
            calibration=PublicCalibration(make.passages),
            model=tiny_llama,
            tokenizer=tiny_tokenizer,
        )
        smaller = bank.remove("wider") if "wider" in bank.names else bank
        assert list(smaller.layers) == list(family.plan.modules)
        model = RoutedModel(tiny_llama, smaller, abstain=1.0)
        answers.append(model(IDS).logits)
        model.unwrap()
    assert not torch.allclose(answers[0], tiny_llama(IDS).logits, atol=1e-3)
    assert torch.equal(*answers)


def test_a_newcomer_with_a_module_of_its_own_leaves_a_calibrated_bank_as_it_was(
    make: SimpleNamespace, wider: Adapter, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    family = make.family(tiny_llama, kinds=["q_proj"])
    before = AdapterBank.build(
        family,
        [make.adapter(family, "alpha"), make.adapter(family, "beta")],
        calibration=PublicCalibration(make.passages),
        model=tiny_llama,
        tokenizer=tiny_tokenizer,
    )
    after = before.add(wider)
    assert len(after.layers) > len(before.layers)
    answers = []
    for bank in (before, after):
        model = RoutedModel(tiny_llama, bank, abstain=1.0)
        answers.append(model(IDS).logits)
        model.unwrap()
    assert not torch.allclose(answers[0], tiny_llama(IDS).logits, atol=1e-3)
    assert torch.equal(*answers)  # nothing is known of the newcomer, so it is not chosen
