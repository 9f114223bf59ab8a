import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from treadle.configs.family import FamilyRun
from treadle.configs.plan import PlanRun, ProbeText, Replan
from treadle.errors import ConfigError, InputError, MismatchError, UnsupportedError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import load_tokenizer
from treadle.ranks.allocation import Budget
from treadle.ranks.jacobian import JacobianSettings
from treadle.ranks.perturbation import PerturbationSettings
from treadle.ranks.probes import PROBES
from treadle.ranks.scores import ProbeScores
from treadle.ranks.stability import split_half
from treadle.recipes.family import new_family
from treadle.recipes.plan import plan, probe_inputs, replan
from treadle.toml import load_toml


def test_the_plan_spends_its_budget_and_is_written(plan_run: PlanRun, tiny_llama: LlamaForCausalLM) -> None:
    planned = plan(plan_run)
    made, shapes = planned.plan, linear_shapes(tiny_llama)
    made.check(shapes)
    uniform = RankPlan.uniform(shapes, rank=3).count().total
    cheapest = min(shape.in_features + shape.out_features for shape in shapes.values())
    assert uniform - cheapest < made.count().total <= uniform
    assert len({module.rank for module in made.modules.values()}) > 1
    assert sorted(path.name for path in plan_run.out.iterdir()) == ["plan.json", "scores.json"]
    assert RankPlan.load(plan_run.out / "plan.json") == made
    scores = ProbeScores.load(plan_run.out / "scores.json")
    assert scores == planned.scores
    assert scores.shapes() == shapes
    assert all(len(score.values) == 2 and len(score.values[0]) == 3 for score in scores.modules.values())


def test_the_plan_says_where_it_comes_from_and_names_no_folder(plan_run: PlanRun, tmp_path: Path) -> None:
    made = plan(plan_run).plan
    assert made.provenance["base"] == "base"
    assert made.provenance["probe_text"] == "public: pydoc"
    assert made.provenance["probe_text_sha256"] == ProbeScores.load(plan_run.out / "scores.json").text_sha256
    assert json.loads(made.provenance["probe_settings"])["trials"] == 2
    assert all(str(tmp_path) not in (plan_run.out / name).read_text() for name in ("plan.json", "scores.json"))


