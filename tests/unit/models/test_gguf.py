"""A two-layer Llama is written as GGUF by the reference writer, and must come back as it was."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaForCausalLM

from treadle.errors import FormatError
from treadle.files import read_json
from treadle.models.gguf import convert_gguf
from treadle.models.identity import identify_folder

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ġa", "ab"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF's order of the rows of q and k: the two halves of each head's rotary pairs side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: LlamaForCausalLM, file: Path) -> None:
    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    unused = [f"<unused{number}>" for number in range(config.vocab_size - len(TOKENS))]
    writer.add_token_list(TOKENS + unused)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (config.vocab_size - 3))
    writer.add_token_merges(["Ġ a", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values, stored = tensor.numpy(), name
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        for ours, theirs in NAMES.items():
            stored = stored.replace(ours, theirs)
        writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_folder_with_the_same_weights(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, capfd: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tiny_llama, tmp_path / "m.gguf")
    out = tmp_path / "out"
    out.mkdir()
    capfd.readouterr()
    convert_gguf(tmp_path / "m.gguf", out)
    assert capfd.readouterr().err == ""
    tiny_llama.save_pretrained(tmp_path / "twin")
    assert identify_folder(out, "m") == identify_folder(tmp_path / "twin", "m")
    config = read_json(out / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    loaded = LlamaForCausalLM.from_pretrained(out)
    tokens = torch.tensor([[1, 5, 6, 2]])
    assert torch.allclose(loaded(tokens).logits, tiny_llama(tokens).logits, atol=1e-6)
    assert loaded.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.model_max_length, tokenizer.pad_token_id) == (128, 2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a").input_ids) == ["ab", "Ġa"]
    assert tokenizer.decode(tokenizer("ab a").input_ids) == "ab a"


def test_a_file_that_is_no_gguf_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF but no more than that")
    with pytest.raises(FormatError, match=r"m\.gguf: transformers cannot convert it") as caught:
        convert_gguf(tmp_path / "m.gguf", tmp_path)
    assert "\n" not in str(caught.value)
