"""What voters who read are told: templates in files, the schema of their reply, and the vote in what they reply."""

import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treadle.data.prompts import fields_of, fill
from treadle.errors import ConfigError
from treadle.evaluation.voters.voter import Poll, Vote
from treadle.toml import TomlTable, load_toml

ROLE_PLAY = "role-play"
"""The template of voters who do not name one."""

_FIELDS = ("question", "answer", "target", "systems", "names")
_SHOWN = 60
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", flags=re.DOTALL)  # a thought that was cut off has no end
_OBJECT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Wording:
    """A template: messages with the fields {question}, {answer}, {target}, {systems} (a line each) and {names}.

    Attributes:
        system: the instruction of the chat; None for a template without one.
        user: the message.
    """

    system: str | None
    user: str

    @property
    def fields(self) -> set[str]:
        """The fields that it names."""
        return {*fields_of(self.system or ""), *fields_of(self.user)}

    def messages(self, poll: Poll, index: int) -> list[dict[str, str]]:
        """The chat that asks about row `index`, as roles and contents."""
        shown = poll.questions[index]
        fields = {
            "question": shown.question,
            "answer": shown.answer or "",
            "target": poll.target or "",
            "systems": "\n".join(f"- {system.name}: {system.description}" for system in poll.systems),
            "names": ", ".join(f'"{name}"' for name in poll.names),
        }
        parts = [("system", self.system), ("user", self.user)]
        return [{"role": role, "content": fill(text, fields)} for role, text in parts if text is not None]


def wording_names() -> list[str]:
    """The names of the templates that come with treadle, sorted."""
    folder = importlib.resources.files("treadle.evaluation.voters") / "templates"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_wording(name_or_path: str, poll: Poll) -> Wording:
    """The template of that name, or in that .toml file, held against what the poll can tell.

    Raises:
        ConfigError: no such template, not TOML, a key or a field that there is not, no {question}, or a field that
            the poll leaves empty: {target} without a target, {answer} without answers.
    """
    template = _template(name_or_path)
    wording = Wording(None if template.system is None else template.system.strip(), template.user.strip())
    _check(wording, name_or_path, poll)
    return wording


class _Template(TomlTable):
    """The file."""

    summary: str = ""
    system: str | None = None
    user: str


def _template(name_or_path: str) -> _Template:
    if name_or_path in wording_names():
        folder = importlib.resources.files("treadle.evaluation.voters") / "templates"
        return load_toml(folder / f"{name_or_path}.toml", _Template)
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            "no such template", where=name_or_path, remedy=f"give a .toml file or one of {', '.join(wording_names())}"
        )
    return load_toml(path, _Template)


def _check(wording: Wording, where: str, poll: Poll) -> None:
    try:
        fields = wording.fields
    except ConfigError as error:
        raise ConfigError(error.what, where=where, remedy=error.remedy) from error
    strangers = sorted(fields - set(_FIELDS))
    if strangers:
        raise ConfigError(
            f"no field {strangers[0]!r} for templates", where=where, remedy=f"choose among {', '.join(_FIELDS)}"
        )
    if "question" not in fields:
        raise ConfigError("the template does not show the {question}", where=where, remedy="write it in")
    if "target" in fields and not poll.target:
        raise ConfigError(
            "the template plays a target model", where=where, remedy="name it with `target`, or take 'plain'"
        )
    if "answer" in fields and any(question.answer is None for question in poll.questions):
        raise ConfigError("the template shows the answer", where=where, remedy="set data.answer, or take another")


def reply_format(names: Sequence[str]) -> dict[str, object]:
    """The `response_format` of a chat completion whose content is {"system": NAME}."""
    schema = {
        "type": "object",
        "properties": {"system": {"type": "string", "enum": list(names)}},
        "required": ["system"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "vote", "strict": True, "schema": schema}}


def reply_of(name: str) -> str:
    """The reply that votes for a system."""
    return json.dumps({"system": name}, ensure_ascii=False)


def vote_in(text: str, names: Sequence[str]) -> Vote:
    """The vote in a reply, or why there is none."""
    system = system_in(text, names)
    if system is not None:
        return Vote(system)
    shown = " ".join(text.split())[:_SHOWN]
    return Vote(None, f"its reply names no system: {shown!r}" if shown else "its reply is empty")


def system_in(text: str, names: Sequence[str]) -> str | None:
    """The system that a reply votes for, None where it cannot be told.

    The first that decides: the last JSON object with a key "system"; the only name in the text; the only name in its
    last line. Case, spaces and hyphens within a name do not matter, nor what stands in <think>…</think>,
    or after a <think> without its end.
    """
    said = _THOUGHT.sub("", text)
    for candidate in reversed(_OBJECT.findall(said)):
        try:
            vote = json.loads(candidate).get("system")
        except ValueError:
            continue
        if vote is not None:
            return vote if vote in names else _only_name(str(vote), names)
    lines = [line for line in said.splitlines() if line.strip()]
    return _only_name(said, names) or (_only_name(lines[-1], names) if lines else None)


def _only_name(text: str, names: Sequence[str]) -> str | None:
    """The one name in the text; what is part of a longer name there is not the shorter one."""
    found, left = list[str](), text
    for name in sorted(names, key=len, reverse=True):
        left, count = _pattern(name).subn("\0", left)
        if count:
            found.append(name)
    return found[0] if len(found) == 1 else None


def _pattern(name: str) -> re.Pattern[str]:
    """The name as people write it: "System 1" and "system-1" for system1, but never the beginning of system10."""
    letters = r"[\s_-]*".join(re.escape(letter) for letter in name if letter not in " _-")
    return re.compile(rf"(?<!\w){letters}(?!\w)", flags=re.IGNORECASE)
