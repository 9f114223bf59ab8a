"""The commands of docs/ranks.md do what the page says, on a small base; and a private plan takes the ε of a fleet."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from treadle.cli.app import main
from treadle.family.adapter import Adapter, Provenance
from treadle.family.family import AdapterFamily
from treadle.family.plan import RankPlan
from treadle.recipes.bank import AdapterPath, build_bank
from treadle.recipes.inspect import inspect
from treadle.routing.bank_files import load_bank

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ranks.md"


@pytest.fixture
def place(
    tmp_path: Path, make: SimpleNamespace, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with the small base and the page's run, which is where we are."""
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make.llama(width=32, layers=2, seed=3).save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")
    (toml,) = re.findall(r'```toml title="plan.toml"\n(.*?)```', PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert 'base = "smollm2-135m"' in toml
    Path("plan.toml").write_text(toml.replace("smollm2-135m", "base"), encoding="utf-8")
    return tmp_path


def treadle(line: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(line)[1:])
    assert stopped.value.code in (0, None), line


def grown(folder: str, name: str) -> Adapter:
    """A member of the family in `folder`, as private training leaves it."""
    family = AdapterFamily.load(Path(folder))
    torch.manual_seed(1)
    lora_B = {module: torch.randn(row.out_features, row.rank) for module, row in family.plan.modules.items()}
    provenance = Provenance("dp-sgd", name, 3.0, 1e-5)
    return Adapter.of_family(family, name, lora_B, provenance=provenance, task_type="CAUSAL_LM")


def test_the_commands_of_the_page_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    treadle ")]
    assert len(lines) == 5
    run, *again, resized = lines
    treadle(run)
    page = (place / "plan.html").read_text(encoding="utf-8")
    assert all(f"Ranks by {peer}" in page for peer in ("uniform", "floor", "eva"))
    made = RankPlan.load(place / "plan" / "plan.json")
    assert not list(place.glob(".*.probe"))
    for line in again:
        treadle(line)
    smaller = RankPlan.load(place / "plan-2" / "plan.json")
    assert {row.rank % 2 for row in smaller.modules.values()} == {0}
    assert smaller.count().total < made.count().total
    assert RankPlan.load(place / "plan-shuffled" / "plan.json").provenance["control"] == "shuffled"
    (place / "family.toml").write_text('base = "base"\nplan = "plan/plan.json"\nout = "family"\n')
    treadle("treadle family new family.toml")
    grown("family", "mood").save(place / "adapters" / "mood")
    capsys.readouterr()
    treadle(resized)
    assert "relative error" in capsys.readouterr().out
    assert AdapterFamily.load(place / "resized" / "family").plan == smaller


def test_a_private_plan_takes_the_epsilon_of_its_family_adapter_and_bank(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "the rank plan was probed on private text"
    (place / "ward.txt").write_text("the question is not who but why " * 60)
    toml = (place / "plan.toml").read_text()
    (place / "plan.toml").write_text(
        re.sub(r"compare = .*", "", toml).replace('source = "pydoc"', 'source = "ward.txt"\npublic = false')
    )
    (place / "family.toml").write_text('base = "base"\nplan = "plan/plan.json"\nout = "family"\n')
    treadle("treadle plan plan.toml --html plan.html")
    assert reason in capsys.readouterr().err
    assert reason in (place / "plan.html").read_text(encoding="utf-8")
    treadle("treadle family new family.toml")
    grown("family", "mood").save(place / "mood")
    stored = Adapter.load(place / "mood").provenance
    assert (stored.epsilon, stored.delta) == (None, None)
    assert stored.settings["epsilon_of_training_alone"] == 3.0
    assert inspect(place / "mood").facts["ε"] == f"none ({reason})"
    assert f"none ({reason})" in inspect(place / "family").facts.values()
    build_bank(place / "bank", place / "family", [AdapterPath(place / "mood")], source=None)
    privacy = inspect(place / "bank").privacy
    assert privacy is not None
    assert privacy.statement == f"none ({reason})"
    assert load_bank(place / "bank").adapters[0].provenance.epsilon is None
    for file in (*(place / "plan").iterdir(), place / "plan.html", *(place / "family").glob("*.json")):
        assert b"ward" not in file.read_bytes()
    # the same training on a public plan keeps its ε
    (place / "plan.toml").write_text(toml.replace('out = "plan"', 'out = "open"'))
    treadle("treadle plan plan.toml")
    (place / "family.toml").write_text('base = "base"\nplan = "open/plan.json"\nout = "open-family"\n')
    treadle("treadle family new family.toml")
    assert grown("open-family", "mood").provenance.epsilon == 3.0
