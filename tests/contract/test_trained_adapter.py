"""What the trainer makes opens in stock PEFT with the logits that the trained B has here."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from treadle.data.prompts import Example
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import inject, linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.identity import BaseIdentity
from treadle.train.settings import SftSettings
from treadle.train.sft import train_sft

# peft 0.21 asks transformers 5.23 in the old way; that is between the two of them.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[1, 5, 9, 33, 7, 2], [1, 8, 4, 30, 31, 32]])


def logits(model: torch.nn.Module, name: str) -> Tensor:
    named = {"decoder_input_ids": TOKENS[:, :4]} if name == "tiny_t5" else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **named).logits


def family_of(model: PreTrainedModel, ranks: str) -> AdapterFamily:
    shapes = linear_shapes(model)
    plan = RankPlan.uniform(shapes, rank=4)
    if ranks == "mixed":
        plan = RankPlan.of_ranks(shapes, {key: i % 4 for i, key in enumerate(shapes)}, scaling=2.0)
    return AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=1)


@pytest.mark.parametrize("ranks", ["uniform", "mixed"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert", "tiny_t5"])
def test_peft_gives_a_trained_adapters_logits(
    name: str,
    ranks: str,
    request: pytest.FixtureRequest,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    torch.set_num_threads(1)
    model = request.getfixturevalue(name)
    family = family_of(model, ranks)
    answers = ("LABEL_0", "LABEL_2") if name == "tiny_bert" else (" yes", " no")
    examples = [Example(f"question w{40 + i}", answers[i % 2]) for i in range(16)]
    settings = SftSettings(learning_rate=0.1, batch_size=4, epochs=2)
    before = logits(model, name)
    result = train_sft(model, tiny_tokenizer, family, examples, settings)
    folded = {key: B * family.scaling(key) for key, B in result.lora_B.items()}
    with inject(model, family.lora_A, folded):
        trained = logits(model, name)
    assert (trained - before).abs().max() > 1e-2
    assert torch.equal(logits(model, name), before)
    result.adapter("yes-no", data="yes-no").save(tmp_path / "yes-no")
    opened = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "yes-no").eval()
    torch.testing.assert_close(logits(opened, name), trained, rtol=0, atol=1e-5)
    loaded = Adapter.load(tmp_path / "yes-no", family=family)
    with inject(model, loaded.lora_A, loaded.folded()):
        assert torch.equal(logits(model, name), trained)
