"""The TOML of `treadle classify`."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from treadle.data.prompts import fields_of
from treadle.data.voting import System, Tie, VotingRule
from treadle.evaluation.voters import VoterSettings
from treadle.files import checked_name
from treadle.toml import TomlTable

SYSTEMS = (
    System("system1", "the answer is recalled, recognised or read off at once; no intermediate step is needed"),
    System("system2", "the answer needs several steps of reasoning or calculation that build on each other"),
)
"""The two systems of the article, in our words."""


class ClassifiedData(TomlTable):
    """Which rows are labelled, and what voters who read are shown of them.

    Attributes:
        source: a file, or a name, as `treadle.data.sources.read_rows` takes it.
        question: template of what is asked, such as "{question}".
        answer: template of the reference answer; needed where a prompt template shows it.
        truth: the column of the right labels, where they are known: names of systems. Nobody votes by it; the summary
            says how often voters, labels, and panels of voters are right.
        split: of a `datasets` source.
        limit: rows at most, the first ones.
        name: what the data are called in the summary; without it the file's or data set's own name.
    """

    source: str
    question: str
    answer: str | None = None
    truth: str | None = None
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)
    name: str | None = None


class ClassifyRun(TomlTable):
    """Who labels which rows, and how votes are counted.

    Attributes:
        data: the rows.
        out: the labelled rows, a .jsonl file; the summary stands beside it as NAME.summary.json.
        voters: who votes; see `treadle.evaluation.voters`.
        systems: to choose among, in order.
        target: the name of the model that voters with a role to play are told to be.
        tie: who wins a tie; needed for an even number of voters, and for more than two systems.
        quorum: votes below which a row has no label; without it more than half of the voters.
        undecided: what becomes of a row without a label: it is left out of `out`, kept with a label of null, or the
            run fails.
        label_field: the column of the label; the votes and the agreement stand in it with _votes and _agreement added.
        cache: the folder of the answers, which may be shared by runs; without it .NAME.answers beside `out`.
        overwrite: whether a file at `out` is replaced.
    """

    data: ClassifiedData
    out: Path
    voters: tuple[Annotated[VoterSettings, Field(discriminator="kind")], ...] = Field(min_length=1)
    systems: tuple[System, ...] = SYSTEMS
    target: str | None = None
    tie: Tie | None = None
    quorum: int | None = None
    undecided: Literal["drop", "keep", "fail"] = "drop"
    label_field: str = Field(default="system", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    cache: Path | None = None
    overwrite: bool = False

    @model_validator(mode="after")
    def _sound(self) -> "ClassifyRun":
        _ = self.rule
        for name, count in Counter(voter.name for voter in self.voters).items():
            checked_name(name, where="key 'voters'")
            if count > 1:
                raise ValueError(f"two voters are called {name!r}")
        for one, other in combinations(self.voters, 2):
            if replace(one, name="") == replace(other, name=""):
                raise ValueError(f"voters {one.name!r} and {other.name!r} are one voter, who would always agree")
        for text in (self.data.question, self.data.answer or ""):
            fields_of(text)
        if self.out.suffix != ".jsonl":
            raise ValueError("out must be a .jsonl file")
        return self

    @property
    def rule(self) -> VotingRule:
        """How the votes are counted."""
        names = tuple(system.name for system in self.systems)
        return VotingRule(names, len(self.voters), self.tie, self.quorum)

    @property
    def answers(self) -> Path:
        """The folder of the answers."""
        return self.cache or self.out.parent / f".{self.out.stem}.answers"

    @property
    def summary(self) -> Path:
        """The summary's file."""
        return self.out.with_suffix(".summary.json")
