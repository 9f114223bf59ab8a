"""Versions on disk: nothing is lost by going forth and back, nor by a crash at any write."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle import files
from treadle.errors import FormatError, InputError
from treadle.routing.bank import AdapterBank
from treadle.routing.bank_files import load_bank, save_bank, verify_bank
from treadle.routing.bank_versions import KEPT, bank_digest, sweep, tensor_files, versions


@pytest.fixture
def bank(make: SimpleNamespace, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterBank:
    return make.bank(tiny_llama, tiny_tokenizer)


@pytest.fixture
def folder(bank: AdapterBank, make: SimpleNamespace, tmp_path: Path) -> Path:
    save_bank(bank, tmp_path / "bank", passages=make.passages)
    return tmp_path / "bank"


def same(one: AdapterBank, other: AdapterBank) -> bool:
    """Whether two banks hold the same adapters, factors and statistics."""
    assert one.statistics is not None
    assert other.statistics is not None
    return one.names == other.names and all(
        torch.equal(factors.groups[0].grams, other.layers[module].groups[0].grams)
        and torch.equal(factors.groups[0].norms, other.layers[module].groups[0].norms)
        and torch.equal(one.statistics.mean[module].nan_to_num(-1), other.statistics.mean[module].nan_to_num(-1))
        for module, factors in one.layers.items()
    )


def test_every_change_is_a_version_and_says_what_it_was(bank: AdapterBank, folder: Path, make: SimpleNamespace) -> None:
    save_bank(load_bank(folder).add(make.adapter(bank.family, "late")), folder)
    newer = make.adapter(bank.family, "late", scale=0.9)
    save_bank(load_bank(folder).update(newer), folder)
    save_bank(load_bank(folder).remove("beta").labelled("alpha", frozenset({"dept=law"})), folder)
    kept = versions(folder)
    assert [version.number for version in kept] == [1, 2, 3, 4]
    assert [version.changes for version in kept] == [
        (),
        ("added late",),
        ("updated late",),
        ("removed beta", "labelled alpha"),
    ]
    assert kept[-1].digest == bank_digest(folder)
    assert kept[-1].adapters == ("alpha", "gamma", "delta", "stranger", "late")
    assert load_bank(folder).labels == {"alpha": {"dept=law"}}
    verify_bank(folder)


def test_each_version_opens_as_it_was(bank: AdapterBank, folder: Path, make: SimpleNamespace) -> None:
    states = [load_bank(folder)]
    for change in (
        lambda b: b.add(make.adapter(bank.family, "late")),
        lambda b: b.remove("alpha"),
        lambda b: b.update(make.adapter(bank.family, "gamma", scale=2.0)),
    ):
        save_bank(change(load_bank(folder)), folder)
        states.append(load_bank(folder))
    for number, state in enumerate(states, start=1):
        assert same(load_bank(folder, version=number), state)
    save_bank(load_bank(folder, version=1), folder)
    assert same(load_bank(folder), bank)
    assert versions(folder)[-1].number == 5
    for number in (0, 6, -1):
        with pytest.raises(InputError, match=f"no version {number}; choose one of `treadle bank versions`"):
            load_bank(folder, version=number)


def test_a_change_writes_no_adapter_that_it_leaves_alone(folder: Path, make: SimpleNamespace) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "adapters").iterdir()}
    opened = load_bank(folder)
    save_bank(opened.add(make.adapter(opened.family, "late")), folder)
    after = {path: path.stat().st_mtime_ns for path in (folder / "adapters").iterdir()}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1


def test_ten_versions_are_kept_and_what_only_older_ones_name_is_swept(folder: Path, make: SimpleNamespace) -> None:
    for turn in range(KEPT + 2):
        opened = load_bank(folder)
        save_bank(opened.update(make.adapter(opened.family, "beta", scale=1.0 + turn)), folder)
        assert len(versions(folder)) == min(turn + 2, KEPT)
        assert len(list((folder / "adapters").glob("beta-*"))) == min(turn + 2, KEPT)
    numbers = [version.number for version in versions(folder)]
    assert numbers == list(range(4, KEPT + 4))
    for number in numbers:
        load_bank(folder, version=number)
    assert len(list(folder.glob("public-text-*.json"))) == 1
    sweep(folder, keep=1)
    assert [version.number for version in versions(folder)] == [KEPT + 3]
    assert len(list((folder / "adapters").glob("beta-*"))) == 1
    assert len(list(folder.glob("factors-*"))) == len(list(folder.glob("calibration-*"))) == 1
    assert len(list(folder.glob("public-text-*.json"))) == 1
    verify_bank(folder)


def test_a_crash_at_any_write_leaves_a_whole_bank(
    folder: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, digest = load_bank(folder), bank_digest(folder)
    newer = make.adapter(before.family, "beta", scale=2.0)
    real = files.write_bytes
    written: list[str] = []

    def save_until(copy: Path, stop: int) -> bool:
        """Change the copied bank, dying at this write; whether the change was done before."""
        written.clear()

        def failing(path: Path, content: bytes) -> None:
            if len(written) == stop:
                raise KeyboardInterrupt
            written.append(path.relative_to(copy).as_posix().partition("-")[0])
            real(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_bytes", failing)
            try:
                save_bank(load_bank(copy).update(newer), copy)
            except KeyboardInterrupt:
                return False
        return True

    stop, copy = 0, Path(shutil.copytree(folder, tmp_path / "copy"))
    while not save_until(copy, stop):
        assert bank_digest(copy) == digest
        assert same(load_bank(copy), before)
        assert [version.number for version in versions(copy)] == [1]
        save_bank(load_bank(copy).update(newer), copy)  # the next attempt is not in the way of what was left
        assert same(load_bank(copy), before.update(newer))
        assert same(load_bank(copy, version=1), before)
        verify_bank(copy)
        stop += 1
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
    assert written == ["adapters/beta", "factors", "calibration", "versions/000001.json", "bank.json"]


def test_a_crash_while_sweeping_leaves_a_whole_bank(
    folder: Path, make: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for turn in range(KEPT):
        opened = load_bank(folder)
        save_bank(opened.update(make.adapter(opened.family, "beta", scale=1.0 + turn)), folder)
    opened = load_bank(folder)
    changed = opened.remove("gamma")
    real = Path.unlink

    def crash(self: Path, missing_ok: bool = False) -> None:
        if self.parent == folder / "versions" and self.suffix == ".json":
            raise KeyboardInterrupt
        real(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            save_bank(changed, folder)
    assert load_bank(folder).names == changed.names
    save_bank(load_bank(folder).remove("delta"), folder)  # the next change sweeps what was left
    assert len(versions(folder)) == KEPT
    for version in versions(folder):
        assert load_bank(folder, version=version.number).names == version.adapters


def test_a_version_keeps_the_time_of_its_writing(folder: Path) -> None:
    os.utime(folder / "bank.json", (1_700_000_000, 1_700_000_000))
    save_bank(load_bank(folder).remove("beta"), folder)
    assert versions(folder)[0].written == "2023-11-14T22:13:20+00:00"


def test_a_damaged_version_is_named_and_stops_no_change(folder: Path) -> None:
    save_bank(load_bank(folder).remove("beta"), folder)
    (folder / "versions" / "000001.json").write_text("{")
    with pytest.raises(FormatError, match=r"000001\.json: not valid JSON"):
        versions(folder)
    save_bank(load_bank(folder).remove("gamma"), folder)
    assert load_bank(folder).names == ("alpha", "delta", "stranger")
    assert load_bank(folder, version=2).names == ("alpha", "gamma", "delta", "stranger")


def test_a_version_is_a_whole_number(folder: Path) -> None:
    content = files.read_json(folder / "bank.json")
    for wrong in (0, True, "2", None):
        files.write_json(folder / "bank.json", content | {"version": wrong})
        with pytest.raises(FormatError, match="key 'version' is"):
            load_bank(folder)
        with pytest.raises(FormatError, match="key 'version' is"):
            versions(folder)


def test_what_somebody_else_put_into_the_folder_stays(bank: AdapterBank, folder: Path, make: SimpleNamespace) -> None:
    names = [
        "clinic.safetensors",
        "model-00001-of-00002.safetensors",
        "alpha-0123456789abcdef.safetensors",  # an adapter's is in adapters/
        "my-factors-0123456789abcdef.safetensors",
        "factors-0123456789abcdef0.safetensors",
        "calibration-0123456789ABCDEF.safetensors",
        "adapters/clinic.safetensors",
        "adapters/alpha-0123.safetensors",
    ]
    for name in names:
        (folder / name).write_bytes(b"precious")
    verify_bank(folder)
    own = tensor_files(folder)
    assert len(own) == len(bank.adapters) + 2
    assert not {folder / name for name in names} & set(own)
    save_bank(load_bank(folder).update(make.adapter(bank.family, "beta", scale=2.0)), folder)
    sweep(folder, keep=1)
    assert [(folder / name).read_bytes() for name in names] == [b"precious"] * len(names)
    assert len(tensor_files(folder)) == len(bank.adapters) + 2  # its own earlier ones are gone
    verify_bank(folder)


@pytest.mark.parametrize("act", [sweep, tensor_files, verify_bank])
def test_a_link_out_of_the_folder_is_not_swept(folder: Path, tmp_path: Path, act: Callable[[Path], object]) -> None:
    (folder / "adapters").rename(tmp_path / "elsewhere")
    (folder / "adapters").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mine-0123456789abcdef.safetensors").write_bytes(b"precious")
    before = sorted((tmp_path / "elsewhere").iterdir())
    with pytest.raises(FormatError, match="'adapters' leaves the folder"):
        act(folder)
    assert sorted((tmp_path / "elsewhere").iterdir()) == before
