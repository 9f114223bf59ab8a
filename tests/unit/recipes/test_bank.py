"""Banks on disk: built, changed, calibrated with the same passages, one process at a time."""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from treadle.errors import InputError, MismatchError
from treadle.recipes import bank as bank_recipes
from treadle.recipes.bank import (
    AdapterPath,
    add_adapters,
    build_bank,
    calibrate_bank,
    forget_versions,
    label_adapter,
    merge_banks,
    remove_adapters,
    roll_back,
    update_adapters,
)
from treadle.recipes.calibration import OwnSource, PublicSource
from treadle.routing.bank_files import load_bank
from treadle.routing.bank_versions import versions


def statistics_of(folder: Path, name: str) -> list[float]:
    bank = load_bank(folder)
    assert bank.statistics is not None
    place = bank.names.index(name)
    return [float(mean[place]) for mean in bank.statistics.mean.values()]


def test_a_built_bank_is_what_was_asked_for(built_bank: Path) -> None:
    bank = load_bank(built_bank)
    assert bank.names == ("sums", "films", "colours", "foreign")
    assert bank.statistics is not None
    assert bank.statistics.source == "public.txt"  # a name, never a path
    assert not bank.statistics.spends_privacy


def test_an_existing_folder_is_refused(built_bank: Path, small_fleet: Path) -> None:
    with pytest.raises(InputError, match="already exists"):
        build_bank(built_bank, small_fleet / "family", [AdapterPath(small_fleet / "sums")], source=None)


def test_a_folder_that_appears_meanwhile_is_not_overwritten(
    small_fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder, family = bank_recipes._alone, tmp_path / "bank", small_fleet / "family"

    @contextlib.contextmanager
    def second(*arguments: object) -> Iterator[None]:
        """The lock, which somebody else who built this bank had first."""
        monkeypatch.setattr(bank_recipes, "_alone", real)
        build_bank(folder, family, [AdapterPath(small_fleet / "sums")], source=None)
        with real(*arguments):  # type: ignore[arg-type]
            yield

    monkeypatch.setattr(bank_recipes, "_alone", second)
    with pytest.raises(InputError, match="already exists"):
        build_bank(folder, family, [AdapterPath(small_fleet / "films")], source=None)
    assert load_bank(folder).names == ("sums",)
    assert [version.number for version in versions(folder)] == [1]


def test_added_adapters_are_calibrated_with_the_kept_passages(small_fleet: Path, bank_copy: Path) -> None:
    remove_adapters(bank_copy, ["colours"])
    before = statistics_of(bank_copy, "films")
    public = small_fleet / "public.txt"
    hidden = public.rename(small_fleet / "hidden.txt")  # the source itself is not needed again
    try:
        change = add_adapters(bank_copy, [AdapterPath(small_fleet / "colours")])
    finally:
        hidden.rename(public)
    assert change.recalibrated
    assert change.uncalibrated == ()
    assert change.bank.names == ("sums", "films", "foreign", "colours")
    assert statistics_of(bank_copy, "films") == before  # not a bit
    assert change.bank.statistics is not None
    assert len(list(bank_copy.glob("public-text-*.json"))) == 1


def test_without_kept_passages_an_addition_says_that_it_waits(small_fleet: Path, bank_copy: Path) -> None:
    remove_adapters(bank_copy, ["colours"])
    for kept in bank_copy.glob("public-text-*.json"):
        kept.unlink()
    change = add_adapters(bank_copy, [AdapterPath(small_fleet / "colours")])
    assert not change.recalibrated
    assert change.uncalibrated == ("colours",)


def test_a_name_may_be_given(small_fleet: Path, tmp_path: Path) -> None:
    paths = [AdapterPath(small_fleet / "sums"), AdapterPath(small_fleet / "sums", "again")]
    change = build_bank(tmp_path / "bank", small_fleet / "family", paths, source=None)
    assert change.bank.names == ("sums", "again")
    assert change.uncalibrated == ("sums", "again")


def test_an_update_keeps_the_place_the_labels_and_the_others_statistics(small_fleet: Path, bank_copy: Path) -> None:
    label_adapter(bank_copy, "films", frozenset({"dept=arts"}))
    before, others = statistics_of(bank_copy, "films"), statistics_of(bank_copy, "sums")
    change = update_adapters(bank_copy, [AdapterPath(small_fleet / "colours", "films")])
    assert change.bank.names == ("sums", "films", "colours", "foreign")
    assert change.recalibrated
    assert change.bank.labels == {"films": {"dept=arts"}}
    assert statistics_of(bank_copy, "sums") == others
    assert statistics_of(bank_copy, "films") == statistics_of(bank_copy, "colours") != before
    labels = frozenset({"dept=science"})
    assert update_adapters(bank_copy, [AdapterPath(small_fleet / "sums")], labels=labels).bank.labels["sums"] == labels
    with pytest.raises(InputError, match="no adapter 'late' in the bank; choose among"):
        update_adapters(bank_copy, [AdapterPath(small_fleet / "sums", "late")])


def test_merged_banks_keep_what_both_measured_alike(small_fleet: Path, bank_copy: Path, tmp_path: Path) -> None:
    expected = {name: statistics_of(bank_copy, name) for name in ("sums", "films", "colours")}
    source = PublicSource(str(small_fleet / "public.txt"), limit=8, words=10)
    for folder, names, own in (("one", ["sums"], source), ("two", ["films"], source), ("three", ["colours"], None)):
        paths = [AdapterPath(small_fleet / name) for name in names]
        build_bank(tmp_path / folder, small_fleet / "family", paths, source=own)
    label_adapter(tmp_path / "two", "films", frozenset({"dept=arts"}))
    assert not merge_banks(tmp_path / "one", tmp_path / "two").recalibrated  # nothing had to be read
    assert merge_banks(tmp_path / "one", tmp_path / "three").recalibrated  # three had no statistics
    merged = load_bank(tmp_path / "one")
    assert merged.names == ("sums", "films", "colours")
    assert merged.labels == {"films": {"dept=arts"}}
    assert {name: statistics_of(tmp_path / "one", name) for name in merged.names} == expected
    assert load_bank(tmp_path / "two").names == ("films",)
    with pytest.raises(InputError, match="films: this adapter name is taken; give it another name, update it"):
        merge_banks(tmp_path / "one", tmp_path / "two")


def test_going_back_and_forth(small_fleet: Path, bank_copy: Path) -> None:
    first = load_bank(bank_copy)
    remove_adapters(bank_copy, ["films"])
    remove_adapters(bank_copy, ["sums"])
    assert roll_back(bank_copy).bank.names == load_bank(bank_copy).names == ("sums", "colours", "foreign")
    assert roll_back(bank_copy, 1).bank.names == first.names
    assert statistics_of(bank_copy, "films") == [float(mean[1]) for mean in first.statistics.mean.values()]  # type: ignore[union-attr]
    assert [version.number for version in versions(bank_copy)] == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="no version 9"):
        roll_back(bank_copy, 9)
    assert forget_versions(bank_copy) == 4
    with pytest.raises(InputError, match="there is no earlier version"):
        roll_back(bank_copy)
    assert load_bank(bank_copy).names == first.names


