"""What every scorer owes: one answer whatever the batch, the order of the bank and the dtype; rights before scores."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import InputError, MismatchError
from treadle.family.injection import inject
from treadle.models.identity import BaseIdentity
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import PromptStatistics
from treadle.routing.decision import BASE
from treadle.routing.routed import RoutedModel
from treadle.routing.scorers import SCORERS, Scorer
from treadle.routing.scorers.fixed import fixed
from treadle.routing.scorers.linear import LinearRouter, linear

PROMPTS = [[1, 40, 41, 42, 43, 44, 45], [1, 60, 61], [1, 80, 81, 82, 83]]
SURE = {
    "abstain": 1.0
}  # random adapters know nothing; when the base takes over is tests/unit/routing/test_abstention.py's
OF_LAYERS = [name for name, scorer in SCORERS.items() if scorer.prompt is None]
OF_PROMPTS = [name for name, scorer in SCORERS.items() if scorer.prompt is not None]
ASKED = [
    *[(name, granularity) for name in [*OF_LAYERS, "fixed"] for granularity in ("token", "evidence", "sequence")],
    ("arrow-parameters", "layer"),
    *[(name, "sequence") for name in [*OF_PROMPTS, "linear"]],
]
"""Every scorer, those that have to be made included, with every kind of granularity that it knows."""

# What float32 leaves of the order of sums: batches, groups and adapters' places change it.
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def scorer_named(name: str, bank: AdapterBank) -> str | Scorer:
    """The scorer; `fixed` on gamma, and a router with weights drawn at random, the same for a bank of any order."""
    if name == "fixed":
        return fixed(bank, "gamma")
    if name != "linear":
        return name
    names = ("alpha", "beta", "gamma", "delta", "stranger")
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(len(names), 32, generator=draw)
    router = LinearRouter(
        bank.family.base, names, (0, 1, 2), torch.zeros(32), torch.ones(32), weight, torch.zeros(len(names)), 0.1, 1.0
    )
    return linear(router, bank)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """One model for all tests, which wrap and unwrap it."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(11)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bank(base: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    return make.bank(base, tiny_tokenizer)


Route = Callable[..., RoutedModel]


@pytest.fixture
def route(base: LlamaForCausalLM, bank: AdapterBank) -> Iterator[Route]:
    """(scorer's name, granularity, settings) → a routed model, unwrapped after the test."""
    made: list[RoutedModel] = []

    def routed(name: str, granularity: str, *, of: AdapterBank = bank, **settings: Any) -> RoutedModel:
        made.append(RoutedModel(base, of, scorer=scorer_named(name, of), granularity=granularity, **SURE, **settings))
        return made[-1]

    yield routed
    for model in made:
        model.unwrap()


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return ids, mask


@torch.no_grad()
def logits(model: Any, *inputs: Any, **named: Any) -> torch.Tensor:
    return model(*inputs, **named).logits


@pytest.mark.parametrize(("name", "granularity"), [(n, g) for n, g in ASKED if g != "evidence"])
def test_one_permitted_is_that_adapter_alone_and_none_is_the_base(
    name: str, granularity: str, base: LlamaForCausalLM, bank: AdapterBank, route: Route
) -> None:
    """`evidence` is left out: it leaves tokens of which nothing counts yet, such as the first, to the base."""
    ids = torch.tensor(PROMPTS[:1])
    plain = logits(base, ids)
    model = route(name, granularity)
    assert torch.equal(logits(model, ids, permitted=[set()]), plain)
    for only in ("gamma",) if name == "fixed" else ("gamma", "stranger"):  # a foreign adapter has an A of its own
        found = logits(model, ids, permitted=[{only}])
        adapter = bank.adapter(only)
        with inject(base, adapter.lora_A, adapter.folded()):
            alone = logits(base, ids)
        torch.testing.assert_close(found, alone, **CLOSE)
        assert (found - plain).abs().max() > 1e-3  # else the comparison says nothing


@pytest.mark.parametrize(("name", "granularity"), ASKED)
def test_a_batch_is_its_rows_and_a_second_call_is_the_first(name: str, granularity: str, route: Route) -> None:
    model = route(name, granularity)
    ids, mask = padded()
    sets = [{"alpha", "beta", "gamma", "stranger"}, {"gamma", "delta"}, {"alpha", "beta", "gamma", "delta"}]
    together = logits(model, ids, mask, permitted=sets)
    assert torch.equal(logits(model, ids, mask, permitted=sets), together)
    for row, prompt in enumerate(PROMPTS):
        alone = logits(model, torch.tensor([prompt]), permitted=sets[row : row + 1])[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone, **CLOSE)


@pytest.mark.parametrize(("name", "granularity"), ASKED)
def test_the_order_of_the_bank_changes_nothing(name: str, granularity: str, bank: AdapterBank, route: Route) -> None:
    order = (3, 0, 4, 2, 1)
    turned = AdapterBank.build(bank.family, [bank.adapters[i] for i in order])
    assert bank.statistics is not None
    moved = {part: {m: v[list(order)] for m, v in getattr(bank.statistics, part).items()} for part in ("mean", "std")}
    digests = tuple(bank.statistics.B_digests[i] for i in order)
    assert bank.statistics.prompts is not None
    prompts = {part: values[..., list(order)] for part, values in bank.statistics.prompts.tensors().items()}
    moved["prompts"] = PromptStatistics.of_tensors(prompts)
    turned = turned.with_statistics(replace(bank.statistics, **moved, B_digests=digests))
    ids, mask = padded()
    first = logits(route(name, granularity), ids, mask)
    second = logits(route(name, granularity, of=turned), ids, mask)
    torch.testing.assert_close(first[mask.bool()], second[mask.bool()], **CLOSE)


