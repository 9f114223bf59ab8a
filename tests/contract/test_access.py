"""Law 4, of every scorer, granularity and calibration: what is forbidden is as good as not there.

A scorer, granularity or calibration that is added is tested here without a line being written; a calibration needs
one in `CALIBRATIONS`, and its absence fails.
"""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from types import MappingProxyType, SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import (
    AnalyticCalibration,
    Calibration,
    OwnCalibration,
    PrivateCalibration,
    PromptStatistics,
    PublicCalibration,
    ReleasedNorms,
    TrafficCalibration,
)
from treadle.routing.factors import LayerFactors
from treadle.routing.routed import Granularity, RoutedModel
from treadle.routing.scorers import SCORERS

IDS = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]])
ALLOWED = [{"beta", "delta"}, {"delta"}]
FORBIDDEN = (0, 2, 4)  # alpha, gamma, and the stranger; beta stands between them
POISONS = (torch.nan, torch.inf, 1e30, 0.0)

Made = Callable[[SimpleNamespace, AdapterBank], Calibration]
CALIBRATIONS: dict[type, Made] = {
    PublicCalibration: lambda make, _: PublicCalibration(make.passages),
    OwnCalibration: lambda make, _: OwnCalibration(
        {name: make.passages[place:] for place, name in enumerate((*make.members, "stranger"))}
    ),
    AnalyticCalibration: lambda make, _: AnalyticCalibration(make.passages),
    TrafficCalibration: lambda make, _: TrafficCalibration(
        make.passages, tenant="clinic", minimum_prompts=1, minimum_tokens=1
    ),
    PrivateCalibration: lambda _, bank: PrivateCalibration(
        {
            adapter.name: ReleasedNorms(
                dict.fromkeys(adapter.plan.modules, 1.0 + place),
                dict.fromkeys(adapter.plan.modules, 0.5),
                adapter.digest,
                epsilon=1.0,
                delta=1e-5,
            )
            for place, adapter in enumerate(bank.adapters)
        }
    ),
}


def granularities(scorer: str) -> tuple[Granularity, ...]:
    """Those that a scorer has: one that reads whole prompts has no other, and the mean of all none of its own."""
    if SCORERS[scorer].prompt is not None:
        return ("sequence",)
    return ("token",) if SCORERS[scorer].top_k == 0 else get_args(Granularity)


# Every scorer and every calibration in every granularity; a calibration's numbers reach all scorers by one way.
PAIRS = [(scorer, granularity) for scorer in SCORERS for granularity in granularities(scorer)]
SETTINGS = [
    *((scorer, granularity, PublicCalibration) for scorer, granularity in PAIRS),
    *(
        ("seqr", granularity, calibration)
        for granularity in get_args(Granularity)
        for calibration in CALIBRATIONS
        if calibration is not PublicCalibration
    ),
]
every_setting = pytest.mark.parametrize(
    ("scorer", "granularity", "calibration"), SETTINGS, ids=lambda value: getattr(value, "__name__", str(value))
)


def test_every_calibration_is_tested() -> None:
    assert CALIBRATIONS.keys() == set(get_args(Calibration))


@pytest.fixture(scope="module")
def made() -> dict[type, AdapterBank]:
    """The banks that have been made so far; immutable, so tests may share them."""
    return {}