def test_own_text_spends_privacy_and_is_not_kept(small_fleet: Path, bank_copy: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.jsonl"
    text.write_text("\n".join(json.dumps({"line": f"the film is w{i} and not good"}) for i in range(5)))
    source = OwnSource(dict.fromkeys(load_bank(bank_copy).names, str(text)), field="line")
    change = calibrate_bank(bank_copy, source)
    assert change.bank.statistics is not None
    assert change.bank.statistics.spends_privacy
    assert change.bank.statistics.digest == ""
    assert forget_versions(bank_copy) == 1
    assert not list(bank_copy.glob("public-text-*.json"))  # the earlier version's went with it


def test_own_texts_must_match_the_adapters(bank_copy: Path, small_fleet: Path) -> None:
    text = str(small_fleet / "public.txt")
    with pytest.raises(InputError, match="no text of its own for adapter 'films'"):
        calibrate_bank(bank_copy, OwnSource({"sums": text}))
    every = dict.fromkeys(("sums", "films", "colours", "foreign", "stranger"), text)
    with pytest.raises(InputError, match="no adapter 'stranger'"):
        calibrate_bank(bank_copy, OwnSource(every))


def test_the_last_adapter_stays(bank_copy: Path) -> None:
    before = (bank_copy / "bank.json").read_bytes()
    with pytest.raises(InputError):
        remove_adapters(bank_copy, ["sums", "films", "colours", "foreign"])
    assert (bank_copy / "bank.json").read_bytes() == before


def test_another_base_is_refused_and_nothing_changes(bank_copy: Path, small_fleet: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(small_fleet / "base", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    first = next(iter(tensors))
    tensors[first] = tensors[first] + torch.ones(())
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    before = (bank_copy / "bank.json").read_bytes()
    with pytest.raises(MismatchError, match="name the base that the family was made for"):
        calibrate_bank(bank_copy, PublicSource(str(small_fleet / "public.txt")), base=str(other))
    assert (bank_copy / "bank.json").read_bytes() == before


def test_a_second_process_waits_for_the_first(
    bank_copy: Path, steps: tuple[list[str], Callable[[str, int, int], None]]
) -> None:
    told, progress = steps
    lock = FileLock(bank_copy.parent / f".{bank_copy.name}.lock")
    with lock:
        waiting = threading.Thread(target=remove_adapters, args=(bank_copy, ["films"]), kwargs={"progress": progress})
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        assert "films" in load_bank(bank_copy).names
    waiting.join(60)
    assert "waiting for another process that changes this bank" in told
    assert "films" not in load_bank(bank_copy).names
