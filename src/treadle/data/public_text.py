"""Public text for probing and calibration: prose that has nothing to do with the tasks, and a check that it has not."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from treadle.data.sources import read_rows
from treadle.errors import FormatError, InputError

GRAM = 8
"""How many words in a row count as copied."""

FORMS = (
    "{}",
    "Text: {}\nAnswer:",
    "Question: {}\nAnswer:",
    "{}\n\nSummary:",
    "Input: {}\nOutput:",
    "Read the following and respond.\n\n{}\n\nResponse:",
    "Instruction: rewrite this.\n{}\nResult:",
    "Q: {}\nA:",
    "Below is a passage.\n{}\nWhat is it about?",
    "Document: {}\nLabel:",
    "User: {}\nAssistant:",
    "Classify: {} =>",
)
"""What requests look like around their content, whatever they ask for; no task's own wording."""

_MARKUP = re.compile(r"[*=\-~^\"']{3,}")


@dataclass(frozen=True)
class PublicText:
    """Passages, in order, with where they come from and the SHA-256 of their JSON: what provenance records."""

    passages: tuple[str, ...]
    source: str
    sha256: str


def public_texts(
    source: str = "pydoc", *, limit: int = 200, words: int = 60, seed: int = 0, field: str = "text"
) -> PublicText:
    """`limit` passages of at most `words` words each (fewer passages if the source has no more), a function of `seed`.

    `pydoc` is the prose of CPython's own language reference, which every machine has; its words, and so the digest,
    change with Python's minor version. Else a .txt file, cut into passages paragraph by paragraph, or a source of
    `read_rows`, one passage a row, from `field`. A passage is whole words, at least half of `words` in a cut text.

    Raises:
        InputError: `limit` or `words` below 1, no such source, a row without `field`.
        FormatError: a source without one passage of text.
    """
    if limit < 1 or words < 1:
        raise InputError(f"limit {limit}, words {words}", where=source, remedy="ask for one or more of each")
    if source == "pydoc":
        found = _cut(_pydoc_texts(), words)
    elif Path(source).suffix == ".txt":
        found = _cut([_read(Path(source))], words)
    else:
        found = (" ".join(text.split()[:words]) for text in field_texts(source, field))
    passages = sorted(
        {text for text in found if text}, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest()
    )
    if not passages:
        raise FormatError(
            "holds no passage of text", where=source, remedy="give a longer text or fewer words a passage"
        )
    chosen = tuple(passages[:limit])
    return PublicText(chosen, source, hashlib.sha256(json.dumps(chosen).encode()).hexdigest())


def as_prompts(passages: Iterable[str], *, words: int = 20) -> tuple[str, ...]:
    """The passages as requests to a language model: pieces of `words` words, around which `FORMS` take turns.

    What the scores of prompts are measured against should look like prompts: a frame alone moves norms.
    """
    pieces = [piece for passage in passages for piece in tuple(_cut([passage], words)) or (passage,)]
    return tuple(FORMS[place % len(FORMS)].replace("{}", piece) for place, piece in enumerate(pieces))


def overlap(public: Iterable[str], examples: Iterable[str]) -> float:
    """The share of the examples' distinct runs of 8 words that occur in the public text: 0 to 1, 0 if they have none.

    Words are compared without case and punctuation; a shorter example counts as one run.
    """
    ours = set(itertools.chain.from_iterable(map(_grams, examples)))
    theirs = set(itertools.chain.from_iterable(map(_grams, public)))
    return len(ours & theirs) / len(ours) if ours else 0.0


def _grams(text: str) -> Iterator[tuple[str, ...]]:
    found = re.findall(r"\w+", text.casefold())
    for start in range(max(1, len(found) - GRAM + 1)):
        if run := tuple(found[start : start + GRAM]):
            yield run


def _pydoc_texts() -> Iterator[str]:
    """The prose of each topic: paragraphs that are no headings, grammar, code or lists."""
    for name in sorted(topics):
        paragraphs = topics[name].split("\n\n")
        yield " ".join(text for text in paragraphs if text[:1].isalpha() and not _MARKUP.search(text))


def _cut(texts: Iterable[str], words: int) -> Iterator[str]:
    for text in texts:
        found = text.split()
        for start in range(0, len(found), words):
            passage = found[start : start + words]
            if 2 * len(passage) >= words:
                yield " ".join(passage)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError("no such file", where=path, remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise FormatError("not UTF-8", where=path, remedy="convert the file to UTF-8") from error


def field_texts(source: str, field: str) -> Iterator[str]:
    """The text in this field of every row of a source of `read_rows`.

    Raises:
        InputError: no such source, or a row without the field.
    """
    for number, row in enumerate(read_rows(source), start=1):
        text = row.get(field)
        if not isinstance(text, str):
            there = ", ".join(sorted(row))
            raise InputError(
                f"no text in field {field!r}; the fields are: {there}",
                where=f"{source}, row {number}",
                remedy="name one",
            )
        yield text