@pytest.fixture
def calibrated(
    made: dict[type, AdapterBank],
    make: SimpleNamespace,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Callable[[type], AdapterBank]:
    """Kind of calibration → four members and a foreign adapter, so calibrated."""

    def bank(kind: type) -> AdapterBank:
        if PublicCalibration not in made:
            made[PublicCalibration] = make.bank(tiny_llama, tiny_tokenizer)
        if kind not in made:
            calibration = CALIBRATIONS[kind](make, made[PublicCalibration])
            made[kind] = made[PublicCalibration].calibrate(calibration, model=tiny_llama, tokenizer=tiny_tokenizer)
        return made[kind]

    return bank


def spoilt(values: Tensor, rows: list[int], poison: float) -> Tensor:
    changed = values.clone()
    changed[rows] = poison
    return changed


def poisoned(factors: LayerFactors, poison: float) -> LayerFactors:
    """The factors with every number of a forbidden adapter replaced, in whichever field it stands."""
    groups = []
    for group in factors.groups:
        rows = [row for row, place in enumerate(group.columns.tolist()) if place in FORBIDDEN]
        A = torch.full_like(group.A, poison) if len(rows) == len(group.columns) else group.A  # a stranger's own A
        groups.append(
            replace(group, A=A, grams=spoilt(group.grams, rows, poison), norms=spoilt(group.norms, rows, poison))
        )
    changed: dict[str, object] = {"groups": tuple(groups)}
    for field in fields(factors):
        value = getattr(factors, field.name)
        if isinstance(value, Tensor) and value.is_floating_point():  # statistics, directions, whatever comes next
            assert value.shape[0] == len(factors.present)
            changed[field.name] = spoilt(value, list(FORBIDDEN), poison)

    def folded_B(adapter: int) -> Tensor:
        B = factors.folded_B(adapter)
        return torch.full_like(B, poison) if adapter in FORBIDDEN else B

    return replace(factors, folded_B=folded_B, **changed)


def poisoned_bank(bank: AdapterBank, poison: float) -> AdapterBank:
    layers = {module: poisoned(factors, poison) for module, factors in bank.layers.items()}
    assert bank.statistics is not None
    prompts = bank.statistics.prompts
    if prompts is not None:
        changed = {
            name: spoilt(values.mT if values.dim() > 1 else values, list(FORBIDDEN), poison)
            for name, values in prompts.tensors().items()
        }
        prompts = PromptStatistics.of_tensors({k: v.mT if v.dim() > 1 else v for k, v in changed.items()})
    statistics = replace(
        bank.statistics,
        mean={module: spoilt(values, list(FORBIDDEN), poison) for module, values in bank.statistics.mean.items()},
        std={module: spoilt(values, list(FORBIDDEN), poison) for module, values in bank.statistics.std.items()},
        prompts=prompts,
        B_digests=tuple("" if i in FORBIDDEN else digest for i, digest in enumerate(bank.statistics.B_digests)),
    )
    return replace(bank, layers=MappingProxyType(layers), statistics=statistics)


def spoil_preparation(name: str, bank: AdapterBank, poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scorer prepares from B is made of the clean B and poisoned afterwards: an SVD of NaN would only raise."""
    scorer = SCORERS[name]
    monkeypatch.setitem(
        SCORERS,  # type: ignore[arg-type]
        name,
        replace(scorer, prepare=lambda factors: poisoned(scorer.prepare(bank.layers[factors.module]), poison)),
    )


def everything(model: RoutedModel) -> tuple[Tensor, Tensor, str]:
    """Logits, generated ids, and all that the caller's trace tells, of one fixed set of calls."""
    with torch.inference_mode(), model.trace() as trace:
        logits = model(IDS, permitted=ALLOWED).logits
        ids = model.generate(IDS, permitted=ALLOWED, max_new_tokens=3, do_sample=False)
        model.choose(IDS, permitted=ALLOWED)
    told = json.dumps(trace.to_json(), allow_nan=False)
    return logits, ids, told + repr([(trace.shares(row), trace.tokens(row), trace.winners(row)) for row in (0, 1)])


@every_setting
def test_poison_in_forbidden_adapters_changes_no_bit(
    scorer: str,
    granularity: Granularity,
    calibration: type,
    calibrated: Callable[[type], AdapterBank],
    tiny_llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = calibrated(calibration)
    clean = RoutedModel(tiny_llama, bank, scorer=scorer, granularity=granularity)
    expected = everything(clean)
    clean.unwrap()
    assert "alpha" not in expected[2]
    for poison in POISONS:
        with monkeypatch.context() as patch:
            spoil_preparation(scorer, bank, poison, patch)
            model = RoutedModel(tiny_llama, poisoned_bank(bank, poison), scorer=scorer, granularity=granularity)
            found = everything(model)
            model.unwrap()
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert found[2] == expected[2]


@pytest.mark.parametrize(("scorer", "granularity"), PAIRS)
def test_the_poison_would_be_felt_if_it_were_permitted(
    scorer: str,
    granularity: Granularity,
    calibrated: Callable[[type], AdapterBank],
    tiny_llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = calibrated(PublicCalibration)
    clean = RoutedModel(tiny_llama, bank, scorer=scorer, granularity=granularity)
    expected = clean(IDS).logits
    clean.unwrap()
    spoil_preparation(scorer, bank, 1e30, monkeypatch)
    model = RoutedModel(tiny_llama, poisoned_bank(bank, 1e30), scorer=scorer, granularity=granularity)
    assert not torch.equal(model(IDS).logits, expected)


@every_setting
def test_forbidding_is_like_not_having(
    scorer: str,
    granularity: Granularity,
    calibration: type,
    calibrated: Callable[[type], AdapterBank],
    tiny_llama: LlamaForCausalLM,
) -> None:
    """Random weights have no ties, so the choices are equal outright; outputs differ by the order of sums at most."""
    bank = calibrated(calibration)
    smaller = bank.remove("alpha").remove("gamma").remove("stranger")
    masked = RoutedModel(tiny_llama, bank, scorer=scorer, granularity=granularity)
    with masked.trace() as trace, torch.inference_mode():
        expected = masked(IDS, permitted=[{"beta", "delta"}] * 2).logits
        choice = masked.choose(IDS, permitted=[{"beta", "delta"}] * 2)
    masked.unwrap()
    without = RoutedModel(tiny_llama, smaller, scorer=scorer, granularity=granularity)
    with without.trace() as other, torch.inference_mode():
        found = without(IDS).logits
        alone = without.choose(IDS)
    assert torch.allclose(found, expected, atol=1e-5, rtol=0.0)
    assert [other.winners(row) for row in (0, 1)] == [trace.winners(row) for row in (0, 1)]
    assert [other.shares(row) for row in (0, 1)] == [trace.shares(row) for row in (0, 1)]
    names = [
        [None if i < 0 else bank.names[i] for i in choice.winner.tolist()],
        [None if i < 0 else smaller.names[i] for i in alone.winner.tolist()],
    ]
    assert names[0] == names[1]


@every_setting
def test_an_empty_set_is_the_base_exactly(
    scorer: str,
    granularity: Granularity,
    calibration: type,
    calibrated: Callable[[type], AdapterBank],
    tiny_llama: LlamaForCausalLM,
) -> None:
    expected = tiny_llama(IDS).logits
    model = RoutedModel(tiny_llama, calibrated(calibration), scorer=scorer, granularity=granularity, abstain=1.0)
    assert torch.equal(model(IDS, permitted=[set(), set()]).logits, expected)
    mixed = model(IDS, permitted=[set(), {"beta"}]).logits
    assert torch.allclose(mixed[0], expected[0], atol=1e-6)  # in one batch with a row that is served
    assert not torch.allclose(mixed[1], expected[1], atol=1e-3)
