"""Families by name: what A is made from, recorded, and made again from the same."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.family import FamilyRun
from treadle.data.public_text import public_texts
from treadle.errors import ConfigError, InputError
from treadle.family.family import METADATA, AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import load_model, load_tokenizer
from treadle.recipes import public_pca as module
from treadle.recipes.family import new_family
from treadle.recipes.inspect import inspect
from treadle.recipes.public_pca import public_pca
from treadle.routing.calibration.text import ignored_tokens
from treadle.toml import checked

INITS = ["kaiming", "orthonormal", "weight-svd", "public-pca"]


@pytest.fixture
def base(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A base, a plan of ranks 1 to 3, and a public text."""
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    shapes = linear_shapes(tiny_llama)
    RankPlan.of_ranks(shapes, {name: i % 3 + 1 for i, name in enumerate(shapes)}).save(tmp_path / "plan.json")
    lines = [f"the film is not w{i} and w{i * 7 % 60} good : a question of colour {i % 10}" for i in range(40)]
    (tmp_path / "public.txt").write_text("\n\n".join(lines))
    return tmp_path


def config(root: Path, init: str, **changes: object) -> FamilyRun:
    text = {"source": str(root / "public.txt"), "passages": 6, "words": 12} if init == "public-pca" else None
    content = {"base": str(root / "base"), "plan": root / "plan.json", "out": root / "family", "init": init}
    return FamilyRun.model_validate(content | {"text": text} | changes)


@pytest.mark.parametrize("init", INITS)
def test_the_same_again_is_the_same_family(base: Path, init: str) -> None:
    family = new_family(config(base, init))
    again = new_family(config(base, init, out=base / "again"))
    assert again.fingerprint == family.fingerprint
    loaded = AdapterFamily.load(base / "family")
    assert (loaded.fingerprint, loaded.init, loaded.seed) == (family.fingerprint, init, 0)
    assert loaded.origin == family.origin
    loaded.save(base / "copied")
    assert (base / "copied" / METADATA).read_bytes() == (base / "family" / METADATA).read_bytes()


def test_one_rank_for_all_layers_needs_no_plan(base: Path) -> None:
    family = new_family(config(base, "kaiming", plan=None, equal={"rank": 3, "scaling": 4.0, "kinds": ["v_proj"]}))
    assert {name.rpartition(".")[2] for name in family.plan.modules} == {"v_proj"}
    assert {(row.rank, row.scaling) for row in family.plan.modules.values()} == {(3, 4.0)}


@pytest.mark.parametrize("both", [True, False])
def test_ranks_are_given_once(base: Path, both: bool) -> None:
    content = {"base": str(base / "base"), "out": base / "family"}
    content |= {"plan": base / "plan.json", "equal": {"rank": 3}} if both else {}
    with pytest.raises(ConfigError, match="give either a plan"):
        checked(content, FamilyRun, where="family.toml")


def test_every_name_makes_another_family(base: Path) -> None:
    families = [new_family(config(base, init, out=base / init)) for init in INITS]
    assert len({family.fingerprint for family in families}) == len(INITS)
    for family in families[1:]:
        for A in family.lora_A.values():
            torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-6)


def test_a_public_text_is_recorded_by_name_and_digest_and_no_path(base: Path) -> None:
    new_family(config(base, "public-pca", seed=4))
    stored = json.loads((base / "family" / METADATA).read_text())
    digest = public_texts(str(base / "public.txt"), limit=6, words=12, seed=4).sha256
    assert (stored["init"], stored["seed"]) == ("public-pca", 4)
    assert stored["origin"] == {"text": "public.txt", "text_sha256": digest}
    assert str(base) not in (base / "family" / METADATA).read_text()
    facts = inspect(base / "family").facts
    assert (facts["A made from: text"], facts["A made from: text_sha256"]) == ("public.txt", digest)
    assert "origin" not in json.loads((new_saved(base, "weight-svd") / METADATA).read_text())


def new_saved(root: Path, init: str) -> Path:
    new_family(config(root, init, out=root / init))
    return root / init


def test_another_text_is_another_family(base: Path) -> None:
    one = new_family(config(base, "public-pca"))
    text = {"source": str(base / "public.txt"), "passages": 7, "words": 12}
    other = new_family(config(base, "public-pca", out=base / "other", text=text))
    assert one.fingerprint != other.fingerprint


def inputs_of(root: Path, name: str, passages: tuple[str, ...]) -> torch.Tensor:
    """What comes into a layer, read one passage at a time, without special tokens and first positions: the oracle."""
    model, tokenizer = load_model(str(root / "base"), device="cpu"), load_tokenizer(str(root / "base"))
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    ignored, kept = set(ignored_tokens(tokenizer)), []
    for passage in passages:
        ids = tokenizer(passage, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model(ids)
        plain = [place for place, token in enumerate(ids[0].tolist()) if token not in ignored]
        kept.append(seen.pop()[plain[1:]])
    handle.remove()
    return torch.cat(kept).double()


@pytest.mark.parametrize("group_bytes", [1, 1 << 29])
def test_directions_are_those_of_the_centred_inputs(
    base: Path, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROUP_BYTES", group_bytes)
    passages = public_texts(str(base / "public.txt"), limit=6, words=12).passages
    model, tokenizer = load_model(str(base / "base"), device="cpu"), load_tokenizer(str(base / "base"))
    plan = RankPlan.load(base / "plan.json")
    found = public_pca(model, tokenizer, plan, passages)
    assert list(found) == list(plan.modules)
    for name in list(plan.modules)[::4]:
        x = inputs_of(base, name, passages)
        oracle = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[: plan.modules[name].rank]
        overlaps = (found[name].double() @ oracle.T).abs()
        # Batches are padded in the one and not in the other: float32 activations agree to about 1e-6, and gaps of
        # neighbouring eigenvalues down to a few per cent multiply that.
        torch.testing.assert_close(overlaps, torch.eye(len(oracle)).double(), rtol=0, atol=1e-3)


def test_a_pooler_that_sees_one_vector_a_text_is_read_too(
    tiny_tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest
) -> None:
    bert = request.getfixturevalue("tiny_bert")
    plan = RankPlan.uniform(linear_shapes(bert, ["pooler.dense", "query"]), rank=2)
    passages = [f"the film is w{i} not good" for i in range(8)]
    found = public_pca(bert, tiny_tokenizer, plan, passages)
    assert all(A.shape == (2, 32) for A in found.values())


def test_too_short_a_text_is_refused_before_anything_is_written(base: Path) -> None:
    (base / "public.txt").write_text("the film is")
    with pytest.raises(InputError, match="the public text has 2 tokens for it, too few for rank 2; give more text"):
        new_family(config(base, "public-pca", text={"source": str(base / "public.txt"), "words": 3}))
    assert not (base / "family").exists()


def test_an_existing_folder_is_refused_before_any_work(base: Path) -> None:
    (base / "family").mkdir()
    with pytest.raises(InputError, match="already exists"):
        new_family(config(base, "public-pca", base=str(base / "nowhere")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"init": "pissa"}, "'init'.*'kaiming', 'orthonormal', 'weight-svd' or 'public-pca'"),
        ({"text": {"source": "pydoc"}}, "init 'kaiming' reads no text"),
        ({"init": "public-pca", "text": {"passages": 0}}, "'text.passages'"),
        ({"init": "public-pca", "text": {"private": True}}, "'text.private'"),
    ],
)
def test_wrong_keys_are_named(content: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked({"base": "b", "plan": "p.json", "out": "f"} | content, FamilyRun, where="family.toml")
