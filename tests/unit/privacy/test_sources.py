"""A data set is known by digests that mean nothing without the ledger's secret."""

import hashlib
from pathlib import Path

import pytest

from treadle.errors import InputError
from treadle.privacy.sources import source_of

SECRET = bytes(range(32))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "ward.csv").write_bytes(b"text,label\na,1\n")
    return tmp_path / "ward.csv"


def test_no_digest_is_a_plain_one(file: Path) -> None:
    found = source_of(file, SECRET)
    plain = {hashlib.sha256(file.read_bytes()).hexdigest(), hashlib.sha256(b"content" + file.read_bytes()).hexdigest()}
    assert {found.content, found.place}.isdisjoint(plain)
    other = source_of(file, bytes(32))
    assert found.content != other.content
    assert found.place != other.place


def test_a_copy_has_the_content_and_a_link_the_place_too(file: Path) -> None:
    original = source_of(file, SECRET)
    copy, hard, soft = (file.with_name(name) for name in ("copy.csv", "hard.csv", "soft.csv"))
    copy.write_bytes(file.read_bytes())
    hard.hardlink_to(file)
    soft.symlink_to(file)
    assert source_of(copy, SECRET).content == original.content
    assert source_of(copy, SECRET).place != original.place
    assert source_of(hard, SECRET) == source_of(soft, SECRET) == original


def test_an_edit_in_place_keeps_the_place(file: Path) -> None:
    original = source_of(file, SECRET)
    with file.open("ab") as stream:
        stream.write(b"b,0\n")
    assert source_of(file, SECRET).place == original.place
    assert source_of(file, SECRET).content != original.content


def test_bytes_have_the_digest_of_a_file_with_them_and_no_place(file: Path) -> None:
    found = source_of(file.read_bytes(), SECRET)
    assert (found.content, found.place) == (source_of(file, SECRET).content, "")


@pytest.mark.parametrize("name", ["nothing.csv", "."])
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        source_of(tmp_path / name, SECRET)
