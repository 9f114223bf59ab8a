"""Statistics: what counts, what does not, and that nothing depends on neighbours, order or batches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from treadle.errors import InputError
from treadle.family.adapter import Adapter, Provenance
from treadle.family.injection import linear_shapes
from treadle.routing.bank import AdapterBank
from treadle.routing.calibration import (
    OwnCalibration,
    PublicCalibration,
    Statistics,
    counted,
    ignored_tokens,
    positions,
    read_prompt,
    text_batches,
)
from treadle.routing.calibration.text import read_text
from treadle.routing.routed import RoutedModel


def build(make: SimpleNamespace, model: Any, tokenizer: Any, calibration: Any, names: tuple[str, ...]) -> AdapterBank:
    family = make.family(model)
    adapters = [make.adapter(family, name) for name in names]
    return AdapterBank.build(family, adapters, calibration=calibration, model=model, tokenizer=tokenizer)


def statistics_of(bank: AdapterBank) -> Statistics:
    assert bank.statistics is not None
    return bank.statistics


def test_statistics_are_those_of_a_plain_loop(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Each passage read alone, no batch, no padding, <bos> dropped by hand."""
    found = statistics_of(build(make, tiny_llama, tiny_tokenizer, PublicCalibration(make.passages), ("alpha", "beta")))
    family = make.family(tiny_llama)
    module = "model.layers.1.mlp.down_proj"
    inputs: list[torch.Tensor] = []
    handle = tiny_llama.get_submodule(module).register_forward_pre_hook(lambda _, x: inputs.append(x[0][0, 1:]))
    for text in make.passages:
        tiny_llama(**tiny_tokenizer(text, return_tensors="pt"))
    handle.remove()
    x = torch.cat(inputs).double()
    for place, name in enumerate(("alpha", "beta")):
        update = make.adapter(family, name).folded_B(module).double() @ family.lora_A[module].double()
        norms = (x @ update.T).norm(dim=1)
        assert found.mean[module][place].item() == pytest.approx(norms.mean().item(), rel=1e-5)
        assert found.std[module][place].item() == pytest.approx(norms.std(correction=0).item(), rel=1e-4)
    assert found.tokens == len(x)


