"""What a trace says: real tokens only, shares that sum to one, permitted names only."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.routing.decision import BASE, Decision
from treadle.routing.routed import RoutedModel
from treadle.routing.trace import Trace

ROWS = [[1, 40, 41, 42, 43, 44], [1, 60, 61]]


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    fill = [0, 0, 0]
    if side == "left":
        return torch.tensor([ROWS[0], fill + ROWS[1]]), torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    return torch.tensor([ROWS[0], ROWS[1] + fill]), torch.tensor([[1] * 6, [1] * 3 + [0] * 3])


@pytest.fixture
def model(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> RoutedModel:
    return RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), granularity="token")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_has_its_real_tokens_alone(side: str, model: RoutedModel) -> None:
    ids, mask = batch(side)
    with model.trace() as trace:
        model(ids, mask)
    for row, prompt in enumerate(ROWS):
        with model.trace() as alone:
            model(torch.tensor([prompt]))
        assert trace.winners(row) == alone.winners(0)
        assert trace.tokens(row) == alone.tokens(0)
        assert trace.shares(row) == alone.shares(0)
        assert len(trace.tokens(row)) == len(prompt)
        for shares in (trace.shares(row), *trace.tokens(row)):
            assert sum(shares.values()) == pytest.approx(1.0)
            assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_generation_is_traced_token_by_token_and_twice_in_one_block(model: RoutedModel) -> None:
    ids, mask = batch("left")
    with model.trace() as trace:
        for _ in range(2):
            model.generate(ids, mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    # the prompt, then each generated token but the last, which is fed to nobody
    assert [len(trace.tokens(row)) for row in (0, 1)] == [2 * (6 + 3), 2 * (3 + 3)]


def test_what_is_fed_to_a_finished_row_is_not_real(model: RoutedModel) -> None:
    ids, mask = batch("left")
    free = model.generate(ids, mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, 6:].tolist()
    end = next(token for token in free[0][:3] if token not in free[1])  # row 0 meets it, row 1 does not
    written = free[0].index(end) + 1
    with model.trace() as trace:
        model.generate(ids, mask, max_new_tokens=5, do_sample=False, eos_token_id=end)
    # the end itself is never fed: its row has nothing more to say
    assert len(trace.tokens(0)) == 6 + written - 1
    assert len(trace.tokens(1)) == 3 + 5 - 1


def test_margins_and_runner_ups(model: RoutedModel) -> None:
    ids, mask = batch("left")
    sets = [{"alpha", "stranger"}, {"gamma"}]
    with model.trace() as trace:
        model(ids, mask, permitted=sets)
    assert set(trace.layers) == set(model.bank.layers)
    for (part,) in trace.layers.values():
        assert (part.margin >= 0).all()
        assert torch.equal(part.real, mask.bool())
        assert set(part.runner_up[1].tolist()) == {BASE}
        assert (part.winner[0] != part.runner_up[0]).all()
        assert set(part.winner[0].tolist()) | set(part.runner_up[0].tolist()) <= {0, 4, BASE}
    text = json.dumps(trace.to_json(), allow_nan=False)
    assert "beta" not in text
    assert "delta" not in text
    content = json.loads(text)
    first = next(iter(trace.layers))
    assert content["layers"][first][0]["winner"][1] == ["gamma"] * 6
    assert content["layers"][first][0]["real"] == mask.bool().tolist()


def test_a_sequence_choice_is_its_trace(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), abstain=0.999)
    ids, mask = batch("right")
    with model.trace() as trace:
        model(ids, mask)
    decision = model.choose(ids, mask)
    assert trace.layers == {}
    for row in (0, 1):
        assert trace.shares(row) == {model.bank.names[int(decision.winner[row])]: 1.0}
        assert trace.tokens(row) == []
    rows = trace.to_json()["choices"]
    assert rows == [
        [
            {
                "winner": model.bank.names[int(decision.winner[row])],
                "runner_up": model.bank.names[int(decision.runner_up[row])],
                "margin": pytest.approx(float(decision.margin[row])),
                "chance": pytest.approx(float(decision.chance[row])),
            }
            for row in (0, 1)
        ]
    ]


def test_a_pooler_is_recorded_and_shifts_no_token(
    make: SimpleNamespace, tiny_bert: BertForSequenceClassification, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = RoutedModel(tiny_bert, make.bank(tiny_bert, tiny_tokenizer), granularity="token")
    ids, mask = batch("right")
    with model.trace() as trace:
        model(ids, mask)
    assert [len(trace.tokens(row)) for row in (0, 1)] == [6, 3]
    assert {len(names) for names in trace.winners(1).values()} == {1, 3}


def test_traces_nest_and_end(model: RoutedModel) -> None:
    ids, _ = batch("left")
    with model.trace() as outer:
        with model.trace() as inner:
            model(ids)
        assert not outer.layers
        model(ids[:1])
    model(ids)
    assert {len(parts) for parts in inner.layers.values()} == {1}
    assert {part.winner.shape for parts in outer.layers.values() for part in parts} == {(1, 6)}


def test_an_empty_trace_has_no_shares() -> None:
    trace = Trace(("a",), ())
    assert (trace.shares(0), trace.tokens(0), trace.winners(0)) == ({}, [], {})
    trace.choices.append(
        Decision(torch.tensor([BASE]), torch.tensor([BASE]), torch.zeros(1), torch.zeros(1, dtype=torch.bool))
    )
    assert trace.shares(0) == {None: 1.0}
