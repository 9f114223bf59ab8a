"""What articles report of the very training that a run repeats, from `published.toml`."""

import importlib.resources
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast


@dataclass(frozen=True)
class PublishedRow:
    """One method's figures, in per cent, a column each."""

    method: str
    values: Sequence[float]


@dataclass(frozen=True)
class Published:
    """One table of an article.

    Attributes:
        source: the article.
        model: the base that it trained.
        task: the questions.
        columns: when accuracy was measured.
        remark: how it is to be read.
        rows: by method.
    """

    source: str
    model: str
    task: str
    columns: Sequence[str]
    remark: str
    rows: Sequence[PublishedRow]


def published(name: str) -> Published:
    """The table of that name."""
    text = importlib.resources.files("treadle.reports").joinpath("published.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)[name]
    rows = [PublishedRow(str(row["method"]), cast("list[float]", row["values"])) for row in table["rows"]]
    return Published(table["source"], table["model"], table["task"], table["columns"], table["remark"], rows)
