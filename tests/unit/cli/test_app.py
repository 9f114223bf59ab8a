"""The command line's promises: one line an error, the right exit code, help with an example, nothing heavy for help."""

import json
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from treadle import __version__
from treadle.cli.app import ORDER, app, main
from treadle.errors import ConfigError, InputError, TreadleError, UnavailableError

runner = CliRunner()


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path, command


COMMANDS = dict(leaves(typer.main.get_command(app)))


def test_the_commands_are_those_of_the_design() -> None:
    assert {" ".join(path) for path in COMMANDS} == {
        "models list",
        "models fetch",
        "models path",
        "models with-head",
        "plan",
        "family new",
        "family resize",
        "classify",
        "train",
        "audit",
        "federate run",
        "federate resume",
        "federate watch",
        "federate serve",
        "federate admit",
        "federate silo",
        "federate pilot",
        "federate probe",
        "ledger new",
        "ledger show",
        "ledger verify",
        "ledger allow",
        "ledger forget",
        "inspect",
        "bank build",
        "bank add",
        "bank remove",
        "bank list",
        "bank calibrate",
        "bank measure",
        "bank rollback",
        "bank versions",
        "bank permitted",
        "bank drift",
        "bank traffic",
        "bank label",
        "bank merge",
        "bank update",
        "route",
        "eval",
        "demo",
        "bench",
    }


@pytest.mark.parametrize("path", sorted(COMMANDS), ids=" ".join)
def test_every_command_has_help_with_an_example_and_json(path: tuple[str, ...]) -> None:
    result = runner.invoke(app, [*path, "--help"])
    assert result.exit_code == 0
    assert f"Example: treadle {' '.join(path)}" in result.stdout
    assert "--json" in result.stdout
    assert "\\[" not in result.stdout  # markup that nobody rendered
    arguments = result.stdout.partition("Arguments:\n")[2].partition("\n\n")[0]
    for line in arguments.splitlines():
        name, _, text = line.strip().partition("  ")
        assert text.strip().replace("[required]", "") or line.startswith("   "), f"nothing is said of {name}"


def test_every_listed_command_is_there() -> None:
    result = runner.invoke(app, ["--help"])
    listed = [line.split()[0] for line in result.stdout.partition("Commands:")[2].splitlines() if line.strip()]
    assert listed == list(ORDER)
    assert set(listed) == {path[0] for path in COMMANDS}


@pytest.mark.parametrize("path", [(), ("bank",)], ids=" ".join)
def test_nothing_given_shows_the_help_alone(path: tuple[str, ...]) -> None:
    result = runner.invoke(app, list(path), prog_name="treadle")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Usage: {' '.join(['treadle', *path])} [OPTIONS]")
    assert "; see" not in result.stderr


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).stdout == f"treadle {__version__}\n"


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("treadle.recipes.models.list_models", fail)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("is wrong", where="file", remedy="mend it"), 2, "treadle: file: is wrong; mend it"),
        (ConfigError("key 'a'", where="run.toml"), 2, "treadle: run.toml: key 'a'"),
        (UnavailableError("no network"), 1, "treadle: no network"),
        (TreadleError("the loss is nan"), 1, "treadle: the loss is nan"),
        (KeyboardInterrupt(), 130, "treadle: interrupted; what was saved before is whole"),
        (ValueError("two\nlines"), 1, "treadle: ValueError: two lines; treadle --debug … shows where"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    failing(error, monkeypatch)
    result = runner.invoke(app, ["models", "list"])
    assert result.exit_code == code
    assert result.stderr == f"{line}\n"
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["--debug", "models", "list"], ["models", "list", "--debug"]])
def test_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    failing(InputError("is wrong"), monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("treadle: is wrong\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "No such command 'nosuch'"),
        (["models", "nosuch"], "No such command 'nosuch'"),
        (["route"], "Missing argument"),
        (["route", "bank", "text", "--granularity", "word"], "Invalid value for '--granularity'"),
        (["inspect", "folder", "--bogus"], "No such option '--bogus'"),
        (["demo", "--prompts", "many"], "Invalid value for '--prompts'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_2(arguments: list[str], said: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("treadle: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_needs_nothing_heavy() -> None:
    script = (
        "import sys, json\nfrom treadle.cli.app import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(run.stdout.splitlines()[-1]))
    assert loaded & {"torch", "transformers", "peft", "numpy", "datasets", "pydantic", "jinja2"} == set()