def test_where_rows_do_not_come_first_passages_are_read_alone(
    make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Longformer's attention sees (tokens, rows, inner): a batch's padding lies elsewhere than in its mask."""
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=70, attention_window=4, pad_token_id=0,
    )  # fmt: skip
    model = LongformerForMaskedLM(config).eval()
    module = "longformer.encoder.layer.0.attention.self.value"
    shape = linear_shapes(model)[module]

    def seen(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        found: list[torch.Tensor] = []
        read_text(model, batches, (), {module: (shape, lambda x, _: found.append(x))})
        return torch.cat(found)

    # window lengths, so that the model itself adds nothing
    rows = [torch.arange(8)[None] + 10, torch.arange(4)[None] + 30]
    together = {
        "input_ids": torch.cat([rows[0], nn.functional.pad(rows[1], (0, 4))]),
        "attention_mask": torch.tensor([[1] * 8, [1] * 4 + [0] * 4]),
    }
    alone = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    assert seen([together]).shape == (12, 16)
    assert torch.equal(seen([together]), seen(alone))


def test_padding_and_special_tokens_do_not_count(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    calibration = PublicCalibration([*make.passages, " ", "<eos> <eos>"])
    found = statistics_of(build(make, tiny_llama, tiny_tokenizer, calibration, ("alpha",)))
    plain = statistics_of(build(make, tiny_llama, tiny_tokenizer, PublicCalibration(make.passages), ("alpha",)))
    assert found.tokens == plain.tokens
    for module in found.mean:
        assert torch.allclose(found.mean[module], plain.mean[module], rtol=1e-5)
        assert torch.allclose(found.std[module], plain.std[module], rtol=1e-4)
    with pytest.raises(InputError, match="no token that counts"):
        build(make, tiny_llama, tiny_tokenizer, PublicCalibration([" ", "<eos>"]), ("alpha",))


def test_poolers_and_decoders_are_calibrated_too(
    make: SimpleNamespace,
    tiny_bert: BertForSequenceClassification,
    tiny_t5: T5ForConditionalGeneration,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for model in (tiny_bert, tiny_t5):
        bank = build(make, model, tiny_tokenizer, PublicCalibration(make.passages), ("alpha", "beta"))
        assert any("pooler" in module or "decoder" in module for module in bank.layers)
        assert all(bool(factors.eligible.all()) for factors in bank.layers.values())


def test_public_costs_no_privacy_and_own_does(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    names = ("alpha", "beta")
    public = statistics_of(build(make, tiny_llama, tiny_tokenizer, PublicCalibration(make.passages, "p"), names))
    assert (public.spends_privacy, public.source, len(public.digest)) == (False, "p", 64)
    own = OwnCalibration({"alpha": make.passages[:3], "beta": make.passages[3:]})
    found = statistics_of(build(make, tiny_llama, tiny_tokenizer, own, names))
    assert (found.spends_privacy, found.source, found.digest) == (True, "own", "")
    alone = statistics_of(build(make, tiny_llama, tiny_tokenizer, PublicCalibration(make.passages[3:]), ("beta",)))
    for module in found.mean:
        assert torch.equal(found.mean[module][1], alone.mean[module][0])
    with pytest.raises(InputError, match="alpha: no calibration text"):
        build(make, tiny_llama, tiny_tokenizer, OwnCalibration({"beta": make.passages}), names)


def test_untrained_and_absent_adapters_are_ineligible(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    family = make.family(tiny_llama)
    zero = Adapter.of_family(
        family,
        "zero",
        {m: torch.zeros(row.out_features, row.rank) for m, row in family.plan.modules.items()},
        provenance=Provenance("test"),
    )
    trained = make.adapter(family, "alpha")
    stranger = make.foreign(family, "stranger")
    bank = AdapterBank.build(
        family,
        [zero, trained, stranger],
        calibration=PublicCalibration(make.passages),
        model=tiny_llama,
        tokenizer=tiny_tokenizer,
    )
    for module, factors in bank.layers.items():
        assert factors.eligible.tolist() == [False, True, module in stranger.plan.modules]
        assert factors.present.tolist() == [True, True, module in stranger.plan.modules]
        if module not in stranger.plan.modules:
            assert factors.mean[2].isnan()
    ids = torch.tensor([[1, 40, 41, 42]])
    for granularity in ("token", "sequence"):
        model = RoutedModel(tiny_llama, bank, granularity=granularity)
        assert torch.equal(model(ids, permitted=[{"zero"}]).logits, tiny_llama(ids).logits)
    added = bank.add(make.adapter(family, "late"))
    assert not any(bool(factors.eligible[3]) for factors in added.layers.values())


def test_one_string_is_not_a_list_of_passages() -> None:
    with pytest.raises(InputError, match="one string"):
        PublicCalibration("the film is good")
    with pytest.raises(InputError, match="alpha: one string"):
        OwnCalibration({"alpha": "the film is good"})


def test_batches_cut_and_group_by_length(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["a b c", "a", "", "w10 " * 50, "a b"]
    batches = text_batches(tiny_tokenizer, texts, tokens=12, longest=20)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 4), (1, 20)]
    with pytest.raises(InputError, match="no calibration text"):
        text_batches(tiny_tokenizer, ["", ""])


def test_long_passages_are_cut_at_the_models_positions(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = statistics_of(build(make, tiny_llama, tiny_tokenizer, PublicCalibration(["w10 " * 400]), ("alpha",)))
    assert found.tokens == 127  # 128 positions, one of them <bos>


def test_what_counts_in_a_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ignored = ignored_tokens(tiny_tokenizer)
    assert ignored == (0, 1, 2, 3)
    ids = torch.tensor([[0, 1, 40, 2], [0, 0, 1, 2]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    assert counted(ids, mask, ignored).tolist() == [[False, False, True, False], [False, False, True, True]]
    assert positions(mask).tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_that_counts_positions_by_itself_is_left_to_it(side: str) -> None:
    config = MPNetConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    model = MPNetForMaskedLM(config).eval()
    long, short = torch.arange(8)[None] + 10, torch.arange(4)[None] + 30
    fill, place = ((4, 0), slice(4, None)) if side == "left" else ((0, 4), slice(4))
    ids = torch.cat([long, nn.functional.pad(short, fill, value=1)])
    read = read_prompt(model, ids, (ids != 1).long())
    for row, alone in ((read[0], long), (read[1, place], short)):
        expected = model.base_model(input_ids=alone, attention_mask=torch.ones_like(alone)).last_hidden_state[0]
        assert torch.allclose(row, expected, atol=1e-5)