def test_the_same_seed_gives_the_same_plan(plan_run: PlanRun, tmp_path: Path) -> None:
    first = plan(plan_run).plan
    assert plan(plan_run.model_copy(update={"out": tmp_path / "again"})).plan == first
    names = ("plan.json", "scores.json")
    assert all((plan_run.out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    other = plan(plan_run.model_copy(update={"out": tmp_path / "other", "seed": 1})).plan
    assert other.provenance["probe_text_sha256"] != first.provenance["probe_text_sha256"]


def test_kinds_budgets_and_rules_reach_the_plan(plan_run: PlanRun) -> None:
    changes = {"modules": ("q_proj", "v_proj"), "mean_rank": None, "budget": Budget("ranks", 9), "maximum": 3}
    made = plan(plan_run.model_copy(update=changes)).plan
    assert {name.rsplit(".", 1)[-1] for name in made.modules} == {"q_proj", "v_proj"}
    assert sum(module.rank for module in made.modules.values()) == 9
    assert max(module.rank for module in made.modules.values()) <= 3
    floor = plan(plan_run.model_copy(update={**changes, "rule": "floor", "overwrite": True})).plan
    assert sum(module.rank for module in floor.modules.values()) + int(floor.provenance["lost"]) == 9


def test_private_text_is_marked_and_leaves_no_digest(plan_run: PlanRun, tmp_path: Path) -> None:
    secret = tmp_path / "ward-seven.txt"
    secret.write_text("the question is not who but why " * 20, encoding="utf-8")
    text = ProbeText(source=str(secret), sequences=2, tokens=6, public=False)
    made = plan(plan_run.model_copy(update={"text": text})).plan
    assert made.provenance["probe_text"] == "private"
    assert made.provenance["probe_text_sha256"] == ""
    assert ProbeScores.load(plan_run.out / "scores.json").text_sha256 is None
    assert "ward" not in (plan_run.out / "plan.json").read_text()


def test_an_existing_folder_is_refused_before_any_work(plan_run: PlanRun) -> None:
    plan_run.out.mkdir()
    kept = plan_run.out / "mine.txt"
    kept.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        plan(plan_run.model_copy(update={"base": "no-such-model"}))
    assert kept.read_text() == "mine"


def test_an_interrupted_probe_goes_on_where_it_stopped(plan_run: PlanRun, tmp_path: Path) -> None:
    def interrupt(_description: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(plan_run, interrupt)
    assert not plan_run.out.exists()
    assert not list(plan_run.out.parent.glob(".plan*.part"))
    (begun,) = plan_run.out.parent.glob(".plan.*.probe")
    measured = begun.read_bytes()
    resumed = plan(plan_run)
    assert not begun.exists()
    assert measured
    assert plan(plan_run.model_copy(update={"out": tmp_path / "at once"})).plan == resumed.plan


def test_progress_counts_up_to_the_end(plan_run: PlanRun) -> None:
    steps: list[tuple[int, int]] = []
    plan(plan_run, lambda _, done, total: steps.append((done, total)))
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
    plan_run = load_toml(path, PlanRun)
    assert plan_run.budget == Budget("trainable", 1000)
    assert plan_run.probe == PerturbationSettings(trials=1, compare="pristine")
    path.write_text(TOML.replace('trials = 1\ncompare = "pristine"', "name = 'jacobian'\nprojections = 3"))
    assert load_toml(path, PlanRun).probe == JacobianSettings(projections=3)
    path.write_text(TOML.replace('budget = {unit = "trainable", value = 1000}', "mean_rank = 4\nties = [['q', 'k']]"))
    assert load_toml(path, PlanRun).allocation.ties == (("q", "k"),)
    assert (plan_run.text.source, plan_run.text.sequences, plan_run.modules) == ("pydoc", 4, ("q_proj",))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("trials = 1", "name = 'guess'", "key 'probe.name': no such probe 'guess'; choose among perturbation"),
        ("trials = 1", "name = 'jacobian'", "probe.compare"),
        ('modules = ["q_proj"]', "multiple = 8\nmaximum = 4", "no multiple of 8 is from 1 to 4"),
        ('modules = ["q_proj"]', "minimum = 9\nmaximum = 4", "no rank is from 9 to 4"),
        ('modules = ["q_proj"]', "multiple = 0", "multiple"),
        ('trials = 1\ncompare = "pristine"', 'compare = "pristine"\n[settle]\nfirst = 1', "cannot go from 1 trials"),
        ('trials = 1\ncompare = "pristine"', 'compare = "pristine"\n[settle]\nfrist = 2', "settle.frist"),
        ("[text]", "[settle]\nfirst = 2\n[text]", "delete probe.trials"),
        ('trials = 1\ncompare = "pristine"', 'name = "eva"\n[settle]', "of which this probe has none"),
        ('modules = ["q_proj"]', 'ties = "all"', "ties"),
        ("[text]", "[examples]\ntask = 't'\n[text]", "say whether they may be known"),
        ("[text]", "[examples]\ntask = 't'\n[text]\npublic = true\nsource = 'pydoc'", "delete one of the two"),
        ("sequences = 4", "source = 'ward.txt'", "say whether it may be known"),
        ('trials = 1\ncompare = "pristine"', 'name = "perturbation-accumulating"\n[settle]', "this probe has none"),
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


def test_a_plan_becomes_a_family(plan_run: PlanRun, tiny_base: Path, tmp_path: Path) -> None:
    made = plan(plan_run).plan
    config = FamilyRun(base=str(tiny_base), plan=plan_run.out / "plan.json", out=tmp_path / "family", seed=4)
    family = new_family(config)
    assert family.plan == made
    assert AdapterFamily.load(config.out).fingerprint == family.fingerprint
    assert family.base.sha256 == made.provenance["base_sha256"]
    assert all(family.lora_A[name].shape == (m.rank, m.in_features) for name, m in made.modules.items())
    assert family.base.name == made.provenance["base"] == "base"
    shutil.copytree(tiny_base, tmp_path / "elsewhere" / "base")
    moved = config.model_copy(update={"base": str(tmp_path / "elsewhere" / "base"), "out": tmp_path / "moved"})
    assert new_family(moved).fingerprint == family.fingerprint
    other = new_family(config.model_copy(update={"out": tmp_path / "other", "init": "orthonormal"}))
    assert other.fingerprint != family.fingerprint


def test_any_probe_makes_a_plan(plan_run: PlanRun, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{40 + i}", "label": "yes"}) + "\n" for i in range(4)))
    examples = {"source": str(rows), "prompt": "say {text} .", "completion": " {label}"}
    for name in PROBES:
        if name == "eva":
            continue  # needs more rows of input than this little text has, and says so
        table = {"probe": {"name": name}, "text": {"sequences": 2, "tokens": 8}, "out": tmp_path / name}
        if name == "gradient":
            table |= {"examples": examples, "text": {"sequences": 2, "tokens": 8, "public": True}}
        made = plan(PlanRun.model_validate(dict(plan_run) | table)).plan
        assert made.provenance["probe"] == name
        assert made.provenance["probe_text"] == ("public: file" if name == "gradient" else "public: pydoc")


def test_trials_are_added_until_the_ranks_settle(plan_run: PlanRun) -> None:
    table = {"probe": {"name": "jacobian"}, "settle": {"first": 2, "step": 2, "maximum": 6, "confidence": 1.0}}
    made = plan(PlanRun.model_validate(dict(plan_run) | table))
    trials = {len(score.values) for score in made.scores.modules.values()}
    assert trials <= {2, 4, 6}
    most = trials.pop()
    assert json.loads(made.plan.provenance["probe_settings"])["projections"] == most
    assert made.settled is not None
    assert made.settled.trials == most
    assert made.settled.settled == (made.settled.unchanged == 1.0)
    eager = {"settle": {"first": 2, "step": 2, "maximum": 6, "confidence": 0.01, "moving": 0.9}}
    few = plan(PlanRun.model_validate(dict(plan_run) | eager | {"overwrite": True}))
    assert json.loads(few.plan.provenance["probe_settings"])["trials"] == 2
    assert few.settled is not None
    assert few.settled.settled
    assert few.plan.provenance["settled"] == "yes"
    assert few.plan.provenance["unchanged"] == f"{few.settled.unchanged:.3f}"
    assert RankPlan.load(plan_run.out / "plan.json") == few.plan
    assert made.plan.provenance["settled"] == ("yes" if made.settled.settled else "no")


def test_the_plan_says_how_far_halves_agree(plan_run: PlanRun, tmp_path: Path) -> None:
    made = plan(plan_run)  # of two trials and three texts
    for over in ("trials", "texts"):
        expected = split_half(made.scores, over=over)  # type: ignore[arg-type]
        assert made.plan.provenance[f"split_half_{over}"] == f"{expected:.3f}"
    single = {"out": tmp_path / "single", "probe": PerturbationSettings(trials=1)}
    alone = plan(plan_run.model_copy(update=single)).plan.provenance
    assert "split_half_texts" in alone
    assert "split_half_trials" not in alone


def test_saved_scores_are_planned_with_again(plan_run: PlanRun, tiny_base: Path, tmp_path: Path) -> None:
    first = plan(plan_run.model_copy(update={"compare": ("jacobian",)}))
    saved = plan_run.out / "scores.json"
    again = replan(Replan(scores=saved, out=tmp_path / "again", mean_rank=3, base=str(tiny_base)))
    assert again.plan == first.plan
    assert (tmp_path / "again" / "plan.json").read_bytes() == (plan_run.out / "plan.json").read_bytes()
    other = replan(
        Replan(scores=saved, out=tmp_path / "other", mean_rank=6, ties="kind", multiple=2, compare=("jacobian",))
    )
    ranks = {(name.rsplit(".", 1)[-1], row.rank) for name, row in other.plan.modules.items()}
    assert len(ranks) == len({kind for kind, _ in ranks})
    assert all(rank % 2 == 0 for _, rank in ranks)
    assert other.peers[0].scores == first.peers[0].scores
    config = FamilyRun(base=str(tiny_base), plan=tmp_path / "other" / "plan.json", out=tmp_path / "family")
    assert new_family(config).plan == other.plan


def test_a_private_probe_stays_private_when_planned_with_again(plan_run: PlanRun, tmp_path: Path) -> None:
    secret = tmp_path / "wards.txt"
    secret.write_text("the question is not who but why " * 20, encoding="utf-8")
    text = ProbeText(source=str(secret), sequences=2, tokens=6, public=False)
    plan(plan_run.model_copy(update={"text": text, "compare": ("jacobian",)}))
    again = replan(Replan(scores=plan_run.out / "scores-jacobian.json", out=tmp_path / "again", mean_rank=2))
    assert again.plan.provenance["probe_text"] == "private"
    assert again.plan.unaccounted == "the rank plan was probed on private text"


def test_planning_again_in_place_keeps_what_was_measured(plan_run: PlanRun) -> None:
    plan(plan_run.model_copy(update={"compare": ("jacobian",)}))
    measured = {path.name: path.read_bytes() for path in plan_run.out.glob("scores*.json")}
    assert measured.keys() == {"scores.json", "scores-jacobian.json"}
    again = replan(Replan(scores=plan_run.out / "scores.json", out=plan_run.out, mean_rank=2, overwrite=True))
    assert again.peers == ()
    assert RankPlan.load(plan_run.out / "plan.json") == again.plan
    assert {path.name: path.read_bytes() for path in plan_run.out.glob("scores*.json")} == measured


def test_scores_that_cannot_be_planned_with(plan_run: PlanRun, tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    made = plan(plan_run)
    saved, out = plan_run.out / "scores.json", tmp_path / "again"
    tiny_llama.model.norm.weight.data[0] += 1
    tiny_llama.save_pretrained(tmp_path / "changed")
    with pytest.raises(MismatchError, match="scores of 'base', whose weights are not those of 'changed'"):
        replan(Replan(scores=saved, out=out, mean_rank=3, base=str(tmp_path / "changed")))
    with pytest.raises(InputError, match=r"no scores-jacobian.json beside the scores, and 'jacobian' needs the model"):
        replan(Replan(scores=saved, out=out, mean_rank=3, compare=("jacobian",)))
    made.scores.save(plan_run.out / "scores-jacobian.json")
    with pytest.raises(MismatchError, match="another probe"):
        replan(Replan(scores=saved, out=out, mean_rank=3, compare=("jacobian",)))
    replace(made.scores, base=None).save(tmp_path / "nobody.json")
    with pytest.raises(InputError, match="does not say which base was probed"):
        replan(Replan(scores=tmp_path / "nobody.json", out=out, mean_rank=3))
    assert not out.exists()


def test_what_no_score_can_mend_is_said_before_the_probe(plan_run: PlanRun) -> None:
    def never(_description: str, _done: int, _total: int) -> None:
        raise AssertionError("probed")

    for changes, message in (
        ({"budget": Budget("total", 9), "mean_rank": None}, "below the"),
        ({"multiple": 64}, "no multiple of 64 is a rank"),
        ({"ties": "qk", "modules": ("q_proj",)}, "no planned module is a 'k_proj' to tie"),
        ({"compare": ("adalora",)}, "no such peer 'adalora'; choose among uniform"),
        ({"compare": ("perturbation",)}, "'perturbation' is in the comparison already"),
        ({"compare": ("uniform", "uniform")}, "'uniform' is in the comparison already"),
    ):
        with pytest.raises(InputError, match=message):
            plan(plan_run.model_copy(update=changes), never)


def test_no_rank_goes_to_a_layer_on_which_no_lora_acts(plan_run: PlanRun, tiny_base: Path) -> None:
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tiny_base)
    with pytest.raises(UnsupportedError, match=r"dt_proj: it is never called; leave this module out of the plan"):
        plan(plan_run)
    kinds = ("in_proj", "x_proj", "out_proj")
    assert set(plan(plan_run.model_copy(update={"modules": kinds})).plan.modules) == {
        f"backbone.layers.{layer}.mixer.{kind}" for layer in (0, 1) for kind in kinds
    }


def test_text_that_the_model_has_no_positions_for_is_told(plan_run: PlanRun, tiny_llama: LlamaForCausalLM) -> None:
    positions = tiny_llama.config.max_position_embeddings
    message = (
        rf"key 'text.tokens': a text has {positions + 1} tokens, the model {positions} positions; set it to at most"
    )
    with pytest.raises(InputError, match=message):
        plan(plan_run.model_copy(update={"text": ProbeText(sequences=2, tokens=positions + 1)}))
    assert not list(plan_run.out.parent.glob(".plan*"))


def test_texts_run_in_batches_of_the_size_that_is_asked_for(plan_run: PlanRun, tiny_llama: LlamaForCausalLM) -> None:
    tokenizer = load_tokenizer(plan_run.base)
    for batch, sizes in ((8, [3]), (2, [2, 1])):
        text = ProbeText(sequences=3, tokens=6, batch=batch)
        read = probe_inputs(plan_run.model_copy(update={"text": text}), tiny_llama, tokenizer)
        assert [len(ids) for ids in read.batches] == sizes


def test_a_budget_that_equal_scores_could_not_use_is_not_refused(plan_run: PlanRun) -> None:
    changes = {"mean_rank": 2, "multiple": 4, "rule": "floor"}
    made = plan(plan_run.model_copy(update=changes)).plan
    assert {module.rank % 4 for module in made.modules.values()} == {0}


def test_a_plan_of_another_base_makes_no_family(
    plan_run: PlanRun, tiny_base: Path, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    plan(plan_run)
    tiny_llama.model.norm.weight.data[0] += 1
    tiny_llama.save_pretrained(tmp_path / "changed")
    config = FamilyRun(base=str(tmp_path / "changed"), plan=plan_run.out / "plan.json", out=tmp_path / "family")
    with pytest.raises(MismatchError, match="made for 'base'"):
        new_family(config)
    assert not config.out.exists()


def test_a_plan_with_strange_modules_makes_no_family(
    tiny_base: Path, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    shapes = {f"{name}.x": shape for name, shape in linear_shapes(tiny_llama).items()}
    RankPlan.uniform(shapes, rank=1).save(tmp_path / "plan.json")
    with pytest.raises(MismatchError, match="no module"):
        new_family(FamilyRun(base=str(tiny_base), plan=tmp_path / "plan.json", out=tmp_path / "family"))


def test_an_unknown_key_of_a_family_is_named(tmp_path: Path) -> None:
    path = tmp_path / "family.toml"
    path.write_text('base = "b"\nplan = "p.json"\nout = "f"\nranks = 3\n')
    with pytest.raises(ConfigError, match="ranks"):
        load_toml(path, FamilyRun)
