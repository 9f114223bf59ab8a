import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.family import FamilyRun
from treadle.configs.plan import PlanRun, ProbeText
from treadle.configs.toml import load_toml
from treadle.errors import ConfigError, InputError, MismatchError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.ranks.allocation import Budget
from treadle.ranks.perturbation import PerturbationSettings
from treadle.ranks.scores import ProbeScores
from treadle.recipes.family import new_family
from treadle.recipes.plan import plan


@pytest.fixture
def base(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A small model in a folder."""
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "small"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> PlanRun:
    return PlanRun(
        base=str(base),
        out=tmp_path / "plan",
        mean_rank=3,
        probe=PerturbationSettings(trials=2),
        text=ProbeText(sequences=3, tokens=6),
    )


def test_the_plan_spends_its_budget_and_is_written(run: PlanRun, tiny_llama: LlamaForCausalLM) -> None:
    made = plan(run)
    shapes = linear_shapes(tiny_llama)
    made.check(shapes)
    uniform = RankPlan.uniform(shapes, rank=3).count().total
    cheapest = min(shape.in_features + shape.out_features for shape in shapes.values())
    assert uniform - cheapest < made.count().total <= uniform
    assert len({module.rank for module in made.modules.values()}) > 1
    assert sorted(path.name for path in run.out.iterdir()) == ["plan.json", "scores.json"]
    assert RankPlan.load(run.out / "plan.json") == made
    scores = ProbeScores.load(run.out / "scores.json")
    assert scores.shapes() == shapes
    assert all(len(score.values) == 2 and len(score.values[0]) == 3 for score in scores.modules.values())


def test_the_plan_says_where_it_comes_from_and_names_no_folder(run: PlanRun, tmp_path: Path) -> None:
    made = plan(run)
    assert made.provenance["base"] == "small"
    assert made.provenance["probe_text"] == "public: pydoc"
    assert made.provenance["probe_text_sha256"] == ProbeScores.load(run.out / "scores.json").text_sha256
    assert json.loads(made.provenance["probe_settings"])["trials"] == 2
    assert all(str(tmp_path) not in (run.out / name).read_text() for name in ("plan.json", "scores.json"))


def test_the_same_seed_gives_the_same_plan(run: PlanRun, tmp_path: Path) -> None:
    first = plan(run)
    assert plan(run.model_copy(update={"out": tmp_path / "again"})) == first
    names = ("plan.json", "scores.json")
    assert all((run.out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    other = plan(run.model_copy(update={"out": tmp_path / "other", "seed": 1}))
    assert other.provenance["probe_text_sha256"] != first.provenance["probe_text_sha256"]


def test_kinds_budgets_and_rules_reach_the_plan(run: PlanRun) -> None:
    changes = {"modules": ("q_proj", "v_proj"), "mean_rank": None, "budget": Budget("ranks", 9), "maximum": 3}
    made = plan(run.model_copy(update=changes))
    assert {name.rsplit(".", 1)[-1] for name in made.modules} == {"q_proj", "v_proj"}
    assert sum(module.rank for module in made.modules.values()) == 9
    assert max(module.rank for module in made.modules.values()) <= 3
    floor = plan(run.model_copy(update={**changes, "rule": "floor", "overwrite": True}))
    assert sum(module.rank for module in floor.modules.values()) + int(floor.provenance["lost"]) == 9


def test_private_text_is_marked_and_leaves_no_digest(run: PlanRun, tmp_path: Path) -> None:
    secret = tmp_path / "ward-seven.txt"
    secret.write_text("the question is not who but why " * 20, encoding="utf-8")
    text = ProbeText(source=str(secret), sequences=2, tokens=6, public=False)
    made = plan(run.model_copy(update={"text": text}))
    assert made.provenance["probe_text"] == "private"
    assert made.provenance["probe_text_sha256"] == ""
    assert ProbeScores.load(run.out / "scores.json").text_sha256 is None
    assert "ward" not in (run.out / "plan.json").read_text()


def test_an_existing_folder_is_refused_before_any_work(run: PlanRun) -> None:
    run.out.mkdir()
    kept = run.out / "mine.txt"
    kept.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        plan(run.model_copy(update={"base": "no-such-model"}))
    assert kept.read_text() == "mine"


def test_an_interrupted_probe_leaves_nothing_behind(run: PlanRun) -> None:
    def interrupt(_description: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(run, interrupt)
    assert not run.out.exists()
    assert not list(run.out.parent.glob(".plan*"))


def test_progress_counts_up_to_the_end(run: PlanRun) -> None:
    steps: list[tuple[int, int]] = []
    plan(run, lambda _, done, total: steps.append((done, total)))
    assert steps[-1] == (14, 14)


TOML = """
base = "smollm2-135m"
out = "runs/plan"
modules = ["q_proj"]
budget = {unit = "trainable", value = 1000}

[probe]
trials = 1
compare = "pristine"

[text]
sequences = 4
"""


def test_the_toml_is_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(TOML)
    run = load_toml(path, PlanRun)
    assert run.budget == Budget("trainable", 1000)
    assert run.probe == PerturbationSettings(trials=1, compare="pristine")
    assert (run.text.source, run.text.sequences, run.modules) == ("pydoc", 4, ("q_proj",))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("trials = 1", "trials = 0", "0 trials"),
        ("trials = 1", "trails = 1", "probe.trails"),
        ("trials = 1", "trials = 'many'", "probe.trials"),
        ('"pristine"', '"both"', "probe.compare"),
        ("value = 1000", "value = 0", "buys nothing"),
        ('"trainable"', '"bytes"', "budget.unit"),
        ("value = 1000", "value = 1000, cap = 3", "budget.cap"),
        ("sequences = 4", "sequences = 0", "text.sequences"),
        ('modules = ["q_proj"]', "modules = []", "modules"),
        ('modules = ["q_proj"]', "mean_rank = 4", "either mean_rank or budget"),
        ('modules = ["q_proj"]', 'rule = "best"', "rule"),
        ('out = "runs/plan"', "", "'out'"),
    ],
)
def test_wrong_keys_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(TOML.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        load_toml(path, PlanRun)
    assert "\n" not in str(caught.value)


def test_a_plan_becomes_a_family(run: PlanRun, base: Path, tmp_path: Path) -> None:
    made = plan(run)
    config = FamilyRun(base=str(base), plan=run.out / "plan.json", out=tmp_path / "family", seed=4)
    family = new_family(config)
    assert family.plan == made
    assert AdapterFamily.load(config.out).fingerprint == family.fingerprint
    assert family.base.sha256 == made.provenance["base_sha256"]
    assert all(family.lora_A[name].shape == (m.rank, m.in_features) for name, m in made.modules.items())
    assert family.base.name == made.provenance["base"] == "small"
    shutil.copytree(base, tmp_path / "elsewhere" / "small")
    moved = config.model_copy(update={"base": str(tmp_path / "elsewhere" / "small"), "out": tmp_path / "moved"})
    assert new_family(moved).fingerprint == family.fingerprint
    other = new_family(config.model_copy(update={"out": tmp_path / "other", "init": "orthonormal"}))
    assert other.fingerprint != family.fingerprint


def test_a_plan_of_another_base_makes_no_family(
    run: PlanRun, base: Path, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    plan(run)
    tiny_llama.model.norm.weight.data[0] += 1
    tiny_llama.save_pretrained(tmp_path / "changed")
    config = FamilyRun(base=str(tmp_path / "changed"), plan=run.out / "plan.json", out=tmp_path / "family")
    with pytest.raises(MismatchError, match="made for 'small'"):
        new_family(config)
    assert not config.out.exists()


def test_a_plan_with_strange_modules_makes_no_family(base: Path, tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    shapes = {f"{name}.x": shape for name, shape in linear_shapes(tiny_llama).items()}
    RankPlan.uniform(shapes, rank=1).save(tmp_path / "plan.json")
    with pytest.raises(MismatchError, match="no module"):
        new_family(FamilyRun(base=str(base), plan=tmp_path / "plan.json", out=tmp_path / "family"))


def test_an_unknown_key_of_a_family_is_named(tmp_path: Path) -> None:
    path = tmp_path / "family.toml"
    path.write_text('base = "b"\nplan = "p.json"\nout = "f"\nranks = 3\n')
    with pytest.raises(ConfigError, match="ranks"):
        load_toml(path, FamilyRun)
