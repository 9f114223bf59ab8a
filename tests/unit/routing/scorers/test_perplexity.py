"""The likelihood of the prompt, against the injected adapter's own predictions token by token."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from treadle.errors import UnsupportedError
from treadle.family.injection import inject
from treadle.routing.routed import RoutedModel
from treadle.routing.scorers import perplexity

PROMPTS = [[1, 40, 41, 42, 43, 44], [1, 60, 61]]


def log_likelihood(model: PreTrainedModel, prompt: list[int]) -> float:
    """Mean over the tokens after <bos>, in float64, one token at a time."""
    total = 0.0
    with torch.no_grad():
        for place in range(1, len(prompt)):
            logits = model(torch.tensor([prompt[:place]])).logits[0, -1].double()
            total += float(logits.log_softmax(0)[prompt[place]])
    return total / (len(prompt) - 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_likeliest_prompt_wins_by_its_mean_over_tokens(
    name: str,
    side: str,
    request: pytest.FixtureRequest,
    make: SimpleNamespace,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base: LlamaForCausalLM | GPT2LMHeadModel = request.getfixturevalue(f"tiny_{name}")
    bank = make.bank(base, tiny_tokenizer)
    truth = torch.zeros(2, 5)
    for place, adapter in enumerate(bank.adapters):
        with inject(base, adapter.lora_A, adapter.folded()):
            truth[:, place] = torch.tensor([log_likelihood(base, prompt) for prompt in PROMPTS])
    monkeypatch.setattr(perplexity, "TOKENS", 6)  # so that the two rows are read one after the other
    model = RoutedModel(base, bank, scorer="perplexity")
    gap = [0] * 3
    rows = [PROMPTS[0], gap + PROMPTS[1] if side == "left" else PROMPTS[1] + gap]
    mask = [[1] * 6, [0] * 3 + [1] * 3 if side == "left" else [1] * 3 + [0] * 3]
    decision = model.choose(torch.tensor(rows), torch.tensor(mask))
    best = truth.sort(1, descending=True)
    assert decision.winner.tolist() == best.indices[:, 0].tolist()
    assert decision.runner_up.tolist() == best.indices[:, 1].tolist()
    torch.testing.assert_close(decision.margin, best.values[:, 0] - best.values[:, 1], rtol=0, atol=1e-5)


def test_nobody_forbidden_is_run(
    tiny_llama: LlamaForCausalLM, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = RoutedModel(tiny_llama, make.bank(tiny_llama, tiny_tokenizer), scorer="perplexity")
    passes: list[int] = []
    watch = tiny_llama.register_forward_pre_hook(lambda _, inputs: passes.append(1))
    ids = torch.tensor([[1, 40, 41], [1, 60, 61]])
    assert model.choose(ids, permitted=[{"beta"}, {"beta", "gamma"}]).runner_up.tolist()[0] == -1
    watch.remove()
    assert len(passes) == 2  # one for beta, one for gamma


def test_what_has_no_next_token_has_no_perplexity(
    tiny_bert: BertForSequenceClassification, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = RoutedModel(tiny_bert, make.bank(tiny_bert, tiny_tokenizer), scorer="perplexity")
    with pytest.raises(UnsupportedError, match="needs a decoder"):
        model.choose(torch.tensor([[1, 40, 41]]))
