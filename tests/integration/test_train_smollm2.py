"""A few steps on the real SmolLM2: the loss falls and PEFT agrees."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from treadle.data.prompts import Example
from treadle.errors import MismatchError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import inject, linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.identity import identify_folder
from treadle.models.loading import load_model, load_tokenizer
from treadle.train.settings import SftSettings
from treadle.train.sft import train_sft

pytestmark = [
    pytest.mark.integration,
    # peft 0.21 asks transformers 5.23 in the old way; that is between the two of them.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXAMPLES = [Example(f"Say the number {i} backwards.\nAnswer:", f" {str(i)[::-1]}") for i in range(120, 128)]
SETTINGS = SftSettings(learning_rate=5e-3, batch_size=4, epochs=2, seed=1)


def test_a_few_steps_on_smollm2(smollm2: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(smollm2), device="cpu"), load_tokenizer(str(smollm2))
    shapes = linear_shapes(model, KINDS)
    assert len(shapes) == 210
    ranks = {name: 1 + i % 3 for i, name in enumerate(shapes)}
    plan = RankPlan.of_ranks(shapes, ranks, scaling=2.0)
    family = AdapterFamily.create(base=identify_folder(smollm2, "smollm2-135m"), plan=plan, seed=0)
    result = train_sft(model, tokenizer, family, EXAMPLES, SETTINGS)
    assert len(result.losses) == 4
    assert result.losses[-1] < 0.8 * result.losses[0]

    adapter = result.adapter("backwards", data="numbers")
    adapter.save(tmp_path / "backwards")
    tokens = tokenizer(EXAMPLES[0].prompt, return_tensors="pt")
    with torch.no_grad(), inject(model, family.lora_A, adapter.folded()):
        ours = model(**tokens).logits
    with torch.no_grad():
        bare = model(**tokens).logits
        opened = PeftModel.from_pretrained(model, tmp_path / "backwards").eval()
        theirs = opened(**tokens).logits
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    with pytest.raises(MismatchError, match="belongs to family"):
        Adapter.load(tmp_path / "backwards", family=AdapterFamily.create(base=family.base, plan=plan, seed=1))
