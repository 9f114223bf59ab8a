"""An adapter belongs to one family and base, is stored whole, and is refused if anything about it is not so."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treadle.errors import FormatError, InputError, MismatchError, UnavailableError
from treadle.family.adapter import METADATA, Adapter, Provenance, package_versions, provenance_of
from treadle.family.family import AdapterFamily
from treadle.family.peft_format import WEIGHTS
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity

SHAPES = {"z.first": LayerShape(6, 4), "a.second": LayerShape(8, 8)}


def family(seed: int = 0, base: str = "a") -> AdapterFamily:
    plan = RankPlan.of_ranks(SHAPES, {"z.first": 2, "a.second": 3}, scaling=2.0)
    return AdapterFamily.create(base=BaseIdentity("tiny", base * 64), plan=plan, seed=seed)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"z.first": torch.randn(4, 2), "a.second": torch.randn(8, 3)}


def adapter(of: AdapterFamily | None = None, name: str = "one") -> Adapter:
    provenance = Provenance("sft", data="signs", seeds={"train": 3}, settings={"lr": 0.1}, versions=package_versions())
    return Adapter.of_family(of or family(), name, tensors(), provenance=provenance, task_type="CAUSAL_LM")


def test_folding_multiplies_b_by_alpha_over_r() -> None:
    made = adapter()
    assert torch.equal(made.folded_B("z.first"), 2 * tensors()["z.first"])
    assert list(made.folded()) == list(made.lora_B) == ["z.first", "a.second"]
    assert made.shapes() == SHAPES


def test_a_saved_adapter_comes_back(tmp_path: Path) -> None:
    made = adapter()
    made.save(tmp_path / "one")
    loaded = Adapter.load(tmp_path / "one", family=family())
    assert (loaded.name, loaded.family, loaded.base) == ("one", family().fingerprint, family().base)
    assert (loaded.provenance, loaded.plan, loaded.task_type) == (made.provenance, made.plan, "CAUSAL_LM")
    assert list(loaded.lora_B) == list(made.lora_B)
    assert all(torch.equal(B, loaded.lora_B[name]) for name, B in made.lora_B.items())
    assert Adapter.load(tmp_path / "one").family == family().fingerprint
    assert Adapter.load(tmp_path / "one", name="two").name == "two"


def test_a_config_that_was_edited_is_no_members(tmp_path: Path) -> None:
    adapter().save(tmp_path / "one")
    path = tmp_path / "one" / "adapter_config.json"
    config = json.loads(path.read_bytes())
    config["lora_alpha"] *= 2
    config["alpha_pattern"] = {name: 2 * alpha for name, alpha in config["alpha_pattern"].items()}
    path.write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="one: its adapter_config.json has other modules, ranks or alphas"):
        Adapter.load(tmp_path / "one", family=family())


def test_without_treadles_file_it_is_foreign_and_named_by_its_folder(tmp_path: Path) -> None:
    adapter().save(tmp_path / "one")
    (tmp_path / "one" / METADATA).unlink()
    for loaded in (Adapter.load(tmp_path / "one"), Adapter.load(tmp_path / "one", family=family())):
        assert (loaded.name, loaded.family, loaded.base) == ("one", None, None)
        assert loaded.provenance.method == "foreign"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z.first": torch.zeros(4, 3)}, MismatchError, r"'z\.first' has lora_B \(4, 3\), the family \(4, 2\)"),
        ({"z.first": torch.full((4, 2), float("nan"))}, FormatError, r"'z\.first' holds NaN or Inf"),
        ({"z.first": torch.full((4, 2), float("-inf"))}, FormatError, r"'z\.first' holds NaN or Inf"),
        ({"third": torch.zeros(4, 2)}, MismatchError, "its modules are not the family's"),
    ],
)
def test_a_b_that_does_not_fit_is_refused(
    change: dict[str, torch.Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"one: {message}"):
        Adapter.of_family(family(), "one", tensors() | change, provenance=Provenance("sft"))


def test_a_name_that_climbs_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be a name"):
        adapter(name="../one")


def test_another_family_base_or_a_is_refused(tmp_path: Path) -> None:
    adapter().save(tmp_path / "one")
    with pytest.raises(MismatchError, match="one: belongs to family .*, not to .*; train it in this family"):
        Adapter.load(tmp_path / "one", family=family(seed=1))
    with pytest.raises(MismatchError, match=r"trained on base 'tiny' \(aaaaaaaaaaaa\), the family's is 'tiny' \(bbbb"):
        Adapter.load(tmp_path / "one", family=family(base="b"))
    stored = load_file(tmp_path / "one" / WEIGHTS)
    key = "base_model.model.z.first.lora_A.weight"
    stored[key][0, 0] = torch.nextafter(stored[key][0, 0], torch.tensor(9.0))
    save_file(stored, tmp_path / "one" / WEIGHTS)
    with pytest.raises(FormatError, match=r"the weights are not those that treadle\.json describes"):
        Adapter.load(tmp_path / "one")
    description = json.loads((tmp_path / "one" / METADATA).read_text())
    from treadle.files import sha256_of

    description["weights_sha256"] = sha256_of(tmp_path / "one" / WEIGHTS)
    (tmp_path / "one" / METADATA).write_text(json.dumps(description))
    with pytest.raises(MismatchError, match=r"its lora_A of 'z\.first' is not the family's"):
        Adapter.load(tmp_path / "one", family=family())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "key 'format' is not 'treadle.adapter/1'"),
        ({"base": {"name": "x"}}, "key 'base' lacks 'name' or 'sha256'"),
        ({"base": {"name": "x", "sha256": "y"}}, "is not a SHA-256"),
        ({"name": "../x"}, "cannot be a name"),
        ({"provenance": None}, "key 'provenance.method' is unknown, missing or of a wrong type"),
        ({"provenance": {"method": "sft", "noise": 1}}, "key 'provenance.noise' is unknown"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    adapter().save(tmp_path / "one")
    path = tmp_path / "one" / METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        Adapter.load(tmp_path / "one")


def test_no_privacy_is_called_none_and_a_budget_is_kept(tmp_path: Path) -> None:
    adapter().save(tmp_path / "one")
    stored = json.loads((tmp_path / "one" / METADATA).read_text())["provenance"]
    assert stored["epsilon"] == "none"
    assert provenance_of(stored, where="x").epsilon is None
    assert provenance_of(stored | {"epsilon": 6.0, "delta": 1e-5}, where="x").epsilon == 6.0
    with pytest.raises(FormatError, match="key 'provenance.epsilon'"):
        provenance_of(stored | {"epsilon": "some"}, where="x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("epsilon", value) for value in (-3.0, float("nan"), float("inf"), True)),
        *(("delta", value) for value in (-3.0, float("nan"), 1, 1.0, True)),
    ],
)
def test_a_budget_that_cannot_be_is_refused(key: str, value: float) -> None:
    stored = asdict(Provenance("dp-sgd", epsilon=0.0, delta=0.0))
    assert provenance_of(stored | {"epsilon": 1.0, "delta": 0.5}, where="x").delta == 0.5
    with pytest.raises(FormatError, match=rf"key 'provenance\.{key}' is "):
        provenance_of(stored | {key: value}, where="x")


def test_saving_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter().save(tmp_path / "one")
    with pytest.raises(InputError, match="already exists"):
        adapter().save(tmp_path / "one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for failure, error in ((full, UnavailableError), (interrupted, KeyboardInterrupt)):
        monkeypatch.setattr(os, "fsync", failure)
        for folder in ("one", "two"):
            with pytest.raises(error):
                adapter(family(seed=1)).save(tmp_path / folder, overwrite=True)
        monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["one"]
    Adapter.load(tmp_path / "one", family=family())


def test_the_digest_is_of_the_folded_B_alone() -> None:
    one = adapter()
    rows = one.plan.modules
    assert len(one.digest) == 64
    assert replace(one, name="two", provenance=Provenance("other")).digest == one.digest
    turned = dict(reversed(list(one.lora_B.items())))
    assert replace(one, lora_B=turned).digest == one.digest
    doubled = RankPlan(
        {name: replace(row, lora_alpha=2 * row.lora_alpha) for name, row in rows.items()}, one.plan.provenance
    )
    halved = {name: B / 2 for name, B in one.lora_B.items()}
    assert replace(one, plan=doubled, lora_B=halved).digest == one.digest  # the same update of the base
    assert replace(one, plan=doubled).digest != one.digest
    for module in rows:
        changed = {name: B.clone() for name, B in one.lora_B.items()}
        changed[module][0, 0] = torch.nextafter(changed[module][0, 0], torch.tensor(9.0))
        assert replace(one, lora_B=changed).digest != one.digest


def test_a_foreign_digest_is_of_its_own_lora_A_too() -> None:
    member = adapter()
    foreign = replace(member, family=None, base=None)
    other = replace(foreign, lora_A={name: -A for name, A in foreign.lora_A.items()})
    assert foreign.digest == replace(foreign, name="two").digest
    assert len({member.digest, foreign.digest, other.digest}) == 3
    for module in foreign.lora_A:
        changed = {name: A.clone() for name, A in foreign.lora_A.items()}
        changed[module][0, 0] = torch.nextafter(changed[module][0, 0], torch.tensor(9.0))
        assert replace(foreign, lora_A=changed).digest != foreign.digest
    elsewhere = adapter(family(seed=1))
    assert not torch.equal(elsewhere.lora_A["z.first"], member.lora_A["z.first"])
    assert adapter(name="two").digest == elsewhere.digest == member.digest  # the A is the family's, not theirs


def test_a_digest_that_is_written_down_is_not_computed() -> None:
    stored = replace(adapter(), known_digest="f" * 64)
    assert stored.digest == "f" * 64
    assert stored.member_of(family()).digest == "f" * 64
    changed = {name: 3 * B for name, B in stored.lora_B.items()}
    assert replace(stored, lora_B=changed).digest == replace(adapter(), lora_B=changed).digest  # nobody else's
