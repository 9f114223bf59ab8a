import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from treadle.errors import ConfigError, FormatError, InputError, TreadleError, UnavailableError, UnsupportedError
from treadle.models import loading
from treadle.models.loading import (
    architecture,
    choose_device,
    identity_of,
    load_model,
    load_tokenizer,
    model_folder,
    resolve,
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the hub has been asked for; it never answers."""
    asked: list[str] = []

    def snapshot(name: str, **_: object) -> str:
        asked.append(name)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_a_folder_is_itself_and_the_hub_is_not_asked(
    encoder_folder: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(str(encoder_folder)) == encoder_folder.resolve()
    monkeypatch.chdir(encoder_folder.parent.parent)
    assert resolve(f"{encoder_folder.parent.name}/encoder") == encoder_folder.resolve()
    load_model(str(encoder_folder))
    load_tokenizer(str(encoder_folder))
    assert hub == []


def test_an_identity_is_labelled_with_what_may_travel(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoder_folder)
    for typed in (str(encoder_folder), ".", "../encoder/", str(encoder_folder / ".." / "encoder")):
        assert identity_of(typed).name == "encoder"
    (tmp_path / "link").symlink_to(encoder_folder)
    assert identity_of(str(tmp_path / "link")).name == "encoder"
    monkeypatch.setattr(loading, "fetch", lambda name, progress: encoder_folder)
    monkeypatch.setattr(loading, "_hub_snapshot", lambda name: encoder_folder)
    for typed in ("minilm-l6", "owner/name"):
        assert identity_of(typed).name == typed
    (encoder_folder / "minilm-l6").mkdir()  # a catalogue name means the catalogue's model, here as for `resolve`
    assert identity_of("minilm-l6").name == "minilm-l6"


@pytest.mark.parametrize(
    "name", ["./owner/name", "/no/such/folder", "a/b/c", "~/nowhere/at/all", "back\\slash", "here/x"]
)
def test_a_path_that_does_not_exist_never_reaches_the_hub(
    name: str, hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such folder; check the path"):
        resolve(name)
    assert hub == []


def test_a_word_is_a_catalogue_name_or_a_mistake(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "fetch", lambda name, progress: Path("/made") / name)
    assert resolve("minilm-l6") == Path("/made/minilm-l6")
    with pytest.raises(InputError, match=r"did you mean minilm-l6"):
        resolve("minilm-16")
    assert hub == []


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match=r"a file, not a folder"):
        resolve(str(tmp_path / "x"))


def test_a_hub_id_that_cannot_be_had_says_what_to_do(hub: list[str]) -> None:
    said: list[str] = []
    with pytest.raises(
        UnavailableError, match=r"owner/name: the hub does not give it .* name a local folder"
    ) as caught:
        resolve("owner/name", lambda line, done, total: said.append(line))
    assert hub == ["owner/name"]
    assert said == ["downloading owner/name"]
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_safe_files_only(encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert not any("bin" in pattern or "pt" in pattern or pattern == "*" for pattern in allow_patterns)
        assert ignore_patterns == ["*/*"]
        return str(encoder_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("owner/name") == encoder_folder


@pytest.mark.filterwarnings("error")
def test_a_loaded_model_is_frozen_and_nothing_is_said(
    decoder_folder: Path, tiny_llama: LlamaForCausalLM, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(str(decoder_folder), device="cpu")
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    tokens = torch.tensor([[1, 30, 31, 2]])
    assert torch.equal(model(tokens).logits, tiny_llama(tokens).logits)
    assert load_model(str(decoder_folder), dtype="bfloat16").dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")


def test_the_architecture_decides_what_is_loaded(
    tmp_path: Path,
    encoder_folder: Path,
    tiny_bert: BertForSequenceClassification,
    tiny_t5: T5ForConditionalGeneration,
) -> None:
    for model in (tiny_bert, tiny_t5):
        model.save_pretrained(tmp_path / "m")
        assert type(load_model(str(tmp_path / "m"))) is type(model)
        assert architecture(tmp_path / "m") == type(model).__name__
    assert type(load_model(str(encoder_folder))).__name__ == "BertModel"


def test_a_checkpoint_without_a_weight_is_not_completed_at_random(decoder_folder: Path) -> None:
    weights = load_file(decoder_folder / "model.safetensors")
    lost = weights.pop("model.norm.weight")
    save_file(weights, decoder_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks 1 weights, such as model.norm.weight"):
        load_model(str(decoder_folder))
    save_file({**weights, "model.norm.weight": lost[1:]}, decoder_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"transformers cannot load it"):
        load_model(str(decoder_folder))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("adapter_config.json", "{}", InputError, "an adapter, not a base model"),
        ("config.json", "[]", FormatError, "expected a JSON object"),
        ("config.json", '{"model_type": "no-such-type"}', FormatError, "transformers cannot load it"),
        ("config.json", '{"auto_map": {"AutoModel": "evil.Model"}}', UnsupportedError, "brings its own code"),
        ("model.safetensors", "short", FormatError, "truncated"),
    ],
)
def test_a_folder_that_is_no_base_is_refused(
    decoder_folder: Path, file: str, content: str, error: type[TreadleError], message: str
) -> None:
    (decoder_folder / file).write_text(content)
    with pytest.raises(error, match=message) as caught:
        load_model(str(decoder_folder))
    assert "\n" not in str(caught.value)


def test_a_pickle_beside_no_safetensors_is_refused(decoder_folder: Path) -> None:
    (decoder_folder / "model.safetensors").rename(decoder_folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"convert the model to safetensors"):
        model_folder(str(decoder_folder))


def test_unknown_devices_and_dtypes_are_refused(decoder_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype 'int4'"):
        load_model(str(decoder_folder), dtype="int4")
    with pytest.raises(ConfigError, match=r"no device 'toaster' here"):
        load_model(str(decoder_folder), device="toaster")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_prefers_cuda(there: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("auto").type == expected


def test_a_causal_lm_is_padded_on_the_left_and_an_encoder_is_not(
    decoder_folder: Path, encoder_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for folder, side in ((decoder_folder, "left"), (encoder_folder, "right")):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "right"}))
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.padding_side == side
        assert tokenizer("a good film").input_ids == tiny_tokenizer("a good film").input_ids


def test_a_tokenizer_without_a_pad_token_pads_with_eos(decoder_folder: Path) -> None:
    file = decoder_folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("pad_token")
    file.write_text(json.dumps(config))
    assert load_tokenizer(str(decoder_folder)).pad_token == "<eos>"
    config.pop("eos_token")
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"the tokenizer cannot pad"):
        load_tokenizer(str(decoder_folder))


def test_a_folder_without_a_tokenizer_says_so(decoder_folder: Path) -> None:
    for file in decoder_folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"no tokenizer can be loaded"):
        load_tokenizer(str(decoder_folder))
