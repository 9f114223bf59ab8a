"""A family is what its bytes say: drawn alike everywhere, changed in one bit it is another family or an error."""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treadle import randomness
from treadle.errors import FormatError, InputError, MismatchError, UnavailableError
from treadle.family.family import METADATA, WEIGHTS, AdapterFamily
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity

BASE = BaseIdentity("tiny", "a" * 64)
SHAPES = {"z.first": LayerShape(6, 4), "a.second": LayerShape(8, 8)}
PLAN = RankPlan.of_ranks(SHAPES, {"z.first": 2, "a.second": 3}, scaling=2.0)

GOLDEN_ROW = [-0.18998700380325317, -0.22332969307899475, -0.19255532324314117]
GOLDEN_WEIGHTS = "518927a7f99e9d45d2750de809804b9d5dd20f09b4eac34c78c1857d19844ee2"
GOLDEN_FINGERPRINT = "f81c5d53eaa445bd6263b8370af314ea987990a4a4e609345f4e11de7913f0fe"


def family(seed: int = 0, init: str = "kaiming", plan: RankPlan = PLAN, base: BaseIdentity = BASE) -> AdapterFamily:
    return AdapterFamily.create(base=base, plan=plan, seed=seed, init=init)


def test_kaiming_is_uniform_on_one_over_the_root_of_the_inputs() -> None:
    A = family().lora_A["a.second"]
    draws = torch.from_numpy(randomness.uniform(0, "a.second", (3, 8)))
    torch.testing.assert_close(A.double(), (2 * draws - 1) / math.sqrt(8), rtol=1e-7, atol=0)
    wide = family(plan=RankPlan.uniform({"m": LayerShape(400, 400)}, rank=50)).lora_A["m"]
    assert wide.abs().max() <= 1 / 20
    assert wide.var().item() == pytest.approx(1 / (3 * 400), rel=0.05)


def test_the_golden_family() -> None:
    """Recorded once; portable, because only integers and correctly rounded products made it."""
    golden = family(seed=7)
    assert golden.lora_A["z.first"][0, :3].tolist() == GOLDEN_ROW
    assert hashlib.sha256(golden.weights).hexdigest() == GOLDEN_WEIGHTS
    assert golden.fingerprint == GOLDEN_FINGERPRINT


def test_orthonormal_has_orthonormal_rows() -> None:
    for A in family(init="orthonormal").lora_A.values():
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("init", ["kaiming", "orthonormal"])
def test_drawing_again_gives_the_same_family(init: str) -> None:
    assert family(init=init).weights == family(init=init).weights
    assert family(init=init).fingerprint == family(init=init).fingerprint


def test_a_modules_draw_depends_on_its_own_name_alone() -> None:
    alone = family(plan=RankPlan({"a.second": PLAN.modules["a.second"]}))
    assert torch.equal(alone.lora_A["a.second"], family().lora_A["a.second"])
    renamed = family(plan=RankPlan({"b.second": PLAN.modules["a.second"]}))
    assert not torch.equal(renamed.lora_A["b.second"], alone.lora_A["a.second"])


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(InputError, match="no such init 'pissa'; choose among kaiming, orthonormal"):
        family(init="pissa")


def test_everything_that_defines_a_family_is_in_its_fingerprint() -> None:
    one = {name: A.clone() for name, A in family().lora_A.items()}
    one["z.first"][0, 0] = torch.nextafter(one["z.first"][0, 0], torch.tensor(1.0))
    others = [
        family(seed=1),
        family(init="orthonormal"),
        family(base=BaseIdentity("tiny", "b" * 64)),
        family(plan=RankPlan.of_ranks(SHAPES, {"z.first": 2, "a.second": 3}, scaling=1.0)),
        family(plan=RankPlan.of_ranks(SHAPES, {"z.first": 2, "a.second": 2}, scaling=2.0)),
        family(plan=RankPlan(dict(reversed(PLAN.modules.items())))),
        AdapterFamily.of_tensors(base=BASE, plan=PLAN, lora_A=one, init="kaiming", seed=0),
        AdapterFamily.of_tensors(
            base=BASE, plan=PLAN, lora_A=family().lora_A, init="kaiming", seed=0, origin={"text": "t"}
        ),
    ]
    assert len({family().fingerprint, *(other.fingerprint for other in others)}) == 9


