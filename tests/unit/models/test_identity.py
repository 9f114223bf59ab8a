import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, T5ForConditionalGeneration

from treadle.errors import FormatError, InputError, TreadleError, UnsupportedError
from treadle.models import identity
from treadle.models.identity import BaseIdentity, identify_folder, tied_rows


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def documented(tensors: dict[str, Tensor]) -> str:
    """The identity by its definition, of tensors in memory of which none is tied."""
    lines = [
        [name, NAMES[tensor.dtype], list(tensor.shape), sha(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))]
        for name, tensor in sorted(tensors.items())
    ]
    return sha("".join(json.dumps(line) + "\n" for line in lines).encode())


def stored(tensors: dict[str, Tensor]) -> str:
    """The identity of a checkpoint of these tensors."""
    with TemporaryDirectory() as folder:
        return identify_folder(write_checkpoint(Path(folder), tensors), "m").sha256


def test_the_digest_is_the_documented_one(tmp_path: Path) -> None:
    tensors = {"b": torch.tensor([1.0, -2.5]), "a": torch.tensor([[7], [8]], dtype=torch.int64)}
    lines = json.dumps(["a", "I64", [2, 1], sha(struct.pack("<2q", 7, 8))]) + "\n"
    lines += json.dumps(["b", "F32", [2], sha(struct.pack("<2f", 1.0, -2.5))]) + "\n"
    expected = sha(lines.encode())
    assert documented(tensors) == expected
    assert identify_folder(write_checkpoint(tmp_path / "m", tensors), "m") == BaseIdentity("m", expected)


@given(st.permutations(["x", "y", "z"]), st.integers(0, 11), st.integers(0, 7))
def test_order_never_counts_and_every_bit_does(order: list[str], byte: int, bit: int) -> None:
    tensors = {name: torch.arange(3, dtype=torch.float32) + len(name) for name in order}
    digest = stored(tensors)
    assert digest == stored(dict(sorted(tensors.items())))
    tensors["y"].view(torch.uint8)[byte] ^= 1 << bit
    assert stored(tensors) != digest


def test_name_dtype_and_shape_count() -> None:
    zeros = torch.zeros(4)
    digests = [
        stored({"a": zeros}),
        stored({"b": zeros}),
        stored({"a": zeros.reshape(2, 2)}),
        stored({"a": zeros.to(torch.int32)}),
        stored({"a": zeros, "b": zeros.clone()}),
        stored({}),
    ]
    assert len(set(digests)) == len(digests)


def test_every_dtype_and_odd_shape_is_read_as_documented() -> None:
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in NAMES}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    assert stored(tensors) == documented(tensors)


def test_a_saved_model_has_the_identity_of_its_tensors_tied_ones_once(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_gpt2: GPT2LMHeadModel,
    tiny_t5: T5ForConditionalGeneration,
) -> None:
    tied = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # the last name counts
    for model in (tiny_llama, tiny_gpt2, tiny_t5):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        assert tied_rows(folder) == model.config.vocab_size
        once = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        assert identify_folder(folder, "m").sha256 == documented(once)


def test_a_tied_weight_counts_once_however_often_it_is_stored(tmp_path: Path) -> None:
    embedding, square = torch.randn(5, 3), torch.randn(3, 3)
    once = {"model.embed_tokens.weight": embedding, "q": square, "k": square.clone()}
    twice = {**once, "lm_head.weight": embedding.clone()}
    tied = {"tie_word_embeddings": True, "vocab_size": 5}

    def digest(name: str, tensors: dict[str, Tensor], **config: object) -> str:
        return identify_folder(write_checkpoint(tmp_path / name, tensors, **config), name).sha256

    assert digest("once", once, **tied) == digest("twice", twice, **tied)
    assert digest("nested", twice, text_config=tied) == digest("once", once, **tied)
    assert digest("untied", twice, vocab_size=5) != digest("once", once, **tied)
    without_k = {name: tensor for name, tensor in once.items() if name != "k"}
    assert digest("without_k", without_k, **tied) != digest("once", once, **tied)
    changed = {**twice, "lm_head.weight": embedding + 1}
    assert digest("changed", changed, **tied) != digest("twice", twice, **tied)


