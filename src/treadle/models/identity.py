"""Which weights a base model has, as one digest.

The definition. A checkpoint is a set of named tensors. Each gives one line of canonical JSON,
`[name, dtype, shape, digest]`, where `dtype` is the safetensors name ("F32"), and `digest` the SHA-256 of its
little-endian, row-major bytes. The identity is the SHA-256 of those lines, sorted by name, each ended by a line feed.
A tied weight counts once: where the configuration says `tie_word_embeddings`, matrices with `vocab_size` rows and
equal dtype, shape and bytes count under the last of their names alone. That is the embedding, the name under which
savers keep a tied matrix (`model.embed_tokens.weight` comes after `lm_head.weight`), so a checkpoint that stores it
once and one that stores it twice have one identity. Files, their order, their split into shards and their metadata
do not count.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from treadle.errors import FormatError, InputError, TreadleError, UnsupportedError
from treadle.files import checked_name, read_json, write_json
from treadle.models.cache import cache_folder

_CHUNK = 1 << 22


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model an adapter or a family belongs to. Two are equal when the weights are, whatever the name.

    Attributes:
        name: What the user called it; a label.
        sha256: The identity of the stored checkpoint, 64 hex digits.

    Raises:
        FormatError: `sha256` is not a SHA-256.
    """

    name: str = field(compare=False)
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise FormatError(f"{self.sha256!r} is not a SHA-256", where=self.name, remedy="identify the base again")


class _Entry(NamedTuple):
    """One tensor as the identity sees it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


class StoredTensor(NamedTuple):
    """Where one tensor lies in a safetensors file: bytes `begin` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def identify_folder(folder: Path, name: str) -> BaseIdentity:
    """The identity of the checkpoint in `folder`, labelled `name`, reading a few megabytes at a time.

    It is remembered in the cache folder under the resolved path, sizes and modification times (ns) of the files, so
    a second call costs no reading.

    Raises:
        InputError: `folder` holds no checkpoint.
        UnsupportedError: the checkpoint is a pickle.
        FormatError: a file is truncated or damaged.
    """
    files = checkpoint_files(folder)
    stamps = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps(["identity-1", stamps]).encode()).hexdigest()
    remembered = cache_folder() / "identities" / f"{key}.json"
    digest = _recall(remembered)
    if digest is None:
        digest = _digest_folder(folder)
        # A cache that cannot be written costs time, not correctness.
        with contextlib.suppress(OSError, TreadleError):
            write_json(remembered, {"sha256": digest, "folder": str(folder.resolve())})
    return BaseIdentity(name, digest)


def _digest(entries: Iterable[_Entry], tied_rows: int) -> str:
    kept: dict[object, _Entry] = {}
    for entry in sorted(entries):
        tied = bool(tied_rows) and len(entry.shape) == 2 and entry.shape[0] == tied_rows
        kept[entry[1:] if tied else entry.name] = entry  # a later name of a tied matrix replaces an earlier one
    lines = sorted(kept.values())
    return hashlib.sha256("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode()).hexdigest()


def _digest_folder(folder: Path) -> str:
    tensors = stored_tensors(folder)
    entries = (_Entry(name, t.dtype, t.shape, _digest_range(t)) for name, t in tensors.items())
    return _digest(entries, tied_rows(folder))


def tied_rows(folder: Path) -> int:
    """The vocabulary's size where config.json ties the word embedding to the output head, else 0."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    rows = inner.get("vocab_size")
    return rows if inner.get("tie_word_embeddings", config.get("tie_word_embeddings")) and isinstance(rows, int) else 0


def _digest_range(tensor: StoredTensor) -> str:
    digest, left = hashlib.sha256(), tensor.end - tensor.begin
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        while left:
            chunk = stream.read(min(_CHUNK, left))
            if not chunk:
                raise _truncated(tensor.file)
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _recall(file: Path) -> str | None:
    try:
        digest = read_json(file).get("sha256")
    except (OSError, TreadleError):
        return None
    return digest if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else None


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that decide the checkpoint's identity: configuration, safetensors, and their index if they are split.

    Raises:
        InputError: there is no checkpoint.
        UnsupportedError: it is a pickle.
        FormatError: the index names a file that is missing.
    """
    config, whole, index = (folder / n for n in ("config.json", "model.safetensors", "model.safetensors.index.json"))
    if not config.is_file():
        raise InputError("no config.json: not a model folder", where=folder, remedy="name the folder of a base model")
    if whole.is_file():
        return [config, whole]
    if not index.is_file():
        raise _without_checkpoint(folder)
    shards = [folder / shard for shard in sorted(set(_weight_map(index).values()))]
    for shard in shards:
        if not shard.is_file():
            raise FormatError(f"{shard.name} is missing", where=folder, remedy="download the model again")
    return [config, index, *shards]


def _without_checkpoint(folder: Path) -> TreadleError:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        return UnsupportedError(
            f"{pickles[0]} is a pickle, which can run code when opened",
            where=folder,
            remedy="convert the model to safetensors",
        )
    return InputError("no model.safetensors", where=folder, remedy="name a folder with a safetensors checkpoint")


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content or not all(isinstance(shard, str) for shard in content.values()):
        raise FormatError("no weight_map", where=index, remedy="download the model again")
    # The hub's own cache links its shards from elsewhere, so the name is checked and not where it leads.
    return {str(name): checked_name(str(shard), where=index) for name, shard in content.items()}


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder` by name, from the files' headers alone.

    Raises:
        InputError: there is no checkpoint.
        UnsupportedError: it is a pickle.
        FormatError: a file is truncated, damaged, or lacks a tensor that the index promises.
    """
    if len(checkpoint_files(folder)) == 2:
        return _read_header(folder / "model.safetensors")
    weights = _weight_map(folder / "model.safetensors.index.json")
    headers = {shard: _read_header(folder / shard) for shard in set(weights.values())}
    for name, shard in weights.items():
        if name not in headers[shard]:
            raise FormatError(f"{shard} lacks {name}", where=folder, remedy="download the model again")
    return {name: headers[shard][name] for name, shard in weights.items()}


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The safetensors header: eight bytes of length, that much JSON, then the tensors' bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise _truncated(file)
        try:
            header: dict[str, dict[str, object]] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored(file, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError("not a safetensors file", where=file, remedy="download the model again") from error
    if max((tensor.end for tensor in tensors.values()), default=8 + length) != size:
        raise _truncated(file)
    return tensors


def _stored(file: Path, entry: Mapping[str, object], start: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError("not a header entry")
    sizes = [int(size) for size in shape]
    begin, end = (int(offset) for offset in offsets)
    if not 0 <= begin <= end or min(sizes, default=0) < 0:
        raise ValueError("offsets run backwards")
    return StoredTensor(file, dtype, tuple(sizes), start + begin, start + end)


def _truncated(file: Path) -> FormatError:
    return FormatError("truncated, or with bytes that belong to no tensor", where=file, remedy="download it again")
