"""The default road of `sequence`: weighed layers choose, all layers say whether anybody is meant."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.errors import InputError
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import AnalyticCalibration
from treadle.routing.decision import BASE
from treadle.routing.routed import RoutedModel

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45], [1, 60, 61, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    return make.bank(tiny_llama, tiny_tokenizer)


def by_hand(model: RoutedModel, kind: str, row: int) -> torch.Tensor:
    """Each adapter's score of a prompt from the layers' inputs, by the definition, one adapter at a time."""
    assert model.weights is not None
    weights = getattr(model.weights, kind)
    length = int(MASK[row].sum())
    total = torch.zeros(len(model.bank.names), dtype=torch.float64)

    def note(layer: object, x: torch.Tensor) -> None:
        factors = layer.factors  # type: ignore[attr-defined]
        if factors.module not in weights.weight:
            return
        for place, adapter in enumerate(model.bank.adapters):
            if factors.module in adapter.plan.modules:
                A, B = adapter.lora_A[factors.module].double(), adapter.folded_B(factors.module).double()
                norms = (x[0].double() @ A.T @ B.T).norm(dim=1)[1:]  # the first token is special
                z = (norms.mean() - factors.mean[place]) / factors.std[place]
                total[place] += weights.weight[factors.module][place] * z

    model.read(IDS[row : row + 1, :length], torch.ones(1, length), note)
    return total - weights.centre


def test_scores_are_the_weighed_sums_of_the_definition(tiny_llama: LlamaForCausalLM, bank: AdapterBank) -> None:
    model = RoutedModel(tiny_llama, bank, abstain=1.0)
    assert model.scorer.name == "whitened"
    assert model.weights is not None
    decision = model.choose(IDS, MASK)
    for row in range(2):
        scores = by_hand(model, "choosing", row)
        best, second = scores.topk(2).indices.tolist()
        assert (int(decision.winner[row]), int(decision.runner_up[row])) == (best, second)
        # Float32 products of unit vectors, summed over a few tokens and layers.
        assert float(decision.margin[row]) == pytest.approx(float(scores[best] - scores[second]), abs=1e-4)


def test_the_chance_is_that_of_the_score_over_all_layers(tiny_llama: LlamaForCausalLM, bank: AdapterBank) -> None:
    model = RoutedModel(tiny_llama, bank, abstain=0.999)
    assert model.weights is not None
    decision = model.choose(IDS, MASK)
    assert decision.chance is not None
    public = model.weights.public.nan_to_num(-1e9).max(1).values
    for row in range(2):
        reached = int((public >= by_hand(model, "knowing", row).max() - 1e-6).sum())
        assert float(decision.chance[row]) == pytest.approx((1 + reached) / (1 + len(public)))


def test_a_prompt_above_the_level_is_the_bases_alone(tiny_llama: LlamaForCausalLM, bank: AdapterBank) -> None:
    expected = tiny_llama(IDS, attention_mask=MASK).logits
    model = RoutedModel(tiny_llama, bank, abstain=0.0)
    assert model.choose(IDS, MASK).winner.tolist() == [BASE, BASE]
    found = model(IDS, MASK).logits
    assert torch.allclose(found[MASK.bool()], expected[MASK.bool()], atol=1e-6)


def test_choosing_alone_reads_half_of_the_blocks(tiny_llama: LlamaForCausalLM, bank: AdapterBank) -> None:
    ran: list[int] = []
    for number, block in enumerate(tiny_llama.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    cheap = RoutedModel(tiny_llama, bank, abstain=1.0)
    chosen = cheap.choose(IDS, MASK).winner.tolist()
    assert ran == []  # the pass ends inside of the first of two blocks, with its last adapted layer
    cheap.unwrap()
    whole = RoutedModel(tiny_llama, bank, abstain=0.999)
    decision = whole.choose(IDS, MASK)
    assert len(tiny_llama.model.layers) - 1 in ran
    assert [
        w if w != BASE else r for w, r in zip(decision.winner.tolist(), decision.runner_up.tolist(), strict=True)
    ] == chosen


def test_a_bank_without_public_prompts_is_routed_as_the_article_scores(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, bank: AdapterBank, make: SimpleNamespace
) -> None:
    analytic = bank.calibrate(AnalyticCalibration(make.passages), model=tiny_llama, tokenizer=tiny_tokenizer)
    assert RoutedModel(tiny_llama, analytic).scorer.name == "seqr"
    with pytest.raises(InputError, match="knows no public prompts.*public"):
        RoutedModel(tiny_llama, analytic, scorer="whitened")
    with pytest.raises(InputError, match="abstain is 1.5"):
        RoutedModel(tiny_llama, bank, abstain=1.5)
