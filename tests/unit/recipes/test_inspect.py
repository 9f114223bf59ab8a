"""Inspection: norms by definition, what is verified and what is not, what a fleet has spent."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from treadle.errors import InputError, MismatchError
from treadle.family.adapter import Adapter
from treadle.recipes.bank import AdapterPath, build_bank
from treadle.recipes.inspect import inspect
from treadle.routing.bank_files import load_bank


def test_norms_of_an_adapter_are_those_of_its_update(small_fleet: Path) -> None:
    found = inspect(small_fleet / "sums")
    adapter, stored = Adapter.load(small_fleet / "sums"), load_file(small_fleet / "base" / "model.safetensors")
    assert found.kind == "adapter"
    assert {row.module for row in found.modules} == set(adapter.plan.modules)
    for row in found.modules:
        update = adapter.folded_B(row.module).double() @ adapter.lora_A[row.module].double()
        base = torch.linalg.matrix_norm(stored[f"{row.module}.weight"].double())
        assert row.frobenius == pytest.approx(float(torch.linalg.matrix_norm(update)))
        assert row.spectral == pytest.approx(float(torch.linalg.matrix_norm(update, 2)))
        assert row.base_frobenius == pytest.approx(float(base))
        assert row.share == pytest.approx(float(torch.linalg.matrix_norm(update) / base))
    assert found.facts["ε"] == "3 at δ = 1e-05"
    assert found.notes == ()


def test_layers_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    from treadle.family.adapter import Provenance
    from treadle.family.family import AdapterFamily
    from treadle.family.plan import LayerShape, RankPlan
    from treadle.models.identity import BaseIdentity

    plan = RankPlan.uniform({f"layers.{layer}.q_proj": LayerShape(4, 4) for layer in range(12)}, rank=1)
    family = AdapterFamily.create(base=BaseIdentity("nowhere", "0" * 64), plan=plan, seed=0)
    lora_B = {module: torch.ones(4, 1) for module in plan.modules}
    Adapter.of_family(family, "a", lora_B, provenance=Provenance("sft")).save(tmp_path / "a")
    assert [row.module for row in inspect(tmp_path / "a").modules] == list(plan.modules)


def test_a_foreign_adapter_is_unverified(small_fleet: Path) -> None:
    found = inspect(small_fleet / "foreign")
    assert "unverified base" in found.base
    assert found.facts["family"].startswith("none: foreign")
    assert found.facts["base sha256"] == "unverified base"


def test_a_family_has_ranks_and_no_update(small_fleet: Path) -> None:
    found = inspect(small_fleet / "family")
    assert found.kind == "family"
    assert {row.rank for row in found.modules} == {4}
    assert all(row.frobenius is None and row.share is None and row.base_frobenius for row in found.modules)
    assert len(found.facts["fingerprint"]) == 64


def test_a_bank_says_which_path_each_adapter_takes(built_bank: Path, small_fleet: Path) -> None:
    found = inspect(built_bank)
    assert {member.name: member.path for member in found.members} == {
        "sums": "shared A",
        "films": "shared A",
        "colours": "shared A",
        "foreign": "exact, own A",
    }
    assert found.members[-1].base == "unverified base"
    assert all(member.calibrated for member in found.members)
    for member in found.members:
        alone = {row.module: row.frobenius for row in inspect(small_fleet / member.name).modules}
        for row in member.modules:
            assert row.frobenius == pytest.approx(alone[row.module], rel=1e-5)


@pytest.mark.parametrize(
    ("names", "disjoint", "shared"), [(("sums", "films"), 3.0, 4.0), (("sums", "colours"), None, None)]
)
def test_what_a_fleet_has_spent(
    small_fleet: Path, tmp_path: Path, names: tuple[str, ...], disjoint: float | None, shared: float | None
) -> None:
    paths = [AdapterPath(small_fleet / name) for name in names]
    build_bank(tmp_path / "bank", small_fleet / "family", paths, source=None)
    privacy = inspect(tmp_path / "bank").privacy
    assert privacy is not None
    assert (privacy.epsilon_disjoint, privacy.epsilon_shared) == (disjoint, shared)
    assert privacy.statement.startswith("none (colours") == (disjoint is None)


def test_a_calibration_on_own_data_makes_it_none(small_fleet: Path, tmp_path: Path) -> None:
    from treadle.recipes.bank import OwnSource

    text = str(small_fleet / "public.txt")
    source = OwnSource({"sums": text, "films": text}, limit=4, words=10)
    paths = [AdapterPath(small_fleet / name) for name in ("sums", "films")]
    build_bank(tmp_path / "bank", small_fleet / "family", paths, source=source)
    found = inspect(tmp_path / "bank")
    assert found.privacy is not None
    assert found.privacy.reason == "the calibration read the adapters' own data"
    assert found.facts["calibration text"] == "the adapters' own data"


def test_a_base_that_is_not_here_is_a_note_and_a_wrong_one_an_error(small_fleet: Path, tmp_path: Path) -> None:
    from treadle.family.family import AdapterFamily
    from treadle.models.identity import BaseIdentity

    family = AdapterFamily.load(small_fleet / "family")
    absent = BaseIdentity("nowhere-at-all", "0" * 64)
    AdapterFamily.create(base=absent, plan=family.plan, seed=1).save(tmp_path / "orphan")
    found = inspect(tmp_path / "orphan")
    assert any("not on this machine" in note for note in found.notes)
    with pytest.raises(MismatchError, match="name the right base"):
        inspect(tmp_path / "orphan", base=str(small_fleet / "base"))


def test_what_is_none_of_the_three_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        inspect(tmp_path / "missing")
    with pytest.raises(InputError, match="neither an adapter, a family nor a bank"):
        inspect(tmp_path)


def test_inspecting_a_bank_changes_nothing(built_bank: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in built_bank.rglob("*"))
    inspect(built_bank)
    assert load_bank(built_bank).names
    assert sorted((path.name, path.stat().st_mtime_ns) for path in built_bank.rglob("*")) == before
