"""Whose rows a layer sees is proved before anybody's rights depend on it."""

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForMaskedLM,
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5ForConditionalGeneration,
)

from treadle.errors import UnsupportedError
from treadle.family.injection import adapted_layers, linear_shapes
from treadle.routing.rows import check_rows, layouts


def layouts_of(model: PreTrainedModel) -> dict[str, str]:
    return dict(layouts(model, adapted_layers(model, linear_shapes(model))))


def test_rows_come_first_in_decoders_encoders_and_both(
    tiny_llama: LlamaForCausalLM, tiny_bert: BertForSequenceClassification, tiny_t5: T5ForConditionalGeneration
) -> None:
    assert set(layouts_of(tiny_llama).values()) == {"rows"}
    found = layouts_of(tiny_bert)
    assert {name for name, kind in found.items() if kind != "rows"} == {"bert.pooler.dense"}
    assert found["bert.pooler.dense"] == "row"
    assert set(layouts_of(tiny_t5)) == set(linear_shapes(tiny_t5))
    assert set(layouts_of(tiny_t5).values()) == {"rows"}


def test_layers_that_see_time_first_are_not_trusted() -> None:
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=70, attention_window=4, pad_token_id=1,
    )  # fmt: skip
    model = LongformerForMaskedLM(config).eval()
    found = layouts_of(model)
    untrusted = {name.rsplit(".", 1)[-1] for name in linear_shapes(model) if name not in found}
    assert {"query", "key", "value"} <= untrusted
    assert found["longformer.encoder.layer.0.intermediate.dense"] == "rows"
    # Two rows of two tokens: the shape alone would pass.
    with pytest.raises(UnsupportedError, match="cannot be told apart by row"):
        check_rows(torch.zeros(2, 2, 16), 2, (2, 2), "query", None)


def test_experts_are_never_trusted() -> None:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval()
    found = layouts_of(model)
    experts = [name for name in linear_shapes(model) if "expert" in name]
    assert experts
    assert not set(experts) & set(found)
    assert any(name.endswith("SelfAttention.q") for name in found)


def test_a_base_that_cannot_be_asked_is_trusted_with_nothing(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ValueError("pixel_values are missing")

    monkeypatch.setattr(tiny_llama, "forward", fails)
    assert layouts_of(tiny_llama) == {}
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


@pytest.mark.parametrize(
    ("shape", "layout", "fits"),
    [
        ((4, 5, 8), "rows", True),
        ((4, 8), "rows", False),
        ((3, 5, 8), "rows", False),
        ((4, 8), "row", True),
        ((20, 8), "row", False),
        ((20, 8), "tokens", True),
        ((4, 8), "tokens", False),
        ((4, 5, 8), "tokens", False),
        ((4, 5, 8), None, False),
    ],
)
def test_what_a_layer_sees_must_be_what_was_proved(shape: tuple[int, ...], layout: str | None, fits: bool) -> None:
    """Two rows of the caller, two beams each, five tokens."""
    x = torch.zeros(shape)
    if fits:
        check_rows(x, 2, (4, 5), "layer", layout)  # type: ignore[arg-type]
        return
    with pytest.raises(UnsupportedError, match="layer: its inputs cannot be told apart by row"):
        check_rows(x, 2, (4, 5), "layer", layout)  # type: ignore[arg-type]
