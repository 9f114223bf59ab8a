"""What the documentation shows exists: its commands, its configurations, its files."""

import re
import tomllib
from pathlib import Path

import click
import pytest
import typer

from treadle.cli.app import app
from treadle.configs.audit import AuditRun
from treadle.configs.classify import ClassifyRun
from treadle.configs.evaluate import EvaluateRun
from treadle.configs.family import FamilyRun
from treadle.configs.plan import PlanRun
from treadle.configs.policy import PolicyFile
from treadle.configs.train import TrainRun
from treadle.toml import TomlTable, checked

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNS: dict[str, type[TomlTable]] = {
    "audit": AuditRun,
    "classify": ClassifyRun,
    "plan": PlanRun,
    "family": FamilyRun,
    "eval": EvaluateRun,
    "policy": PolicyFile,
}
NAMES = re.compile(r"[a-z][a-z|-]*")


def shown_commands() -> list[str]:
    """Every indented line of a page that begins with `treadle`, alternatives spelled out."""
    lines = {line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()}
    found: set[str] = set()
    for line in lines:
        if not line.startswith("    treadle "):
            continue
        words = [word for word in line.split()[1:3] if NAMES.fullmatch(word)]
        for last in words[-1].split("|"):
            found.add(" ".join([*words[:-1], last]))
    return sorted(found)


def shown_runs() -> list[tuple[str, str]]:
    """Every titled TOML block of the pages: its title and its text."""
    blocks = re.compile(r'```toml title="([a-z]+)\.toml"\n(.*?)```', flags=re.DOTALL)
    return [match for page in PAGES for match in blocks.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("line", shown_commands())
def test_every_shown_command_exists(line: str) -> None:
    command: click.Command = typer.main.get_command(app)
    for word in line.split():
        if isinstance(command, click.Group):
            assert word in command.commands, line
            command = command.commands[word]


def test_the_readme_shows_every_command() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    shown = {line.split()[0] for line in shown_commands()}
    assert set(group.commands) <= shown


@pytest.mark.parametrize(("title", "text"), shown_runs(), ids=lambda value: value[:20])
def test_every_shown_run_is_sound(title: str, text: str) -> None:
    checked(tomllib.loads(text), RUNS.get(title, TrainRun), where=title)


def test_runs_are_shown() -> None:
    assert {"audit", "classify", "plan", "family", "eval", "policy", "syllogism", "mood", "sums", "wards"} == {
        title for title, _ in shown_runs()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_what_is_there(page: Path) -> None:
    for path in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]*)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path
