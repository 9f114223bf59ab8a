"""Files that are either whole or absent: atomic writes, contained paths, digests."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from treadle.errors import FormatError, InputError, UnavailableError

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def refuse_existing(path: Path, *, overwrite: bool, kind: str = "folder") -> None:
    """Return if a run may write to `path`; asked before minutes of work, not after.

    Args:
        path: the run's `out`.
        overwrite: what the run's configuration says.
        kind: "folder" or "file".

    Raises:
        InputError: something is there, and is not to be overwritten.
    """
    if path.exists() and not overwrite:
        raise InputError("already exists", where=path, remedy=f"choose another out {kind} or set overwrite = true")


def refuse_unwritable(path: Path) -> None:
    """Return if `path` can be written as a file; asked before minutes of work, not after.

    Raises:
        InputError: it is a folder.
        UnavailableError: the disk refuses (full, read-only).
    """
    if path.is_dir():
        raise InputError("it is a folder", where=path, remedy="name a file")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: written beside it, fsynced, renamed, so that it is never half a file.

    Raises:
        UnavailableError: the disk refuses (full, read-only); `path` is as it was before.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with _writing(path), os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)  # mkstemp's 0600 would keep a team out
            os.fsync(stream.fileno())
        with _writing(path):
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A block in which what the disk refuses is one line.

    Raises:
        UnavailableError: it refuses.
    """
    try:
        yield
    except OSError as error:
        raise UnavailableError(
            f"cannot write ({error.strerror})", where=path, remedy="free space or choose another folder"
        ) from error


def write_json(path: Path, content: object) -> None:
    """Replace `path` by the canonical JSON of `content` (see `canonical_json`)."""
    write_bytes(path, canonical_json(content))


def append_line(path: Path, line: bytes) -> None:
    """Add one line to the end of `path`, in one write: lines of several processes never mix. It is not fsynced.

    Raises:
        UnavailableError: the disk refuses; what stood there stands there still.
    """
    content = line + b"\n"
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # a file may show a line that is only begun: it grows page by page
            size = os.lseek(handle, 0, os.SEEK_END)
            if size > 0 and os.pread(handle, 1, size - 1) != b"\n":  # an earlier writer ran out of space
                content = b"\n" + content
            if os.write(handle, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file of lines, with the lines' numbers; none if there is no file.

    A line that its writer did not end, because it died or the disk was full, holds no value and is passed over,
    wherever it stands: see `append_line`.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), start=1):
        try:
            yield number, json.loads(line)
        except ValueError:
            continue


def canonical_json(content: object) -> bytes:
    """The one UTF-8 rendering of `content` that treadle stores and hashes: indented, order kept, no NaN."""
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in `path`.

    Raises:
        InputError: there is no such file.
        FormatError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError("no such file", where=path, remedy="check the path") from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path, remedy="name a readable file") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid JSON ({error})", where=path, remedy="write the file again") from error
    if not isinstance(content, dict):
        raise FormatError("expected a JSON object", where=path, remedy="write the file again")
    return content


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends, and vanishes if it raises.

    Raises:
        InputError: `path` exists and `overwrite` is false.
        UnavailableError: the disk refuses; what stood at `path` stands there still.
    """
    if path.exists() and not overwrite:
        raise InputError("already exists", where=path, remedy="choose another name or pass overwrite")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        with _writing(path):
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)
                    sync_file(file)
            _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, path: Path) -> None:
    """Put `temporary` at `path`; what stood there is at `temporary` then, and stays where it was if anything fails."""
    if not path.exists():
        os.rename(temporary, path)
        sync_folder(path.parent)
        return
    _exchange(temporary, path)
    try:
        sync_folder(path.parent)
    except BaseException:
        _exchange(temporary, path)
        raise


def _exchange(first: Path, second: Path) -> None:
    """Let two folders change places: in one step where Linux can, else in three renames."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        if renameat2(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
            return
    except (OSError, AttributeError):  # another system, or an older library
        pass
    aside = Path(tempfile.mkdtemp(dir=first.parent, prefix=f".{second.name}.", suffix=".old")) / second.name
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        aside.parent.rmdir()
        raise
    os.rename(aside, first)
    aside.parent.rmdir()


@contextlib.contextmanager
def locked(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """A block that one process at a time is in, by the lock file `file`; `waiting` is called if another is there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sync_file(path: Path) -> None:
    """Flush the file's bytes to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Flush the folder's entries to the disk, where the platform can."""
    if os.name == "nt":  # Windows has no folder handles to flush
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The file's SHA-256, as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checked_name(name: str, *, where: object = None) -> str:
    """`name` itself, if it may be a file's name: letters, digits, `.`, `_`, `-`, at most 64, no leading dot.

    Raises:
        InputError: it may not, so no name ever climbs out of the folder it is joined to.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be a name",
            where=where,
            remedy="use 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit",
        )
    return name


def contained(root: Path, relative: str) -> Path:
    """`root / relative`, resolved.

    Raises:
        FormatError: the path is absolute or leaves `root` by `..` or a link.
    """
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise FormatError(f"{relative!r} leaves the folder", where=root, remedy="do not use this folder: rebuild it")
    return path
