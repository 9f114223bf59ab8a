import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.family import FamilyRun
from treadle.configs.plan import PlanRun, ProbeText, Replan
from treadle.errors import ConfigError, InputError, MismatchError, UnsupportedError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import load_tokenizer
from treadle.ranks.allocation import Budget
from treadle.ranks.controls import controls
from treadle.ranks.jacobian import JacobianSettings
from treadle.ranks.lowrank import LowRankSettings
from treadle.ranks.perturbation import PerturbationSettings
from treadle.ranks.probes import PROBES
from treadle.ranks.scores import ProbeScores
from treadle.ranks.stability import split_half
from treadle.recipes.family import new_family
from treadle.recipes.plan import plan, probe_inputs, replan
from treadle.recipes.rank_peers import CONTROLS
from treadle.toml import load_toml


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
    planned = plan(run)
    made, shapes = planned.plan, linear_shapes(tiny_llama)
    made.check(shapes)
    uniform = RankPlan.uniform(shapes, rank=3).count().total
    cheapest = min(shape.in_features + shape.out_features for shape in shapes.values())
    assert uniform - cheapest < made.count().total <= uniform
    assert len({module.rank for module in made.modules.values()}) > 1
    assert sorted(path.name for path in run.out.iterdir()) == ["plan.json", "scores.json"]
    assert RankPlan.load(run.out / "plan.json") == made
    scores = ProbeScores.load(run.out / "scores.json")
    assert scores == planned.scores
    assert scores.shapes() == shapes
    assert all(len(score.values) == 2 and len(score.values[0]) == 3 for score in scores.modules.values())


def test_the_plan_says_where_it_comes_from_and_names_no_folder(run: PlanRun, tmp_path: Path) -> None:
    made = plan(run).plan
    assert made.provenance["base"] == "small"
    assert made.provenance["probe_text"] == "public: pydoc"
    assert made.provenance["probe_text_sha256"] == ProbeScores.load(run.out / "scores.json").text_sha256
    assert json.loads(made.provenance["probe_settings"])["trials"] == 2
    assert all(str(tmp_path) not in (run.out / name).read_text() for name in ("plan.json", "scores.json"))


