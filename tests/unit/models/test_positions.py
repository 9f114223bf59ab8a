"""As many tokens as are said run, and one more does not."""

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    LongformerConfig,
    MPNetConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
    XLNetConfig,
)

from treadle.models.positions import positions_of

SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 14,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(**SMALL), 14),
        (RobertaConfig(**SMALL, pad_token_id=1), 12),
        (XLMRobertaConfig(**SMALL, pad_token_id=1), 12),
        (MPNetConfig(**SMALL, pad_token_id=1), 12),
        (OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8), 14),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else str(value),
)
def test_so_many_tokens_run_and_one_more_does_not(config: PretrainedConfig, expected: int) -> None:
    model = AutoModel.from_config(config).eval()
    assert positions_of(model) == expected
    with torch.no_grad():
        assert model(input_ids=torch.full((1, expected), 5)).last_hidden_state.shape[1] == expected
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, expected + 1), 5))


def test_longformer_pads_a_text_to_its_window_and_counts_from_its_padding() -> None:
    config = LongformerConfig(**SMALL, pad_token_id=1, attention_window=2)
    assert positions_of(AutoModel.from_config(config)) == 12


def test_rotary_positions_are_those_of_the_configuration() -> None:
    assert positions_of(AutoModel.from_config(LlamaConfig(**SMALL))) == 14


@pytest.mark.parametrize(
    "config",
    [
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
        XLNetConfig(vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=8),
    ],
    ids=["T5", "XLNet"],
)
def test_relative_positions_have_no_limit(config: PretrainedConfig) -> None:
    assert positions_of(AutoModel.from_config(config)) is None
