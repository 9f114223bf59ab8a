"""The loss of a padded batch is the sum of the losses of its rows, each computed alone and in full."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from treadle.errors import UnsupportedError
from treadle.train.objectives import Kind, Pair, kind_of, mean_losses, padded, summed_loss, weight

BATCH: list[Pair] = [((1, 5, 9), (7, 2)), ((1, 8, 4, 30, 31, 32), (9, 9, 40, 2)), ((1,), (2,))]
CLASSES: list[Pair] = [((1, 5, 9), (0,)), ((1, 8, 4, 30, 31, 32), (2,)), ((1,), (1,))]


def alone(model: PreTrainedModel, prompt: tuple[int, ...], target: tuple[int, ...]) -> float:
    """Minus the log-probability of the target's tokens after the prompt, from one unpadded forward pass."""
    if kind_of(model) is Kind.CLASSIFIER:
        return -float(model(torch.tensor([prompt])).logits[0].log_softmax(-1)[target[0]])
    if kind_of(model) is Kind.SEQ2SEQ:
        decoded = torch.tensor([(0, *target[:-1])])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoded).logits[0]
    else:
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    scores = logits.log_softmax(-1)
    return -sum(float(scores[i, token]) for i, token in enumerate(target))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_t5", "tiny_bert"])
def test_a_padded_batch_costs_what_its_rows_cost_alone(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    batch = CLASSES if name == "tiny_bert" else BATCH
    with torch.no_grad():
        losses = [alone(model, prompt, target) for prompt, target in batch]
        assert float(summed_loss(model, batch)) == pytest.approx(sum(losses), rel=1e-5)
        means = [loss / len(target) for loss, (_, target) in zip(losses, batch, strict=True)]
        assert mean_losses(model, batch).tolist() == pytest.approx(means, rel=1e-5)


def test_a_model_that_cannot_limit_its_logits_gives_the_same(tiny_llama: LlamaForCausalLM) -> None:
    whole: Callable[..., object] = tiny_llama.forward

    class Plain(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> object:
            return whole(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    plain = Plain(tiny_llama.config)
    with torch.no_grad():
        assert torch.equal(summed_loss(plain, BATCH), summed_loss(tiny_llama, BATCH))


def test_only_the_end_of_a_causal_batch_gets_logits(tiny_llama: LlamaForCausalLM) -> None:
    seen: list[int] = []
    tiny_llama.lm_head.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    summed_loss(tiny_llama, BATCH)
    assert seen == [5]  # the longest target and the token before it


def test_the_weight_counts_tokens_or_classes() -> None:
    assert weight(Kind.CAUSAL, BATCH) == weight(Kind.SEQ2SEQ, BATCH) == 7
    assert weight(Kind.CLASSIFIER, CLASSES) == 3


def test_kinds(
    tiny_llama: LlamaForCausalLM,
    tiny_gpt2: GPT2LMHeadModel,
    tiny_t5: T5ForConditionalGeneration,
    tiny_bert: BertForSequenceClassification,
) -> None:
    kinds = [kind_of(model) for model in (tiny_llama, tiny_gpt2, tiny_t5, tiny_bert)]
    assert kinds == [Kind.CAUSAL, Kind.CAUSAL, Kind.SEQ2SEQ, Kind.CLASSIFIER]
    assert [kind.value for kind in kinds] == ["CAUSAL_LM", "CAUSAL_LM", "SEQ_2_SEQ_LM", None]


def test_a_bare_encoder_and_a_head_of_one_class_are_refused(tiny_bert: BertForSequenceClassification) -> None:
    with pytest.raises(UnsupportedError, match="a BertModel neither generates nor classifies; give it a head"):
        kind_of(BertModel(tiny_bert.config))
    tiny_bert.config.num_labels = 1
    with pytest.raises(UnsupportedError, match="fewer than two classes"):
        kind_of(tiny_bert)


def test_padding_goes_to_the_side_it_is_told() -> None:
    device = torch.device("cpu")
    tokens, mask = padded([(1, 2, 3), (4,)], 9, left=True, device=device)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    tokens, mask = padded([(1, 2, 3), (4,)], 9, left=False, device=device)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