def test_the_same_seed_gives_the_same_plan(run: PlanRun, tmp_path: Path) -> None:
    first = plan(run).plan
    assert plan(run.model_copy(update={"out": tmp_path / "again"})).plan == first
    names = ("plan.json", "scores.json")
    assert all((run.out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    other = plan(run.model_copy(update={"out": tmp_path / "other", "seed": 1})).plan
    assert other.provenance["probe_text_sha256"] != first.provenance["probe_text_sha256"]


def test_kinds_budgets_and_rules_reach_the_plan(run: PlanRun) -> None:
    changes = {"modules": ("q_proj", "v_proj"), "mean_rank": None, "budget": Budget("ranks", 9), "maximum": 3}
    made = plan(run.model_copy(update=changes)).plan
    assert {name.rsplit(".", 1)[-1] for name in made.modules} == {"q_proj", "v_proj"}
    assert sum(module.rank for module in made.modules.values()) == 9
    assert max(module.rank for module in made.modules.values()) <= 3
    floor = plan(run.model_copy(update={**changes, "rule": "floor", "overwrite": True})).plan
    assert sum(module.rank for module in floor.modules.values()) + int(floor.provenance["lost"]) == 9


def test_private_text_is_marked_and_leaves_no_digest(run: PlanRun, tmp_path: Path) -> None:
    secret = tmp_path / "ward-seven.txt"
    secret.write_text("the question is not who but why " * 20, encoding="utf-8")
    text = ProbeText(source=str(secret), sequences=2, tokens=6, public=False)
    made = plan(run.model_copy(update={"text": text})).plan
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


def test_an_interrupted_probe_goes_on_where_it_stopped(run: PlanRun, tmp_path: Path) -> None:
    def interrupt(_description: str, done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(run, interrupt)
    assert not run.out.exists()
    assert not list(run.out.parent.glob(".plan*.part"))
    (begun,) = run.out.parent.glob(".plan.*.probe")
    measured = begun.read_bytes()
    resumed = plan(run)
    assert not begun.exists()
    assert measured
    assert plan(run.model_copy(update={"out": tmp_path / "at once"})).plan == resumed.plan


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
    path.write_text(TOML.replace('trials = 1\ncompare = "pristine"', "name = 'jacobian'\nprojections = 3"))
    assert load_toml(path, PlanRun).probe == JacobianSettings(projections=3)
    path.write_text(TOML.replace('budget = {unit = "trainable", value = 1000}', "mean_rank = 4\nties = [['q', 'k']]"))
    assert load_toml(path, PlanRun).allocation.ties == (("q", "k"),)
    assert (run.text.source, run.text.sequences, run.modules) == ("pydoc", 4, ("q_proj",))


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


def test_a_plan_becomes_a_family(run: PlanRun, base: Path, tmp_path: Path) -> None:
    made = plan(run).plan
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


def test_any_probe_makes_a_plan(run: PlanRun, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{40 + i}", "label": "yes"}) + "\n" for i in range(4)))
    examples = {"source": str(rows), "prompt": "say {text} .", "completion": " {label}"}
    for name in PROBES:
        if name == "eva":
            continue  # needs more rows of input than this little text has, and says so
        table = {"probe": {"name": name}, "text": {"sequences": 2, "tokens": 8}, "out": tmp_path / name}
        if name == "gradient":
            table |= {"examples": examples, "text": {"sequences": 2, "tokens": 8, "public": True}}
        made = plan(PlanRun.model_validate(dict(run) | table)).plan
        assert made.provenance["probe"] == name
        assert made.provenance["probe_text"] == ("public: file" if name == "gradient" else "public: pydoc")


def test_trials_are_added_until_the_ranks_settle(run: PlanRun) -> None:
    table = {"probe": {"name": "jacobian"}, "settle": {"first": 2, "step": 2, "maximum": 6, "confidence": 1.0}}
    made = plan(PlanRun.model_validate(dict(run) | table))
    trials = {len(score.values) for score in made.scores.modules.values()}
    assert trials <= {2, 4, 6}
    most = trials.pop()
    assert json.loads(made.plan.provenance["probe_settings"])["projections"] == most
    assert made.settled is not None
    assert made.settled.trials == most
    assert made.settled.settled == (made.settled.unchanged == 1.0)
    eager = {"settle": {"first": 2, "step": 2, "maximum": 6, "confidence": 0.01, "moving": 0.9}}
    few = plan(PlanRun.model_validate(dict(run) | eager | {"overwrite": True}))
    assert json.loads(few.plan.provenance["probe_settings"])["trials"] == 2
    assert few.settled is not None
    assert few.settled.settled
    assert few.plan.provenance["settled"] == "yes"
    assert few.plan.provenance["unchanged"] == f"{few.settled.unchanged:.3f}"
    assert RankPlan.load(run.out / "plan.json") == few.plan
    assert made.plan.provenance["settled"] == ("yes" if made.settled.settled else "no")


def test_the_plan_says_how_far_halves_agree(run: PlanRun, tmp_path: Path) -> None:
    made = plan(run)  # of two trials and three texts
    for over in ("trials", "texts"):
        expected = split_half(made.scores, over=over)  # type: ignore[arg-type]
        assert made.plan.provenance[f"split_half_{over}"] == f"{expected:.3f}"
    single = {"out": tmp_path / "single", "probe": PerturbationSettings(trials=1)}
    alone = plan(run.model_copy(update=single)).plan.provenance
    assert "split_half_texts" in alone
    assert "split_half_trials" not in alone


def test_the_uniform_peer_is_uniform_whatever_rule_the_plan_goes_by(run: PlanRun) -> None:
    (peer,) = plan(run.model_copy(update={"compare": ("uniform",), "rule": "sqrt-per-parameter"})).peers
    assert max(peer.ranks.values()) - min(peer.ranks.values()) <= 1  # the rest of a budget raises some by one


def test_peers_share_out_the_same_budget(run: PlanRun) -> None:
    names = ("uniform", "shuffled", "shuffled-in-shape", "reversed", "floor", "sqrt", "jacobian", "eva")
    text = ProbeText(sequences=8, tokens=16)  # of which EVA has rows enough for twice the mean rank
    made = plan(run.model_copy(update={"compare": names, "text": text}))
    peers = {peer.name: peer for peer in made.peers}
    assert tuple(peers) == names
    assert tuple(controls(made.scores, seed=0)) == CONTROLS
    spent = {name: peer.parameters for name, peer in peers.items()}
    total = made.plan.count().total
    cheapest = min(shape.in_features + shape.out_features for shape in made.scores.shapes().values())
    limit = int(made.plan.provenance["budget"].split()[0])
    assert all(limit - cheapest < spent[name] <= limit for name in names if name != "floor")
    assert spent["floor"] <= limit
    assert peers["uniform"].rank_correlation is None or abs(peers["uniform"].rank_correlation) < 1
    assert peers["uniform"].scores is peers["floor"].scores is peers["floor"].score_correlation is None
    assert 0 < peers["sqrt"].moved < peers["uniform"].moved  # roots lie between the scores and all the same
    assert peers["reversed"].rank_correlation is not None
    assert peers["reversed"].rank_correlation < 0
    assert peers["jacobian"].scores is not None
    assert peers["jacobian"].score_correlation is not None
    sizes = {name: shape.in_features + shape.out_features for name, shape in made.scores.shapes().items()}
    for peer in made.peers:
        own = {name: row.rank for name, row in made.plan.modules.items()}
        gained = sum(sizes[n] * max(0, rank - own.get(n, 0)) for n, rank in peer.ranks.items())
        assert gained - peer.moved == peer.parameters - total  # what one side lacks, the other has
    assert sorted(path.name for path in run.out.iterdir()) == [
        "plan.json",
        "scores-eva.json",
        "scores-jacobian.json",
        "scores.json",
    ]


def test_peers_compare_what_the_plan_compares(run: PlanRun, tmp_path: Path) -> None:
    own = PerturbationSettings(trials=1, output="all", metric="l2")
    made = plan(run.model_copy(update={"probe": own, "compare": ("jacobian", "perturbation-lowrank")}))
    settings = {peer.name: dict(peer.scores.settings) for peer in made.peers if peer.scores is not None}
    assert settings == {
        "jacobian": asdict(JacobianSettings(output="all")),
        "perturbation-lowrank": asdict(LowRankSettings(output="all", metric="l2")),
    }
    saved = run.out / "scores.json"
    assert replan(Replan(scores=saved, out=tmp_path / "again", mean_rank=3, compare=("jacobian",))).peers
    last = run.model_copy(update={"out": tmp_path / "last", "probe": JacobianSettings(), "compare": ()})
    plan(last)
    shutil.copy(last.out / "scores.json", run.out / "scores-jacobian.json")
    with pytest.raises(MismatchError, match=r"scores-jacobian.json: measured with other settings \(output\)"):
        replan(Replan(scores=saved, out=tmp_path / "other", mean_rank=3, compare=("jacobian",)))


def test_a_peer_that_cannot_be_made_costs_the_plan_nothing(run: PlanRun) -> None:
    names = ("gradient", "uniform", "eva", "jacobian")  # without answers, and with too few rows
    text = ProbeText(sequences=3, tokens=5, batch=1)
    made = plan(run.model_copy(update={"compare": names, "text": text}))
    assert [peer.name for peer in made.peers] == ["uniform", "jacobian"]
    assert set(made.cannot) == {"gradient", "eva"}
    assert made.cannot["gradient"].startswith("the gradient probe needs labels; ")
    assert "use larger batches (text.batch)" in made.cannot["eva"]
    assert RankPlan.load(run.out / "plan.json") == made.plan
    assert not list(run.out.parent.glob(".plan.*"))


def test_rules_that_buy_nothing_cost_the_plan_nothing(run: PlanRun) -> None:
    made = plan(run.model_copy(update={"mean_rank": None, "budget": Budget("ranks", 1), "minimum": 0, "multiple": 1,
                                       "compare": ("floor", "ranking")}))  # fmt: skip
    assert [peer.name for peer in made.peers] == ["ranking"]
    assert "buys not one rank" in made.cannot["floor"]


def test_scores_of_other_text_are_no_peers(run: PlanRun, tmp_path: Path) -> None:
    plan(run.model_copy(update={"compare": ("jacobian",)}))
    other = {"out": tmp_path / "other", "probe": JacobianSettings(), "text": ProbeText(sequences=3, tokens=5)}
    plan(run.model_copy(update=other))
    shutil.copy(tmp_path / "other" / "scores.json", run.out / "scores-jacobian.json")
    with pytest.raises(MismatchError, match=r"scores-jacobian.json: measured with other settings \(seed or text\)"):
        replan(Replan(scores=run.out / "scores.json", out=tmp_path / "again", mean_rank=3, compare=("jacobian",)))


def test_a_peers_scores_are_held_against_the_plans_own(run: PlanRun, tmp_path: Path) -> None:
    first = plan(run.model_copy(update={"compare": ("jacobian",), "probe": PerturbationSettings()}))
    saved = run.out / "scores-jacobian.json"
    (peer,) = replan(Replan(scores=saved, out=tmp_path / "again", mean_rank=3, compare=("perturbation",))).peers
    assert peer.scores == first.scores


def test_what_an_interrupted_peer_has_left_goes_with_the_next_plan(run: PlanRun, tmp_path: Path) -> None:
    left, foreign = tmp_path / ".plan.jacobian.probe", tmp_path / ".plan.b.jacobian.probe"
    for path in (left, foreign):
        path.write_bytes(b"{}\n")
    plan(run)
    assert (left.exists(), foreign.exists()) == (False, True)  # the second is a probe's of a plan "plan.b"


def test_saved_scores_are_planned_with_again(run: PlanRun, base: Path, tmp_path: Path) -> None:
    first = plan(run.model_copy(update={"compare": ("jacobian",)}))
    saved = run.out / "scores.json"
    again = replan(Replan(scores=saved, out=tmp_path / "again", mean_rank=3, base=str(base)))
    assert again.plan == first.plan
    assert (tmp_path / "again" / "plan.json").read_bytes() == (run.out / "plan.json").read_bytes()
    other = replan(
        Replan(scores=saved, out=tmp_path / "other", mean_rank=6, ties="kind", multiple=2, compare=("jacobian",))
    )
    ranks = {(name.rsplit(".", 1)[-1], row.rank) for name, row in other.plan.modules.items()}
    assert len(ranks) == len({kind for kind, _ in ranks})
    assert all(rank % 2 == 0 for _, rank in ranks)
    assert other.peers[0].scores == first.peers[0].scores
    config = FamilyRun(base=str(base), plan=tmp_path / "other" / "plan.json", out=tmp_path / "family")
    assert new_family(config).plan == other.plan


def test_a_private_probe_stays_private_when_planned_with_again(run: PlanRun, tmp_path: Path) -> None:
    secret = tmp_path / "wards.txt"
    secret.write_text("the question is not who but why " * 20, encoding="utf-8")
    text = ProbeText(source=str(secret), sequences=2, tokens=6, public=False)
    plan(run.model_copy(update={"text": text, "compare": ("jacobian",)}))
    again = replan(Replan(scores=run.out / "scores-jacobian.json", out=tmp_path / "again", mean_rank=2))
    assert again.plan.provenance["probe_text"] == "private"
    assert again.plan.unaccounted == "the rank plan was probed on private text"


def test_scores_at_another_mean_rank_are_no_peers(run: PlanRun, tmp_path: Path) -> None:
    text = ProbeText(sequences=8, tokens=16)  # of which EVA has rows enough
    plan(run.model_copy(update={"text": text, "compare": ("eva",)}))
    saved, out = run.out / "scores.json", tmp_path / "again"
    with pytest.raises(
        MismatchError, match=r"scores-eva.json: measured with other settings \(rank\); run treadle plan"
    ):
        replan(Replan(scores=saved, out=out, mean_rank=4, compare=("eva",)))
    assert not out.exists()
    assert replan(Replan(scores=saved, out=out, mean_rank=3, compare=("eva",))).peers[0].name == "eva"


def test_planning_again_in_place_keeps_what_was_measured(run: PlanRun) -> None:
    plan(run.model_copy(update={"compare": ("jacobian",)}))
    measured = {path.name: path.read_bytes() for path in run.out.glob("scores*.json")}
    assert measured.keys() == {"scores.json", "scores-jacobian.json"}
    again = replan(Replan(scores=run.out / "scores.json", out=run.out, mean_rank=2, overwrite=True))
    assert again.peers == ()
    assert RankPlan.load(run.out / "plan.json") == again.plan
    assert {path.name: path.read_bytes() for path in run.out.glob("scores*.json")} == measured


def test_scores_that_cannot_be_planned_with(run: PlanRun, tmp_path: Path, tiny_llama: LlamaForCausalLM) -> None:
    made = plan(run)
    saved, out = run.out / "scores.json", tmp_path / "again"
    tiny_llama.model.norm.weight.data[0] += 1
    tiny_llama.save_pretrained(tmp_path / "changed")
    with pytest.raises(MismatchError, match="scores of 'small', whose weights are not those of 'changed'"):
        replan(Replan(scores=saved, out=out, mean_rank=3, base=str(tmp_path / "changed")))
    with pytest.raises(InputError, match=r"no scores-jacobian.json beside the scores, and 'jacobian' needs the model"):
        replan(Replan(scores=saved, out=out, mean_rank=3, compare=("jacobian",)))
    made.scores.save(run.out / "scores-jacobian.json")
    with pytest.raises(MismatchError, match="another probe"):
        replan(Replan(scores=saved, out=out, mean_rank=3, compare=("jacobian",)))
    replace(made.scores, base=None).save(tmp_path / "nobody.json")
    with pytest.raises(InputError, match="does not say which base was probed"):
        replan(Replan(scores=tmp_path / "nobody.json", out=out, mean_rank=3))
    assert not out.exists()


def test_what_no_score_can_mend_is_said_before_the_probe(run: PlanRun) -> None:
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
            plan(run.model_copy(update=changes), never)


def test_no_rank_goes_to_a_layer_on_which_no_lora_acts(run: PlanRun, base: Path) -> None:
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(base)
    with pytest.raises(UnsupportedError, match=r"dt_proj: it is never called; leave this module out of the plan"):
        plan(run)
    kinds = ("in_proj", "x_proj", "out_proj")
    assert set(plan(run.model_copy(update={"modules": kinds})).plan.modules) == {
        f"backbone.layers.{layer}.mixer.{kind}" for layer in (0, 1) for kind in kinds
    }


def test_text_that_the_model_has_no_positions_for_is_told(run: PlanRun, tiny_llama: LlamaForCausalLM) -> None:
    positions = tiny_llama.config.max_position_embeddings
    message = (
        rf"key 'text.tokens': a text has {positions + 1} tokens, the model {positions} positions; set it to at most"
    )
    with pytest.raises(InputError, match=message):
        plan(run.model_copy(update={"text": ProbeText(sequences=2, tokens=positions + 1)}))
    assert not list(run.out.parent.glob(".plan*"))


def test_texts_run_in_batches_of_the_size_that_is_asked_for(run: PlanRun, tiny_llama: LlamaForCausalLM) -> None:
    tokenizer = load_tokenizer(run.base)
    for batch, sizes in ((8, [3]), (2, [2, 1])):
        text = ProbeText(sequences=3, tokens=6, batch=batch)
        read = probe_inputs(run.model_copy(update={"text": text}), tiny_llama, tokenizer)
        assert [len(ids) for ids in read.batches] == sizes


def test_a_budget_that_equal_scores_could_not_use_is_not_refused(run: PlanRun) -> None:
    changes = {"mean_rank": 2, "multiple": 4, "rule": "floor"}
    made = plan(run.model_copy(update=changes)).plan
    assert {module.rank % 4 for module in made.modules.values()} == {0}


def test_fewer_ranks_than_modules_are_held_against_uniform_ones(run: PlanRun) -> None:
    changes = {"mean_rank": None, "budget": Budget("ranks", 10), "rule": "floor", "compare": ("uniform",)}
    made = plan(run.model_copy(update=changes))
    (peer,) = made.peers
    assert len(peer.ranks) == len(made.scores.modules) == 14
    assert sorted(peer.ranks.values()) == [0] * 4 + [1] * 10


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