@pytest.mark.parametrize(("name", "granularity"), ASKED)
def test_models_in_bfloat16_are_served(name: str, granularity: str, base: LlamaForCausalLM, bank: AdapterBank) -> None:
    half = copy.deepcopy(base).to(torch.bfloat16)
    ids, mask = padded()
    plain = logits(half, ids, mask)
    model = RoutedModel(half, bank, scorer=scorer_named(name, bank), granularity=granularity, **SURE)
    found = logits(model, ids, mask)
    assert found.dtype == torch.bfloat16
    assert bool(found[mask.bool()].isfinite().all())
    assert torch.equal(logits(model, ids, mask), found)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize(("name", "granularity"), [(n, g) for n, g in ASKED if n not in ("mean", "fixed")])
def test_one_of_the_best_is_the_argmax_bit_for_bit_and_little_warmth_comes_near(
    name: str, granularity: str, bank: AdapterBank, route: Route
) -> None:
    ids = torch.tensor(PROMPTS[:1])
    one = route(name, granularity, top_k=1)
    if granularity == "sequence":
        decision = one.choose(ids)
        chosen = bank.adapters[int(decision.winner)].name
        expected = logits(one, ids, chosen=one.chosen([chosen]))
    else:
        with one.trace() as trace:
            expected = logits(one, ids)
        # The first token is special: it is no evidence for anybody yet.
        decided = [part.winner[1:] for parts in trace.layers.values() for part in parts]
        assert all((winner != BASE).all() for winner in decided)
    argmax = logits(one, ids)
    assert torch.equal(argmax, expected)
    # Scores that differ by more than 1e-4 leave the second best e^-100 at this temperature.
    cold = logits(route(name, granularity, top_k=3, temperature=1e-6), ids)
    torch.testing.assert_close(cold, argmax, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("name", [*OF_LAYERS, "fixed"])
def test_scores_have_a_row_a_token_and_a_column_an_adapter_and_forbidden_ones_are_out(name: str, route: Route) -> None:
    model = route(name, "token")
    torch.manual_seed(7)
    permitted = torch.rand(9, 5) < 0.5
    for layer in model.layers.values():
        x = torch.randn(9, layer.factors.shape.in_features)
        scores = model.scorer.scores(layer.factors, x, permitted)
        everybody = model.scorer.scores(layer.factors, x, None)
        assert scores.value.shape == (9, 5)
        assert bool((scores.value[~permitted] == -torch.inf).all())
        there = permitted & layer.eligible
        if name != "lag":  # whom ARROW hands on depends on who may be
            assert torch.equal(scores.value[there], everybody.value[there])
        assert bool(scores.value[there].isfinite().all())
        assert bool((scores.lower <= scores.value).all())
        assert bool((scores.value <= scores.upper).all())


@pytest.mark.parametrize("name", [*OF_PROMPTS, "linear"])
def test_a_prompt_goes_to_the_best_of_those_permitted(name: str, bank: AdapterBank, route: Route) -> None:
    model = route(name, "sequence")
    ids, mask = padded()
    left = set(bank.names)
    ranking: list[str] = []
    while left:
        decision = model.choose(ids[:1], mask[:1], permitted=[left])
        ranking.append(bank.names[int(decision.winner)])
        left = left - {ranking[-1]}
    assert sorted(ranking) == sorted(bank.names)
    assert int(model.choose(ids[:1], mask[:1], permitted=[set()]).winner) == BASE
    first = model.choose(ids[:1], mask[:1])
    assert [bank.names[int(place)] for place in (first.winner, first.runner_up)] == ranking[:2]
    assert float(first.margin) > 0
    with pytest.raises(InputError, match="scores whole prompts; use granularity 'sequence'"):
        route(name, "token")


def test_named_adapters_act_on_their_rows_where_they_may(route: Route) -> None:
    """`oracle`: a name a row, whatever the scorer; rights narrow it."""
    model = route("seqr", "token")
    ids, mask = padded()
    chosen = model.chosen(["beta", None, "stranger"])
    sets = [{"beta"}, {"beta"}, {"alpha"}]
    found = logits(model, ids, mask, chosen=chosen, permitted=sets)
    for row, name in enumerate(("beta", None, None)):
        sets_of_row = [set() if name is None else {name}]
        expected = logits(model, ids[row : row + 1], mask[row : row + 1], permitted=sets_of_row)
        torch.testing.assert_close(found[row][mask[row].bool()], expected[0][mask[row].bool()], **CLOSE)
    with pytest.raises(InputError, match="no adapter 'nobody' in the bank"):
        model.chosen(["nobody"])


def test_a_router_of_another_base_is_refused(bank: AdapterBank) -> None:
    router = LinearRouter(
        BaseIdentity("other", "1" * 64),
        ("alpha",),
        (),
        *torch.zeros(2, 32),
        torch.zeros(1, 32),
        torch.zeros(1),
        0.1,
        1.0,
    )
    with pytest.raises(MismatchError, match="the router reads base 'other', the bank's is 'tiny'"):
        linear(router, bank)
