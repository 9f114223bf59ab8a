"""Folders in, folders out: a resized family holds its adapters, which stock PEFT opens, and whose loss is said."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from treadle.cli.app import main
from treadle.errors import InputError, MismatchError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.plan import RankPlan
from treadle.models.loading import load_model
from treadle.recipes.resize import resize

# peft 0.21 asks transformers 5.23 in the old way; that is between the two of them.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def plan_at(small_fleet: Path, path: Path, change: int) -> Path:
    """A plan of the fleet's modules with ranks that differ from its 4 by `change`, up to the layer's side."""
    plan = AdapterFamily.load(small_fleet / "family").plan
    shapes = {name: row.shape for name, row in plan.modules.items()}
    RankPlan.of_ranks(shapes, dict.fromkeys(shapes, 4 + change)).save(path)
    return path


def test_a_grown_adapter_answers_as_before(small_fleet: Path, tmp_path: Path) -> None:
    adapters = [small_fleet / "sums", small_fleet / "films"]
    made = resize(
        small_fleet / "family",
        plan_at(small_fleet, tmp_path / "plan.json", 3),
        out=tmp_path / "grown",
        adapters=adapters,
    )
    assert sorted(path.name for path in made.folder.iterdir()) == ["family", "films", "sums"]
    assert [row.error for row in made.adapters] == [0.0, 0.0]
    family = AdapterFamily.load(made.folder / "family")
    assert Adapter.load(made.folder / "sums", family=family).provenance.epsilon == 3.0
    tokens = torch.tensor([[1, 5, 9, 33, 7, 2]])
    answers = []
    for folder in (small_fleet, made.folder):
        model = PeftModel.from_pretrained(load_model(str(small_fleet / "base"), device="cpu"), folder / "sums").eval()
        with torch.no_grad():
            answers.append(model(input_ids=tokens).logits)
    torch.testing.assert_close(*answers, rtol=0, atol=1e-6)  # PEFT's matmuls add the zeros in another order


def test_a_shrunk_adapter_says_what_it_lost(
    small_fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_at(small_fleet, tmp_path / "plan.json", -2)
    told = {}
    for name, options in (("within", []), ("alone", ["--alone"])):
        line = ["family", "resize", str(small_fleet / "family"), str(plan), "--out", str(tmp_path / name)]
        with pytest.raises(SystemExit) as stopped:
            main([*line, "--adapter", str(small_fleet / "sums"), *options, "--json"])
        assert stopped.value.code == 0
        told[name] = json.loads(capsys.readouterr().out)["adapters"][0]
    assert told["alone"]["family"] is None
    assert told["alone"]["error"] == told["alone"]["least_error"] == told["within"]["least_error"]
    assert 0.1 < told["alone"]["error"] < told["within"]["error"] < 1
    assert len(told["within"]["modules"]) == 6
    with pytest.raises(SystemExit):
        main([*line[:-1], str(tmp_path / "table"), "--adapter", str(small_fleet / "sums")])
    assert f"relative error {told['within']['error']:.3g}" in capsys.readouterr().out


def test_nothing_is_left_of_what_cannot_be_done(small_fleet: Path, tmp_path: Path) -> None:
    plan = plan_at(small_fleet, tmp_path / "plan.json", 1)
    family = small_fleet / "family"
    with pytest.raises(InputError, match="already exists"):
        resize(family, plan, out=small_fleet)
    with pytest.raises(InputError, match="the name 'sums' is taken"):
        resize(family, plan, out=tmp_path / "out", adapters=[small_fleet / "sums"] * 2)
    content = json.loads(plan.read_text()) | {"provenance": {"base": "other", "base_sha256": "1" * 64}}
    plan.write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="made for 'other'"):
        resize(family, plan, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
