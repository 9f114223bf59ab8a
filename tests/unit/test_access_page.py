"""The page on access does what it says: its policy, its commands and its code, in order, on small real parts."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treadle.cli.app import app
from treadle.routing.bank_files import load_bank

PAGE = (Path(__file__).parents[2] / "docs" / "access.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}[^\n]*\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_the_page_works_as_it_stands(small_fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source, target in (("sums", "tumours"), ("films", "invoices")):
        folder = Path(shutil.copytree(small_fleet / source, tmp_path / "adapters" / target))
        content = json.loads((folder / "treadle.json").read_text()) | {"name": target}
        (folder / "treadle.json").write_text(json.dumps(content))
    shutil.copytree(small_fleet / "family", tmp_path / "family")
    shutil.copytree(small_fleet / "base", tmp_path / "base")
    Path("policy.toml").write_text(block("toml"))
    shown: dict[str, str] = {}
    for line in re.findall(r"^    treadle (.*)$", PAGE, flags=re.MULTILINE):
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code == 0, f"{line}\n{result.stderr}"
        shown[line] = result.stdout
    permitted = next(text for line, text in shown.items() if line.startswith("bank permitted"))
    assert "clerks use what is cleared for their data" in permitted
    assert load_bank(Path("bank")).labels["invoices"] == {"dept=billing"}  # rolled back
    names: dict[str, object] = {}
    exec(compile(block("python"), "docs/access.md", "exec"), names)
    answer = names["answer"]
    assert callable(answer)
    assert answer("the film is good", "cy", {"dept=oncology"}).startswith("the film is good")
    logged = [json.loads(line) for line in Path("decisions.jsonl").read_text().splitlines()]
    assert [line["caller"] for line in logged] == ["bo", "cy"]
    assert (logged[0]["permitted"], logged[0]["excluded"]) == (2, 0)  # bo is a doctor too
    assert logged[1]["permitted"] == 1
    assert logged[1]["choice"] in ("tumours", None)  # the base acts alone where nothing speaks for the adapter
    assert len(logged[0]["policy"]) == 64
    everything = Path("decisions.jsonl").read_text()
    assert not any(word in everything for word in ("Total", "film", "good"))
