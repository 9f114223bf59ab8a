"""A rank plan holds positive ranks that fit, counts its parameters, and comes back from disk as it was."""

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from treadle.errors import FormatError, InputError, MismatchError
from treadle.family.injection import linear_shapes
from treadle.family.plan import LayerShape, ModulePlan, RankPlan

SHAPES = {"one": LayerShape(4, 6), "two": LayerShape(8, 3)}


def test_a_uniform_plan_keeps_alpha_over_r() -> None:
    plan = RankPlan.uniform(SHAPES, rank=2, scaling=2.0)
    assert plan.modules["one"] == ModulePlan(2, 4.0, 4, 6)
    assert [row.scaling for row in plan.modules.values()] == [2.0, 2.0]


def test_rank_zero_drops_the_module_and_order_is_the_models() -> None:
    plan = RankPlan.of_ranks(SHAPES, {"two": 3, "one": 0})
    assert list(plan.modules) == ["two"]
    assert list(RankPlan.of_ranks(SHAPES, {"two": 1, "one": 1}).modules) == ["one", "two"]


def test_parameters_are_counted_apart() -> None:
    count = RankPlan.of_ranks(SHAPES, {"one": 2, "two": 3}).count()
    assert (count.lora_A, count.lora_B, count.total) == (2 * 4 + 3 * 8, 2 * 6 + 3 * 3, 53)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ModulePlan(0, 1.0, 4, 6), r"m: rank 0 is outside 1\.\.4"),
        (ModulePlan(5, 1.0, 4, 6), r"m: rank 5 is outside 1\.\.4"),
        (ModulePlan(1, 0.0, 4, 6), "m: lora_alpha 0.0 is not positive"),
        (ModulePlan(1, float("inf"), 4, 6), "m: lora_alpha inf is not positive"),
        (ModulePlan(1, float("nan"), 4, 6), "m: lora_alpha nan is not positive"),
    ],
)
def test_what_is_no_plan_is_refused(row: ModulePlan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RankPlan({"m": row})


def test_an_empty_plan_and_unknown_modules_are_refused() -> None:
    with pytest.raises(InputError, match="at least one module"):
        RankPlan({})
    with pytest.raises(MismatchError, match="the model has no module 'three'"):
        RankPlan.of_ranks(SHAPES, {"three": 1})


def test_a_plan_checks_a_models_layers(tiny_llama: LlamaForCausalLM) -> None:
    shapes = linear_shapes(tiny_llama)
    plan = RankPlan.uniform(shapes, rank=1)
    plan.check(shapes)
    name = next(iter(shapes))
    with pytest.raises(MismatchError, match=f"the model has no module '{name}'; plan again"):
        plan.check({key: shape for key, shape in shapes.items() if key != name})
    with pytest.raises(MismatchError, match=f"{name}: the model's layer is 9→9, the plan's 32→32"):
        plan.check(shapes | {name: LayerShape(9, 9)})


def test_a_plan_cannot_be_changed() -> None:
    rows = {"m": ModulePlan(1, 1.0, 4, 6)}
    plan = RankPlan(rows)
    rows["n"] = rows["m"]
    assert list(plan.modules) == ["m"]
    with pytest.raises(TypeError):
        plan.modules["n"] = rows["m"]  # type: ignore[index]


def test_a_saved_plan_comes_back(tmp_path: Path) -> None:
    plan = RankPlan.of_ranks(SHAPES, {"one": 2, "two": 3}, scaling=0.5, provenance={"allocator": "adarank"})
    plan.save(tmp_path / "plan.json")
    loaded = RankPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert list(loaded.modules) == ["one", "two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, r"plan\.json: key 'format' is not 'treadle.rank-plan/1'"),
        ({"modules": {}}, "key 'modules' must be a list"),
        ({"provenance": 3}, "'provenance' an object"),
        ({"modules": [{"name": "m"}]}, "module 'm': lacks the key 'in_features'"),
        ({"modules": [{"name": "m", "in_features": 2, "out_features": 2}]}, "module 'm': lacks the key 'rank'"),
        ({"modules": ["m"]}, "a value has the wrong type"),
        ({"modules": [{}, {}]}, "module None: lacks the key 'name'"),
        ({"modules": []}, "at least one module"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    content = RankPlan.uniform(SHAPES, rank=1).to_json() | change
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        RankPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 1.5), ("rank", True), ("lora_alpha", "1"), ("name", 3), ("in_features", "2")]
)
def test_a_value_of_a_wrong_type_is_refused(key: str, value: object) -> None:
    row = {"name": "m", "rank": 1, "lora_alpha": 1, "in_features": 2, "out_features": 2} | {key: value}
    with pytest.raises(FormatError, match="a value has the wrong type"):
        RankPlan.from_json(RankPlan.uniform(SHAPES, rank=1).to_json() | {"modules": [row]})


def test_a_module_twice_is_refused() -> None:
    content = RankPlan.uniform(SHAPES, rank=1).to_json()
    rows = content["modules"]
    assert isinstance(rows, list)
    with pytest.raises(FormatError, match="module 'one' stands there twice"):
        RankPlan.from_json(content | {"modules": [rows[0], rows[0]]})


@pytest.mark.parametrize(
    ("provenance", "reason"),
    [
        ({}, ""),
        ({"probe_text": "public: pydoc"}, ""),
        ({"probe_text": "private"}, "the rank plan was probed on private text"),
        ({"probe_text": "not stated"}, "the rank plan was probed on text that nobody states to be public"),
    ],
)
def test_a_plan_knows_whether_private_text_decided_it(provenance: dict[str, str], reason: str) -> None:
    assert RankPlan(RankPlan.uniform({"a": LayerShape(4, 4)}, rank=1).modules, provenance).unaccounted == reason


def test_a_file_with_an_impossible_rank_is_named(tmp_path: Path) -> None:
    row = {"name": "m", "rank": 0, "lora_alpha": 1.0, "in_features": 2, "out_features": 2}
    content = RankPlan.uniform(SHAPES, rank=1).to_json() | {"modules": [row]}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"plan\.json: m: rank 0 is outside 1\.\.2"):
        RankPlan.load(tmp_path / "plan.json")
