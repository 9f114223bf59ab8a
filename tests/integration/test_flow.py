"""Family → adapters → bank → routing on the real models, against stock PEFT and a float64 brute force."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from treadle.data.prompts import Example
from treadle.data.public_text import public_texts
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import Attachment, adapted_layers, inject, linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.heads import with_head
from treadle.models.loading import load_model, load_tokenizer
from treadle.recipes.bench.routing_exactness import brute_force
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank, save_bank
from treadle.routing.calibration import PublicCalibration, positions
from treadle.routing.decision import TIE
from treadle.routing.routed import RoutedModel
from treadle.train.settings import SftSettings
from treadle.train.sft import train_sft

pytestmark = [
    pytest.mark.integration,
    # peft 0.21 asks transformers 5.23 in the old way; that is between the two of them.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

REVERSED = [Example(f"Say the number {i} backwards.\nAnswer:", f" {str(i)[::-1]}") for i in range(120, 136)]
COLOURS = [
    Example(f"Which colour has {thing}?\nColour:", f" {colour}")
    for thing, colour in [("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red")] * 4
]


@pytest.mark.parametrize("ranks", ["uniform", "mixed"])
def test_peft_opens_minilm_adapters_on_a_base_with_a_head(minilm: Path, ranks: str, tmp_path: Path) -> None:
    labels = ["question", "statement"]
    base = with_head("minilm-l6", tmp_path / "base", labels=labels, seed=0)
    model, tokenizer = load_model(str(base), device="cpu"), load_tokenizer(str(base))
    shapes = linear_shapes(model)
    plan = RankPlan.uniform(shapes, rank=8)
    if ranks == "mixed":
        plan = RankPlan.of_ranks(shapes, {name: 1 + i % 5 for i, name in enumerate(shapes)}, scaling=2.0)
    family = AdapterFamily.create(base=str(base), plan=plan, seed=0)
    texts = ["Who wrote this?", "It rains.", "Where is it?", "The book is here."] * 6
    examples = [Example(text, labels[i % 2]) for i, text in enumerate(texts)]
    result = train_sft(model, tokenizer, family, examples, SftSettings(learning_rate=5e-3, batch_size=8, epochs=4))
    assert result.losses[-1] < 0.9 * result.losses[0]
    adapter = result.adapter("kinds", data="kinds")
    adapter.save(tmp_path / "kinds")
    batch = tokenizer([*texts[:4], "When does the next train leave?"], padding=True, return_tensors="pt")
    with torch.no_grad(), inject(model, family.lora_A, adapter.folded()):
        ours = model(**batch).logits
    bank = AdapterBank.build(
        family,
        [adapter],
        calibration=PublicCalibration(public_texts(limit=8).passages),
        model=model,
        tokenizer=tokenizer,
    )
    for granularity in ("token", "sequence"):
        routed = RoutedModel(model, bank, granularity=granularity, abstain=1.0)
        with torch.no_grad():
            alone = routed(**batch, permitted=[{"kinds"}] * 5).logits
        routed.unwrap()
        torch.testing.assert_close(alone, ours, rtol=0, atol=1e-5)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(model, tmp_path / "kinds").eval()(**batch).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_trained_smollm2_adapters_are_banked_and_routed_exactly(smollm2: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(smollm2), device="cpu"), load_tokenizer(str(smollm2))
    plan = RankPlan.uniform(linear_shapes(model), rank=4)
    family = AdapterFamily.create(base="smollm2-135m", plan=plan, seed=0)
    settings = SftSettings(learning_rate=5e-3, batch_size=8)
    adapters: list[Adapter] = []
    for name, examples in (("reversed", REVERSED), ("colours", COLOURS)):
        adapters.append(train_sft(model, tokenizer, family, examples, settings).adapter(name, data=name))
    calibration = PublicCalibration(public_texts(limit=12).passages)
    save_bank(
        AdapterBank.build(family, adapters, calibration=calibration, model=model, tokenizer=tokenizer), tmp_path / "b"
    )
    bank = load_bank(tmp_path / "b")
    batch = tokenizer(
        ["Which colour has milk?\nColour:", "Say the number 555 backwards."], padding=True, return_tensors="pt"
    )

    # every decision, on what really entered the layer
    inputs: dict[str, torch.Tensor] = {}
    layers = adapted_layers(model, {module: factors.shape for module, factors in bank.layers.items()})
    watchers = {module: (lambda x, m=module: inputs.__setitem__(m, x.reshape(-1, x.shape[-1]))) for module in layers}
    routed = RoutedModel(model, bank, granularity="token")
    with Attachment(layers, watchers), torch.no_grad(), routed.trace() as trace:
        routed(**batch)
    wrong = 0
    for module, factors in bank.layers.items():
        reference = brute_force(factors, inputs[module], calibrated=True)
        got = reference.gather(1, trace.layers[module][0].winner.reshape(-1, 1)).squeeze(1)
        best = reference.max(1).values
        wrong += int((got < best - TIE * best.abs().clamp_min(1.0)).sum())
    assert wrong == 0
    assert len(bank.layers) == 210

    # one permitted adapter is that adapter; none is the base; padding on either side changes nothing
    where = positions(batch["attention_mask"])
    with torch.no_grad(), inject(model, family.lora_A, adapters[1].folded()):
        expected = model(**batch, position_ids=where).logits
    with torch.no_grad():
        torch.testing.assert_close(routed(**batch, permitted=[{"colours"}] * 2).logits, expected, rtol=0, atol=1e-5)
        alone = routed(**batch, permitted=[set(), set()]).logits
    routed.unwrap()
    with torch.no_grad():
        torch.testing.assert_close(alone, model(**batch, position_ids=where).logits, rtol=0, atol=1e-5)
    sequence = RoutedModel(model, bank)
    right = tokenizer(
        tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    left_ids, right_ids = sequence.generate(**batch, **options), sequence.generate(**right, **options)
    assert torch.equal(left_ids, right_ids)
    assert torch.equal(sequence.choose(**batch).winner, sequence.choose(**right).winner)

    # stock PEFT agrees, uniform ranks (mixed ones: test_train_smollm2)
    adapters[0].save(tmp_path / "reversed")
    with torch.no_grad(), inject(model, family.lora_A, adapters[0].folded()):
        ours = model(**batch, position_ids=where).logits
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(model, tmp_path / "reversed").eval()(**batch, position_ids=where).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
