"""Files are whole or absent, whatever happens while they are written."""

import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from treadle import files
from treadle.errors import FormatError, InputError, UnavailableError


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


def test_write_bytes_makes_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    files.write_bytes(path, b"old")
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert leftovers(path.parent) == []


def test_what_cannot_be_written_is_refused_before_there_is_anything_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.refuse_unwritable(tmp_path / "a" / "page.html")
    assert not list((tmp_path / "a").iterdir())
    with pytest.raises(InputError, match="a: it is a folder; name a file"):
        files.refuse_unwritable(tmp_path / "a")
    monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda dir: full_disk())
    with pytest.raises(UnavailableError, match=r"page\.html: cannot write \(No space left on device\); free space"):
        files.refuse_unwritable(tmp_path / "page.html")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "plan.json"
    files.write_bytes(path, b"old")
    monkeypatch.setattr(os, step, full_disk)
    with pytest.raises(UnavailableError, match=r"plan\.json: cannot write \(No space left on device\); free space"):
        files.write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_ctrl_c_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "plan.json"
    files.write_bytes(path, b"old")
    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_json_is_canonical_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    content = {"z": 1, "a": ["é", 0.1, None]}
    files.write_json(path, content)
    assert path.read_bytes() == files.canonical_json(content)
    assert list(files.read_json(path)) == ["z", "a"]  # order is kept: it is hashed
    assert json.loads(path.read_bytes()) == content


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_holds_no_nan(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"value": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, InputError, "no such file"),
        (b"{", FormatError, "not valid JSON"),
        (b"\xff\xfe", FormatError, "not valid JSON"),
        (b"[" * 100_000, FormatError, "not valid JSON"),
        (b"[1]", FormatError, "expected a JSON object"),
    ],
)
def test_read_json_refuses(tmp_path: Path, content: bytes | None, error: type[Exception], message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=rf"x\.json: {message}"):
        files.read_json(path)


def test_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    with files.new_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_bytes(b"1")
        assert not path.exists()
    assert (path / "sub" / "file").read_bytes() == b"1"
    assert leftovers(tmp_path) == []


def test_new_folder_refuses_to_overwrite_unasked(tmp_path: Path) -> None:
    (tmp_path / "bank").mkdir()
    with pytest.raises(InputError, match="bank: already exists"), files.new_folder(tmp_path / "bank"):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("bad"), OSError(28, "No space left on device")])
def test_a_failing_block_leaves_what_stood_there(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "bank"
    with files.new_folder(path) as temporary:
        (temporary / "file").write_bytes(b"old")
    expected = UnavailableError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected), files.new_folder(path, overwrite=True) as temporary:  # noqa: PT012
        (temporary / "file").write_bytes(b"new")
        raise failure
    assert (path / "file").read_bytes() == b"old"
    assert leftovers(tmp_path) == []


class OldLibrary:
    """A C library that cannot exchange two names."""


@pytest.mark.parametrize("exchanges", [True, False], ids=["in one step", "by renames"])
def test_a_folder_that_cannot_be_flushed_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    path = tmp_path / "bank"
    with files.new_folder(path) as temporary:
        (temporary / "file").write_bytes(b"old")
    if not exchanges:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: OldLibrary())
    monkeypatch.setattr(files, "sync_folder", lambda _: full_disk())
    with pytest.raises(UnavailableError), files.new_folder(path, overwrite=True) as temporary:
        (temporary / "file").write_bytes(b"new")
    assert (path / "file").read_bytes() == b"old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_rename_that_fails_loses_neither_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    path = tmp_path / "bank"
    with files.new_folder(path) as temporary:
        (temporary / "file").write_bytes(b"old")
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: OldLibrary())
    rename, calls = os.rename, []

    def fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing:
            full_disk()
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(UnavailableError), files.new_folder(path, overwrite=True) as temporary:
        (temporary / "file").write_bytes(b"new")
    # The third only clears up: the new folder is in its place, and the old one still beside it.
    assert (path / "file").read_bytes() == (b"new" if failing == 3 else b"old")
    if failing == 3:
        assert [file.read_bytes() for file in tmp_path.glob(".bank.*.old/bank/file")] == [b"old"]


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnavailableError, match="cannot write"):
        files.write_bytes(tmp_path / "file" / "plan.json", b"")
    with pytest.raises(UnavailableError, match="cannot write"), files.new_folder(tmp_path / "file" / "bank"):
        pass
    with pytest.raises(UnavailableError, match="cannot write"):
        files.append_line(tmp_path / "file" / "log", b"")
    with pytest.raises(InputError, match="cannot be read"):
        files.read_json(tmp_path)


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    for name in ("first", "second"):
        with files.new_folder(path, overwrite=True) as temporary:
            (temporary / name).write_bytes(b"")
    assert [file.name for file in path.iterdir()] == ["second"]
    assert leftovers(tmp_path) == []


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert files.sha256_of(path) == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("name", ["a", "sst2", "a.b-c_d", "0" * 64])
def test_good_names(name: str) -> None:
    assert files.checked_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "a\\b", ".hidden", "-x", "a b", "a\n", "é", "0" * 65])
def test_bad_names(name: str) -> None:
    with pytest.raises(InputError, match="cannot be a name"):
        files.checked_name(name)


def test_contained_paths(tmp_path: Path) -> None:
    assert files.contained(tmp_path, "a/b") == tmp_path.resolve() / "a" / "b"


@pytest.mark.parametrize("relative", ["../x", "/etc/passwd", "a/../../x", "link/x"])
def test_paths_that_climb_out(tmp_path: Path, relative: str) -> None:
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "link").symlink_to(tmp_path)
    with pytest.raises(FormatError, match="leaves the folder"):
        files.contained(tmp_path / "bank", relative)


def test_appended_lines_are_whole_even_behind_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    files.append_line(path, b"one")
    files.append_line(path, b"two")
    assert path.read_bytes() == b"one\ntwo\n"
    path.write_bytes(b'one\n{"ha')  # a full disk, once
    files.append_line(path, b"three")
    assert path.read_bytes() == b'one\n{"ha\nthree\n'


def test_lines_of_json_are_read_but_for_those_that_were_never_ended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert list(files.json_lines(path)) == []
    path.write_bytes('{"a": 1}\n{"ha\n\n["ü\u2028"]\n{"b'.encode())
    assert list(files.json_lines(path)) == [(1, {"a": 1}), (4, ["ü\u2028"])]


def test_a_line_waits_for_another_that_is_only_begun(tmp_path: Path) -> None:
    """A file grows page by page: what has its end in the middle of a line is being written, not cut off."""
    path = tmp_path / "log.jsonl"
    with path.open("ab", buffering=0) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"be")
        thread = threading.Thread(target=files.append_line, args=(path, b"mine"))
        thread.start()
        thread.join(timeout=0.2)
        assert path.read_bytes() == b"be"
        other.write(b"gun\n")
    thread.join()
    assert path.read_bytes() == b"begun\nmine\n"


def test_a_line_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.write", lambda handle, content: len(content) - 1)
    with pytest.raises(UnavailableError, match="cannot write \\(No space left on device\\); free space"):
        files.append_line(tmp_path / "log.jsonl", b"one")