def test_shards_and_metadata_do_not_count(tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.save_pretrained(tmp_path / "whole")
    tiny_llama.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert not (tmp_path / "split" / "model.safetensors").exists()
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    save = load_file(tmp_path / "whole" / "model.safetensors")
    write_checkpoint(tmp_path / "other", save, tie_word_embeddings=True, vocab_size=128)
    save_file(save, tmp_path / "other" / "model.safetensors", metadata={"who": "cares"})
    digests = {identify_folder(tmp_path / name, name).sha256 for name in ("whole", "split", "other")}
    assert len(digests) == 1


def test_two_identities_are_equal_when_the_weights_are() -> None:
    assert BaseIdentity("here", "0" * 64) == BaseIdentity("there", "0" * 64)
    assert BaseIdentity("here", "0" * 64) != BaseIdentity("here", "1" * 64)
    with pytest.raises(FormatError, match=r"not a SHA-256"):
        BaseIdentity("here", "0" * 63)


def test_the_digest_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "m", {"a": torch.zeros(3)})
    first = identify_folder(folder, "m")
    read = identity._digest_folder

    def unread(folder: Path) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(identity, "_digest_folder", unread)
    assert identify_folder(folder, "other name") == first
    monkeypatch.setattr(identity, "_digest_folder", read)
    write_checkpoint(folder, {"a": torch.ones(3)})
    assert identify_folder(folder, "m") != first


def test_a_cache_that_lies_in_ruins_costs_time_only(tmp_path: Path, cache: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"a": torch.zeros(3)})
    first = identify_folder(folder, "m")
    (remembered,) = (cache / "identities").iterdir()
    remembered.write_text('{"sha256": "zz"}')
    assert identify_folder(folder, "m") == first
    remembered.write_text("{")
    assert identify_folder(folder, "m") == first
    remembered.unlink()
    remembered.parent.rmdir()
    remembered.parent.write_text("a file where the folder should be")
    assert identify_folder(folder, "m") == first


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_instead(folder: Path) -> None:
    remove_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def header(content: bytes, rest: bytes = b"") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + rest)

    return write


def index(content: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove_config, InputError, "no config.json: not a model folder"),
        (remove_weights, InputError, "no model.safetensors"),
        (pickle_instead, UnsupportedError, "pytorch_model.bin is a pickle"),
        (header(b""), FormatError, "not a safetensors file"),
        (header(b"[1]"), FormatError, "not a safetensors file"),
        (header(b'{"a": 1}'), FormatError, "not a safetensors file"),
        (header(b'{"a": {"dtype": "F32"}}'), FormatError, "not a safetensors file"),
        (header(b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}', b"1234"), FormatError, "not a safe"),
        (header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', b"1234"), FormatError, "not a safe"),
        (header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"12345"), FormatError, "bytes that"),
        (index({}), FormatError, "no weight_map"),
        (index({"weight_map": {"a": 1}}), FormatError, "no weight_map"),
        (index({"weight_map": {"a": "gone.safetensors"}}), FormatError, "gone.safetensors is missing"),
        (index({"weight_map": {"z": "shard.safetensors"}}), FormatError, "shard.safetensors lacks z"),
        (index({"weight_map": {"a": "../m/shard.safetensors"}}), InputError, "cannot be a name"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], None], error: type[TreadleError], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "m", {"a": torch.zeros(3)})
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        identify_folder(folder, "m")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cut_anywhere_is_truncated(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"a": torch.zeros(3), "b": torch.zeros(2, 2)})
    whole = (folder / "model.safetensors").read_bytes()
    for length in (0, 4, 8, 40, len(whole) - 17, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"truncated|not a safetensors"):
            identify_folder(folder, "m")


def test_a_file_that_shrinks_while_it_is_read_is_truncated(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"a": torch.zeros(3)})
    (stored,) = identity.stored_tensors(folder).values()
    stored.file.write_bytes(stored.file.read_bytes()[:-4])
    with pytest.raises(FormatError, match=r"truncated"):
        identity._digest_range(stored)


def test_reading_needs_no_more_memory_than_a_chunk(
    tmp_path: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama.save_pretrained(tmp_path / "m")
    whole = identify_folder(tmp_path / "m", "m")
    monkeypatch.setattr(identity, "_CHUNK", 7)
    assert identity._digest_folder(tmp_path / "m") == whole.sha256
