"""Banks on disk: the same choices after a round trip, B unread until it acts, and nothing lost by a crash."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle import files
from treadle.errors import FormatError, InputError, TreadleError, UnavailableError
from treadle.family.family import AdapterFamily
from treadle.routing import bank_files
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank, save_bank, verify_bank
from treadle.routing.bank_versions import sweep
from treadle.routing.routed import RoutedModel

IDS = torch.tensor([[1, 40, 41, 42, 43], [1, 60, 61, 62, 63]])


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    return make.bank(tiny_llama, tiny_tokenizer)


@pytest.fixture
def folder(bank: AdapterBank, tmp_path: Path) -> Path:
    save_bank(bank, tmp_path / "bank")
    return tmp_path / "bank"


def answers(model: LlamaForCausalLM, bank: AdapterBank, scorer: str = "seqr") -> tuple[torch.Tensor, str]:
    routed = RoutedModel(model, bank, granularity="token", scorer=scorer)
    with routed.trace() as trace:
        logits = routed(IDS).logits
    routed.unwrap()
    return logits, json.dumps(trace.to_json())


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def adapter_file(folder: Path, name: str) -> Path:
    return next((folder / "adapters").glob(f"{name}-*.safetensors"))


@pytest.mark.parametrize("change", ["one row", "one column", "whole numbers"])
def test_a_matrix_that_would_be_stretched_to_fit_is_refused(folder: Path, change: str) -> None:
    path = adapter_file(folder, "alpha")
    tensors = load_file(path)
    name = next(key for key in tensors if key.startswith("lora_B/"))
    B = tensors[name]
    tensors[name] = {"one row": B[:1], "one column": B[:, :1], "whole numbers": B.to(torch.int8)}[change].contiguous()
    save_file(tensors, path)
    with pytest.raises(FormatError, match=r"not floats of \("):
        load_bank(folder)


@pytest.mark.parametrize("scorer", ["seqr", "norm", "arrow"])
def test_a_round_trip_changes_no_bit(
    scorer: str, bank: AdapterBank, folder: Path, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    opened = load_bank(folder)
    expected, found = answers(tiny_llama, bank, scorer), answers(tiny_llama, opened, scorer)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert (opened.names, opened.access) == (bank.names, bank.access)
    assert [adapter.provenance for adapter in opened.adapters] == [adapter.provenance for adapter in bank.adapters]
    assert opened.statistics is not None
    assert bank.statistics is not None
    assert opened.statistics.digest == bank.statistics.digest
    assert opened.statistics.ignored_tokens == bank.statistics.ignored_tokens
    verify_bank(folder)
    save_bank(opened, tmp_path / "again")
    assert listing(tmp_path / "again") == listing(folder)


def test_a_bank_without_calibration_stays_so(
    make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    family = make.family(tiny_llama)
    save_bank(AdapterBank.build(family, [make.foreign(family, "stranger")]), tmp_path / "bank")
    opened = load_bank(tmp_path / "bank")
    assert opened.statistics is None
    assert opened.adapters[0].family is None


def test_opening_reads_no_B_and_verifying_does(bank: AdapterBank, folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    path = adapter_file(folder, "beta")
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header:] = b"\xff" * (len(content) - header)  # NaN, every number of it
    path.write_bytes(content)
    opened = load_bank(folder)
    assert opened.names == bank.names
    assert not opened.layers["model.layers.0.mlp.up_proj"].groups[0].grams.isnan().any()
    expected = RoutedModel(tiny_llama, bank)(IDS, permitted=[{"alpha", "delta"}] * 2).logits
    assert torch.equal(RoutedModel(tiny_llama, opened)(IDS, permitted=[{"alpha", "delta"}] * 2).logits, expected)
    with pytest.raises(FormatError, match="SHA-256 differs") as caught:
        verify_bank(folder)
    assert path.name in str(caught.value)


def test_an_adapter_with_anothers_bytes_is_refused_when_it_first_acts(folder: Path) -> None:
    path = adapter_file(folder, "beta")
    path.write_bytes(adapter_file(folder, "alpha").read_bytes())  # whole, and of the right shapes
    opened = load_bank(folder)
    module = next(iter(opened.layers))
    for _ in range(2):
        with pytest.raises(FormatError, match="SHA-256 differs") as caught:
            opened.adapter("beta").lora_B[module]
        assert path.name in str(caught.value)
    assert torch.equal(opened.adapter("alpha").lora_B[module], load_bank(folder).adapter("alpha").lora_B[module])


def test_an_adapters_bytes_are_checked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = load_bank(folder)
    checked: list[Path] = []
    real = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: checked.append(path) or real(path))
    for module in opened.layers:
        opened.adapter("beta").folded_B(module)
    assert checked == [adapter_file(folder, "beta").resolve()]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "harm", "message"),
    [
        ("adapters/beta-*", truncate, "damaged safetensors"),
        ("factors-*", truncate, "damaged safetensors"),
        ("calibration-*", truncate, "damaged safetensors"),
        ("factors-*", flip, "SHA-256 differs"),
        ("calibration-*", flip, "SHA-256 differs"),
        ("adapters/beta-*", Path.unlink, "a file of the bank is missing"),
        ("factors-*", Path.unlink, "no such file"),
        ("family/lora_A*", flip, "SHA-256 differs"),
        ("bank.json", Path.unlink, "no such file"),
        ("bank.json", truncate, "not valid JSON"),
    ],
)
def test_harm_is_found_when_opening(pattern: str, harm: Callable[[Path], None], message: str, folder: Path) -> None:
    harm(next(folder.glob(pattern)))
    with pytest.raises(TreadleError, match=message) as caught:
        load_bank(folder)
    assert "\n" not in str(caught.value)


def at(*keys: str | int) -> Callable[[Any, Any], None]:
    def put(content: Any, value: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return put


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (at("format"), "treadle.bank/9", "'format' is not"),
        (at("family"), "0" * 64, "its family is not the one"),
        (at("access"), "Required", "'access' is 'Required'"),
        (at("factors"), "../outside.safetensors", "leaves the folder"),
        (at("adapters", 0, "file"), "../../outside.safetensors", "leaves the folder"),
        (at("adapters", 0, "file"), "/etc/passwd", "leaves the folder"),
        (at("calibration", "file"), "../outside.safetensors", "leaves the folder"),
        (at("adapters", 0, "name"), "../alpha", "cannot be a name"),
        (at("adapters", 0, "name"), "beta", "two adapters have one name"),
        (at("adapters", 0), {}, "is missing"),
        (at("adapters"), 7, "of a wrong type"),
        (at("adapters", 0, "provenance"), {"method": 3}, "provenance"),
        (at("adapters", 4, "plan", "modules"), {}, "."),
        (at("modules"), ["model.layers.0.mlp.up_proj"], "not those of its adapters"),
        (at("modules"), ["lm_head"], "not those of its adapters"),
        (at("calibration", "tokens"), "many", "calibration lacks"),
        (at("calibration"), {"source": "x"}, "calibration lacks"),
    ],
)
def test_an_edited_description_is_refused(
    place: Callable[[Any, Any], None], value: Any, message: str, folder: Path
) -> None:
    content = json.loads((folder / "bank.json").read_text())
    place(content, value)
    (folder / "bank.json").write_text(json.dumps(content))
    shutil.copy(next(folder.glob("factors-*")), folder.parent / "outside.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        load_bank(folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_dropped_from_the_description_does_not_shift_the_others(folder: Path) -> None:
    content = json.loads((folder / "bank.json").read_text())
    del content["adapters"][1]
    (folder / "bank.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="are of other adapters"):
        load_bank(folder)


def test_a_link_out_of_the_bank_is_not_followed(folder: Path, tmp_path: Path) -> None:
    path = adapter_file(folder, "alpha")
    outside = tmp_path / path.name
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(FormatError, match="leaves the folder"):
        load_bank(folder)


def test_changing_a_bank_sweeps_what_it_no_longer_names(bank: AdapterBank, folder: Path) -> None:
    save_bank(bank.remove("beta"), folder)
    assert load_bank(folder).names == ("alpha", "gamma", "delta", "stranger")
    assert list((folder / "adapters").glob("beta-*"))  # somebody may want to go back
    sweep(folder, keep=1)
    assert not list((folder / "adapters").glob("beta-*"))
    assert len(list(folder.glob("factors-*"))) == len(list(folder.glob("calibration-*"))) == 1
    verify_bank(folder)
    save_bank(load_bank(folder).add(bank.adapter("beta")), folder)  # its own files stay open meanwhile
    assert load_bank(folder).names[-1] == "beta"
    verify_bank(folder)


@pytest.mark.parametrize("stage", ["adapters", "factors", "calibration", "bank.json", "rename"])
def test_a_crash_at_any_stage_leaves_the_old_bank(
    stage: str,
    bank: AdapterBank,
    folder: Path,
    make: SimpleNamespace,
    tiny_llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, before = answers(tiny_llama, bank), listing(folder)
    real = files.write_bytes

    def crashing(path: Path, content: bytes) -> None:
        if stage in path.relative_to(folder).as_posix():
            raise KeyboardInterrupt
        real(path, content)

    def no_rename(*_: object) -> None:
        raise OSError(28, "No space left on device")

    changed = bank.remove("beta").add(make.adapter(bank.family, "late"))
    with monkeypatch.context() as patch:
        if stage == "rename":
            patch.setattr("os.replace", no_rename)
        else:
            patch.setattr(files, "write_bytes", crashing)
        with pytest.raises((KeyboardInterrupt, UnavailableError)):
            save_bank(changed, folder)
    found = answers(tiny_llama, load_bank(folder))
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    after = listing(folder)
    assert {name: after[name] for name in before} == before  # nothing is swept before the switch
    save_bank(changed, folder)
    assert load_bank(folder).names == changed.names
    verify_bank(folder)


def test_a_crash_of_the_first_save_leaves_no_folder(
    bank: AdapterBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", crash)
        with pytest.raises(KeyboardInterrupt):
            save_bank(bank, tmp_path / "bank")
    assert not list(tmp_path.iterdir())
    (tmp_path / "bank").mkdir()  # an empty folder is as good as none
    save_bank(bank, tmp_path / "bank")
    assert load_bank(tmp_path / "bank").names == bank.names


def test_what_stands_in_the_way_is_not_overwritten(
    bank: AdapterBank, folder: Path, make: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="holds no bank"):
        save_bank(bank, tmp_path / "letters")
    assert listing(tmp_path / "letters") == {"letter.txt": b"dear"}
    other = AdapterFamily.create(base=bank.family.base, plan=bank.family.plan, seed=99)
    before = listing(folder)
    with pytest.raises(InputError, match="of another family"):
        save_bank(AdapterBank.build(other, [make.adapter(other, "alpha")]), folder)
    assert listing(folder) == before


def test_a_damaged_file_of_the_right_name_is_written_again(bank: AdapterBank, folder: Path) -> None:
    flip(adapter_file(folder, "gamma"))
    save_bank(bank, folder)
    verify_bank(folder)


def test_mapped_tensors_are_a_mapping(folder: Path) -> None:
    mapped = bank_files.MappedTensors(adapter_file(folder, "stranger"), "lora_A/")
    assert len(mapped) == len(list(mapped))
    assert "no.such.layer" not in mapped
    with pytest.raises(KeyError):
        mapped["no.such.layer"]
