"""The one file that says who may use which adapter."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from treadle.errors import ConfigError, InputError
from treadle.routing.policy import Policy, Rule
from treadle.toml import TomlTable, load_toml

_Text = Annotated[str, Field(min_length=1)]


class PolicyFile(TomlTable):
    """A policy as TOML: the fields of `treadle.routing.policy.Policy`, a table `[[rules]]` for each of its rules.

    Attributes:
        labels: key → the values that it may have.
        roles: role → its callers.
        rules: in any order.
        required: keys under which the data of every request carry a label.
        unknown_caller: what a caller without a role gets, "base" or "error".
    """

    labels: dict[_Text, tuple[_Text, ...]] = Field(default_factory=dict)
    roles: dict[_Text, tuple[_Text, ...]]
    rules: tuple[Rule, ...]
    required: tuple[_Text, ...] = ()
    unknown_caller: Literal["base", "error"] = "base"


def load_policy(path: Path) -> Policy:
    """The policy in the TOML file `path`.

    Raises:
        ConfigError: no such file, not TOML, a wrong key or value, or a rule that uses what is not declared.
    """
    found = load_toml(path, PolicyFile)
    try:
        return Policy(found.labels, found.roles, found.rules, found.required, found.unknown_caller)
    except InputError as error:
        raise ConfigError(f"{error.where}: {error.what}", where=path, remedy=error.remedy) from error
