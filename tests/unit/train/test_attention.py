"""Training in bfloat16 on a CPU attends by plain products, as the fused kernel does, and leaves the model as it was."""

import pytest
import torch
from transformers import LlamaForCausalLM

from treadle.train.attention import quick_attention


def implementation(model: LlamaForCausalLM) -> str:
    return str(model.config._attn_implementation)


def test_short_rows_in_bfloat16_attend_plainly_until_the_block_ends(tiny_llama: LlamaForCausalLM) -> None:
    model = tiny_llama.to(torch.bfloat16)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        fused = model(input_ids=ids).logits
        with quick_attention(model, tokens=40):
            assert implementation(model) == "eager"
            plain = model(input_ids=ids).logits
    assert implementation(model) == "sdpa"
    # The same function, rounded to bfloat16 (8 bits) at other places: a few units in the last place of the largest.
    assert (plain - fused).abs().max() <= 4 * 2**-8 * fused.abs().max()


def test_an_error_in_the_block_restores_the_model(tiny_llama: LlamaForCausalLM) -> None:
    model = tiny_llama.to(torch.bfloat16)
    with pytest.raises(RuntimeError), quick_attention(model, tokens=40):
        raise RuntimeError
    assert implementation(model) == "sdpa"


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 257), (torch.float32, 40)])
def test_long_rows_and_other_dtypes_keep_the_fused_kernel(
    tiny_llama: LlamaForCausalLM, dtype: torch.dtype, tokens: int
) -> None:
    with quick_attention(tiny_llama.to(dtype), tokens=tokens):
        assert implementation(tiny_llama) == "sdpa"


def test_an_implementation_that_the_caller_chose_is_kept(tiny_llama: LlamaForCausalLM) -> None:
    model = tiny_llama.to(torch.bfloat16)
    model.set_attn_implementation("flex_attention")
    with quick_attention(model, tokens=40):
        assert implementation(model) == "flex_attention"