def test_tensors_of_other_shapes_are_refused() -> None:
    tensors = dict(family().lora_A) | {"z.first": torch.zeros(3, 6)}
    with pytest.raises(MismatchError, match=r"z\.first: lora_A must have shape \(2, 6\)"):
        AdapterFamily.of_tensors(base=BASE, plan=PLAN, lora_A=tensors, init="kaiming", seed=0)
    del tensors["z.first"]
    with pytest.raises(MismatchError, match=r"z\.first: lora_A must have shape"):
        AdapterFamily.of_tensors(base=BASE, plan=PLAN, lora_A=tensors, init="kaiming", seed=0)


def test_a_saved_family_comes_back_in_the_plans_order(tmp_path: Path) -> None:
    family(seed=3).save(tmp_path / "f")
    loaded = AdapterFamily.load(tmp_path / "f")
    assert loaded.fingerprint == family(seed=3).fingerprint
    assert list(loaded.lora_A) == list(PLAN.modules)
    assert (loaded.base, loaded.plan, loaded.seed, loaded.init) == (BASE, PLAN, 3, "kaiming")
    assert all(torch.equal(A, family(seed=3).lora_A[name]) for name, A in loaded.lora_A.items())
    assert loaded.scaling("z.first") == 2.0
    loaded.save(tmp_path / "again")
    assert AdapterFamily.load(tmp_path / "again").fingerprint == loaded.fingerprint


def test_no_byte_of_the_stored_family_can_change_unseen(tmp_path: Path) -> None:
    family().save(tmp_path / "f")
    fingerprint = family().fingerprint
    for file in (METADATA, WEIGHTS):
        content = (tmp_path / "f" / file).read_bytes()
        for place in range(0, len(content), max(1, len(content) // 60)):
            changed = bytearray(content)
            changed[place] ^= 1
            (tmp_path / "f" / file).write_bytes(changed)
            with contextlib.suppress(InputError):
                assert AdapterFamily.load(tmp_path / "f").fingerprint != fingerprint
        (tmp_path / "f" / file).write_bytes(content)
    assert AdapterFamily.load(tmp_path / "f").fingerprint == fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "key 'format' is not 'treadle.family/1'; give a family folder"),
        ({"base": {"name": "x"}}, "key 'sha256' is missing"),
        ({"base": {"name": "x", "sha256": "short"}}, "is not a SHA-256"),
        ({"base": None}, "key .* is missing"),
        ({"plan": 3}, "'plan' and 'origin' must be objects"),
        ({"origin": []}, "'plan' and 'origin' must be objects"),
        ({"seed": "3"}, "'seed' an integer"),
        ({"lora_A_sha256": "0" * 64}, "the frozen A were changed: SHA-256 differs"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    family().save(tmp_path / "f")
    path = tmp_path / "f" / METADATA
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        AdapterFamily.load(tmp_path / "f")


def test_weights_of_other_modules_or_shapes_are_refused_even_with_the_right_digest(tmp_path: Path) -> None:
    family().save(tmp_path / "f")
    good = load_file(tmp_path / "f" / WEIGHTS)
    for tensors in (
        {"z.first": good["z.first"]},
        good | {"more": torch.zeros(1)},
        good | {"z.first": torch.zeros(2, 5)},
        good | {"z.first": torch.full((2, 6), float("nan"))},
        good | {"z.first": torch.zeros(2, 6, dtype=torch.float16)},
    ):
        save_file(tensors, tmp_path / "f" / WEIGHTS)
        path = tmp_path / "f" / METADATA
        digest = hashlib.sha256((tmp_path / "f" / WEIGHTS).read_bytes()).hexdigest()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_A_sha256": digest}))
        with pytest.raises(FormatError):
            AdapterFamily.load(tmp_path / "f")


@pytest.mark.parametrize("file", [METADATA, WEIGHTS])
def test_a_missing_or_truncated_file_is_refused(tmp_path: Path, file: str) -> None:
    family().save(tmp_path / "f")
    path = tmp_path / "f" / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FormatError, match=file.replace(".", r"\.")):
        AdapterFamily.load(tmp_path / "f")
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        AdapterFamily.load(tmp_path / "f")


def test_saving_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family().save(tmp_path / "f")
    with pytest.raises(InputError, match="already exists"):
        family(seed=1).save(tmp_path / "f")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for failure, error in ((full, UnavailableError), (interrupted, KeyboardInterrupt)):
        monkeypatch.setattr(os, "fsync", failure)
        for folder in ("f", "g"):
            with pytest.raises(error):
                family(seed=1).save(tmp_path / folder, overwrite=True)
        monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["f"]
    assert AdapterFamily.load(tmp_path / "f").fingerprint == family().fingerprint
