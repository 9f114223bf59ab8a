"""`sequence`: the first half of the blocks chooses, and says whether anybody is meant."""

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


def z_scores(model: RoutedModel, row: int) -> dict[str, torch.Tensor]:
    """Module → each adapter's mean z-score of a prompt by the definition, NaN where it lacks the layer."""
    length = int(MASK[row].sum())
    found: dict[str, torch.Tensor] = {}

    def note(layer: object, x: torch.Tensor) -> None:
        factors = layer.factors  # type: ignore[attr-defined]
        scores = torch.full((len(model.bank.names),), torch.nan, dtype=torch.float64)
        for place, adapter in enumerate(model.bank.adapters):
            if factors.module in adapter.plan.modules:
                A, B = adapter.lora_A[factors.module].double(), adapter.folded_B(factors.module).double()
                norms = (x[0].double() @ A.T @ B.T).norm(dim=1)[1:]  # the first token is special
                scores[place] = (norms.mean() - factors.mean[place]) / factors.std[place]
        found[factors.module] = scores

    model.read(IDS[row : row + 1, :length], torch.ones(1, length), note)
    return found


def test_the_mean_over_the_first_half_of_the_blocks_chooses(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, bank: AdapterBank, make: SimpleNamespace
) -> None:
    analytic = bank.calibrate(AnalyticCalibration(make.passages), model=tiny_llama, tokenizer=tiny_tokenizer)
    model = RoutedModel(tiny_llama, analytic)
    assert {name.split(".")[2] for name in model.choosing} == {"0"}
    decision = model.choose(IDS, MASK)
    for row in range(2):
        scores = torch.stack([z for name, z in z_scores(model, row).items() if name in model.choosing]).nanmean(0)
        best, second = scores.topk(2).indices.tolist()
        assert (int(decision.winner[row]), int(decision.runner_up[row])) == (best, second)
        # Float32 products of unit vectors, summed over a few tokens and layers.
        assert float(decision.margin[row]) == pytest.approx(float(scores[best] - scores[second]), abs=1e-4)


def test_with_public_prompts_the_weighed_score_chooses_and_is_compared_with_theirs(
    tiny_llama: LlamaForCausalLM, bank: AdapterBank
) -> None:
    model = RoutedModel(tiny_llama, bank, abstain=0.999)
    sure = RoutedModel(tiny_llama, bank, abstain=1.0).choose(IDS, MASK)
    assert bank.statistics is not None
    prompts = bank.statistics.prompts
    assert prompts is not None
    decision = model.choose(IDS, MASK)
    assert decision.chance is not None
    public = prompts.public.nan_to_num(-1e9).max(1).values
    for row in range(2):
        z = z_scores(model, row)
        known = torch.stack([prompts.weight[name] * z[name].nan_to_num() for name in prompts.weight]).sum(0)
        scores = (known - prompts.centre).nan_to_num(-1e9)
        best, second = scores.topk(2).indices.tolist()
        assert (int(sure.winner[row]), int(sure.runner_up[row])) == (best, second)
        # Deviations of public prompts: a weight may be large where layers nearly repeat one another.
        assert float(sure.margin[row]) == pytest.approx(float(scores[best] - scores[second]), abs=1e-3)
        reached = int((public >= scores.max() - 1e-6).sum())
        assert float(decision.chance[row]) == pytest.approx((1 + reached) / (1 + len(public)))


def test_a_prompt_above_the_level_is_the_bases_alone(tiny_llama: LlamaForCausalLM, bank: AdapterBank) -> None:
    expected = tiny_llama(IDS, attention_mask=MASK).logits
    model = RoutedModel(tiny_llama, bank, abstain=0.0)
    assert model.choose(IDS, MASK).winner.tolist() == [BASE, BASE]
    found = model(IDS, MASK).logits
    assert torch.allclose(found[MASK.bool()], expected[MASK.bool()], atol=1e-6)


def test_choosing_and_abstaining_read_half_of_the_blocks(tiny_llama: LlamaForCausalLM, bank: AdapterBank) -> None:
    ran: list[int] = []
    for number, block in enumerate(tiny_llama.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    for abstain in (1.0, 0.5):
        model = RoutedModel(tiny_llama, bank, abstain=abstain)
        ran.clear()  # wrapping has read a few tokens to find out where rows are
        model.choose(IDS, MASK)
        model.unwrap()
        assert ran == []  # the pass ends inside of the first of two blocks, with its last adapted layer


def test_a_bank_without_public_prompts_never_abstains(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, bank: AdapterBank, make: SimpleNamespace
) -> None:
    analytic = bank.calibrate(AnalyticCalibration(make.passages), model=tiny_llama, tokenizer=tiny_tokenizer)
    decision = RoutedModel(tiny_llama, analytic, abstain=0.0).choose(IDS, MASK)
    assert decision.chance is None
    assert BASE not in decision.winner.tolist()
    with pytest.raises(InputError, match="abstain is 1.5"):
        RoutedModel(tiny_llama, bank, abstain=1.5)
