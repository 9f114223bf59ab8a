"""`treadle federate pilot`: a run's settings from public rows, thresholds that stand beforehand, and an honest no."""

import json
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from treadle.cli.app import app
from treadle.configs.federate import FederateRun
from treadle.configs.pilot import PilotRun
from treadle.errors import ConfigError, FormatError, InputError, MismatchError, TreadleError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.heads import with_head
from treadle.models.loading import load_model, load_tokenizer
from treadle.privacy.accounting import calibrated_noise_multiplier
from treadle.privacy.ledger import Ledger
from treadle.recipes.federate import federate_in_process, run_of
from treadle.recipes.pilot import TRIALS, pilot
from treadle.recipes.pilot_result import Noise, PilotResult, Point, Trial, Tried
from treadle.toml import checked, load_toml, toml_text
from treadle.train.rows import shuffled

runner = CliRunner()

RUN = """
base = "{root}/base"
plan = "{root}/plan.json"
out = "{root}/pilot"
[data]
source = "{root}/public.jsonl"
prompt = "{{text}}"
completion = "{{label}}"
[grid]
init = ["kaiming"]
learning_rate = [0.5, 2.0]
max_grad_norm = [1.0]
epsilon = ["none", 2.0]
[trials]
rounds = 2
clients = 2
held_out = 20
delta = 1e-3
seeds = [1, 2]
[go]
accuracy = 0.0
epsilon = 8.0
[run]
name = "signs"
out = "{root}/signs"
silos = ["{root}/north.toml", "{root}/south.toml"]
records = 40
[run.work]
rounds = 3
expected_batch = 4
local_steps = 2
max_length = 32
[run.rules]
clients = ["north", "south"]
pause = 0
"""

SILO = """
name = "{name}"
base = "{root}/base"
folder = "{root}/{name}"
[data]
source = "{root}/{name}.jsonl"
prompt = "{{text}}"
completion = "{{label}}"
[privacy]
epsilon = 4.0
delta = 1e-3
records = 12
[ledger]
path = "{root}/{name}.ledger"
data = "{name}-signs"
epsilon = 100.0
"""


def rows(count: int, begin: int) -> str:
    lines = [{"text": f"w{begin + i % 40} film", "label": ("bad", "good")[i % 2]} for i in range(count)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def world(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A classifier, its plan, sixty public rows, two silos with ledgers, and a pilot's TOML."""
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    with_head(str(folder / "encoder"), folder / "base", labels=["bad", "good"], seed=0)
    kinds = ["query", "value"]
    RankPlan.uniform(linear_shapes(load_model(str(folder / "base")), kinds), rank=2).save(folder / "plan.json")
    (folder / "public.jsonl").write_text(rows(60, 40))
    for place, name in enumerate(("north", "south")):
        (folder / f"{name}.jsonl").write_text(rows(12 + place, 50))
        (folder / f"{name}.toml").write_text(SILO.format(root=folder, name=name))
        Ledger.create(folder / f"{name}.ledger")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> tuple[Path, PilotResult]:
    """Such a folder, and what the pilot found in it; tests leave the pilot's folder as it is."""
    root = world(tmp_path_factory.mktemp("pilot"), tiny_tokenizer)
    return root, pilot(configured(root))


@pytest.fixture
def root(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Such a folder for a test of its own."""
    return world(tmp_path, tiny_tokenizer)


SMALL = (
    ("learning_rate = [0.5, 2.0]", "learning_rate = [0.5]"),
    ('epsilon = ["none", 2.0]', "epsilon = [2.0]"),
)
"""One point at one ε."""


def written(root: Path, *changes: tuple[str, str]) -> Path:
    text = RUN.format(root=root)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (root / "pilot.toml").write_text(text)
    return root / "pilot.toml"


def configured(root: Path, *changes: tuple[str, str]) -> PilotRun:
    return load_toml(written(root, *changes), PilotRun)


def test_a_pilot_ends_in_a_run_that_can_be_started(made: tuple[Path, PilotResult]) -> None:
    root, found = made
    assert [row.epsilon for row in found.curve] == [2.0, "none"]
    assert len(found.searched) == 2 * 2
    assert all(len(row.tried) == 2 for row in found.curve)
    assert found.go
    assert found.decided.epsilon == 2.0  # the smallest that may go
    run = load_toml(root / "pilot" / "run.toml", FederateRun)
    assert run.work.learning_rate == found.decided.point.learning_rate
    assert run.work.max_grad_norm == 1.0
    assert (run.work.rounds, run.work.local_steps, run.name) == (3, 2, "signs")
    assert run_of(run, resume=False)[0].family.fingerprint == AdapterFamily.load(run.family).fingerprint
    reports = federate_in_process(run).reports
    assert len(reports) == 3
    sizes = [max(row.up + row.down for row in report.clients) for report in reports]
    assert sizes[0] < sizes[1]  # B is zeros in the first round, and Flower sends equal tensors once
    assert found.decided.round_bytes == pytest.approx(max(sizes), abs=50), (found.decided.round_bytes, sizes)


def test_what_a_pilot_reports_is_measured(made: tuple[Path, PilotResult]) -> None:
    root, found = made
    strict = found.curve[0]
    B = sum(row.out_features * row.rank for row in RankPlan.load(root / "plan.json").modules.values())
    # Two tensors of float32 cross in a round, and heads of Flower's messages and arrays, some 150 bytes a module.
    assert 2 * 4 * B < strict.round_bytes < 2 * 4 * B + 20_000
    assert strict.step_seconds > 0
    assert strict.memory > 50e6  # torch alone holds more
    for noise, rate, steps in ((strict.noise, 4 / 20, 2 * 2), (strict.noise_of_run, 4 / 40, 3 * 2)):
        wanted = calibrated_noise_multiplier(epsilon=2.0, delta=1e-3, sample_rate=rate, steps=steps)
        assert noise is not None
        assert noise.multiplier == pytest.approx(wanted, rel=1e-6)
    assert found.curve[1].noise == Noise(0.0, None)
    signal = found.signals["kaiming"]
    assert (signal.rows, signal.size) == (40, B)
    assert strict.noise is not None
    steps = signal.to_noise(1.0, strict.noise.multiplier, batch=4, steps=2 * 2, clients=2)
    assert strict.noise.signal == pytest.approx(steps)
    assert 0.0 <= strict.accuracy.low <= strict.accuracy.estimate <= strict.accuracy.high <= 1.0
    assert strict.accuracy.high - strict.accuracy.low > 0.25  # Wilson's alone, over ten rows, is at least 0.27 wide
    assert all(trial.spent is None for trial in found.searched)


def test_no_private_row_is_read_and_nothing_is_spent(root: Path) -> None:
    for name in ("north", "south"):
        (root / f"{name}.jsonl").unlink()
        (root / f"{name}.ledger").unlink()
        (root / f"{name}.toml").unlink()
    assert pilot(configured(root, *SMALL)).go


def test_the_same_seeds_find_the_same(root: Path) -> None:
    first = pilot(configured(root, *SMALL))
    second = pilot(configured(root, *SMALL, (f'out = "{root}/pilot"', f'out = "{root}/again"')))
    assert first.curve[0].accuracy == second.curve[0].accuracy
    assert [row.accuracy for row in first.searched] == [row.accuracy for row in second.searched]


def test_a_missed_threshold_is_no_go_and_leaves_no_run(root: Path) -> None:
    found = pilot(configured(root, SMALL[0], ("accuracy = 0.0", "accuracy = 0.99\nround_bytes = 10")))
    assert not found.go
    assert found.run is None
    assert found.decided.epsilon == 2.0  # "none" would not be acceptable
    assert {check.name for check in found.checks if not check.holds} == {"accuracy", "round_bytes"}
    assert not (root / "pilot" / "run.toml").exists()


def test_thresholds_stand_beforehand(made: tuple[Path, PilotResult]) -> None:
    root, _ = made
    with pytest.raises(MismatchError, match=r"\[go\] is not what it was when the first trial was made"):
        pilot(configured(root, ("accuracy = 0.0", "accuracy = 0.1")))


def test_a_pilot_that_was_cut_short_makes_only_the_rest(made: tuple[Path, PilotResult]) -> None:
    root, whole = made
    told = list[str]()
    path = root / "pilot" / TRIALS
    lines = path.read_bytes().split(b"\n")  # the last of them is empty
    path.write_bytes(b"\n".join(lines[:-3]) + b"\n" + lines[-3][:40])  # a writer died in the last line but one
    again = pilot(configured(root), lambda description, done, total: told.append(description))
    assert [row.accuracy for row in again.curve] == [row.accuracy for row in whole.curve]
    assert sum("seed" in line for line in told) == 2


def test_a_rate_that_breaks_the_factors_is_a_failed_trial(root: Path) -> None:
    found = pilot(configured(root, SMALL[1], ("learning_rate = [0.5, 2.0]", "learning_rate = [0.5, 1e38]")))
    failed = [row for row in found.searched if row.failed]
    assert {row.trial.point.learning_rate for row in failed} == {1e38}
    assert {row.accuracy for row in failed} == {0.0}
    assert all(row.point.learning_rate == 0.5 for row in found.curve)


def test_a_private_pilot_pays_for_every_trial(root: Path) -> None:
    changes = (('epsilon = ["none", 2.0]\n', ""), ("[data]", "private = true\n[data]"))
    found = pilot(configured(root, *changes))
    trials = [*found.searched, *found.curve[0].tried]
    assert [row.epsilon for row in found.curve] == [4.0]
    assert found.signals == {}  # of private rows they would be a release
    spent = [trial.spent or 0.0 for trial in trials]
    assert spent == sorted(spent)
    assert 0 < spent[0] <= 4.0 < spent[-1] <= 16.0  # four runs of at most 4 each compose
    statement = Ledger.open(root / "north.ledger").statements()[0]
    assert len(statement.runs) == len(trials) == 4


def test_a_private_pilot_stops_where_a_ledger_refuses(root: Path) -> None:
    for name in ("north", "south"):
        text = (root / f"{name}.toml").read_text()
        (root / f"{name}.toml").write_text(text.replace("epsilon = 100.0", "epsilon = 4.5"))
    changes = (('epsilon = ["none", 2.0]\n', ""), ("[data]", "private = true\n[data]"))
    with pytest.raises(TreadleError):
        pilot(configured(root, *changes))
    assert Ledger.open(root / "north.ledger").spent("north-signs") <= 4.5


def test_a_language_model_is_judged_by_what_it_would_write(
    root: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama.save_pretrained(root / "causal")
    tiny_tokenizer.save_pretrained(root / "causal")
    RankPlan.uniform(linear_shapes(tiny_llama, ["q_proj"]), rank=2).save(root / "plan.json")
    found = pilot(
        configured(root, ("/base", "/causal"), ('completion = "{label}"', 'completion = " {label}"'),
                   *SMALL)
    )  # fmt: skip
    assert len(found.curve) == 1
    assert 0.0 <= found.curve[0].accuracy.estimate <= 1.0


def accuracy_untrained(root: Path) -> float:
    """Of the base without an adapter, on the second half of the rows held out, one row at a time."""
    model, tokenizer = load_model(str(root / "base")), load_tokenizer(str(root / "base"))
    public = [json.loads(line) for line in (root / "public.jsonl").read_text().splitlines()]
    judging = [public[place] for place in shuffled(len(public), 0, "held out")[10:20]]
    best = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in judging]
    return sum(model.config.id2label[n] == row["label"] for n, row in zip(best, judging, strict=True)) / len(judging)


def test_the_page_and_the_command(made: tuple[Path, PilotResult]) -> None:
    root, _ = made
    configured(root)
    result = runner.invoke(app, ["federate", "pilot", str(root / "pilot.toml"), "--json"])
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["go"] is True
    assert content["untrained"] == accuracy_untrained(root)
    assert {row["epsilon"] for row in content["curve"]} == {2.0, "none"}
    page = (root / "pilot" / "pilot.html").read_text()
    assert "signs: go" in page
    assert "so that the search has cost no ε" in page
    assert f"untrained, has {content['untrained']:.3f} on the same rows" in page
    assert "Rows' gradients before training" in page
    assert 0 < content["signals"]["kaiming"]["norms"][0] <= content["signals"]["kaiming"]["norms"][2]
    assert "<script" not in page
    assert tomllib.loads((root / "pilot" / "run.toml").read_text())["name"] == "signs"
    plain = runner.invoke(app, ["federate", "pilot", str(root / "pilot.toml")])
    assert "go at ε 2" in plain.stdout


def test_no_go_is_an_exit_code(root: Path) -> None:
    configured(root, *SMALL, ("accuracy = 0.0", "accuracy = 1.0"))
    result = runner.invoke(app, ["federate", "pilot", str(root / "pilot.toml")])
    assert result.exit_code == 1
    assert "no go" in result.stdout
    assert "accuracy is" in result.stderr


WRONG = {
    "tuning seed": ("seeds = [1, 2]", "seeds = [0, 1]", "tuning_seed is one of the seeds that are reported"),
    "no epsilon": ('epsilon = ["none", 2.0]\n', "", "grid.epsilon is missing"),
    "nothing may go": ("epsilon = 8.0", "epsilon = 0.5", "no grid.epsilon is within go.epsilon"),
    "negative epsilon": ('["none", 2.0]', '["none", -2.0]', "key 'grid.epsilon.1"),
    "private with its own epsilon": ("[data]", "private = true\n[data]", "a private pilot needs run.silos, and no"),
    "twice": ("[0.5, 2.0]", "[0.5, 0.5]", "learning_rate names a value twice"),
    "text for nobody": ("[grid]", '[text]\nsource = "pydoc"\n[grid]', "[text] is for init 'public-pca'"),
    "no such init": ('["kaiming"]', '["pissa"]', "key 'grid.init.0'"),
    "accuracy above 1": ("accuracy = 0.0", "accuracy = 70", "key 'go.accuracy'"),
    "neither silos nor a server": ("silos = [", "#", "give either silos, to run them on this machine, or superlink"),
    "batch of none": ("expected_batch = 4", "expected_batch = 0", "expected_batch is 0; it must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_pilots_toml_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    old, new, said = WRONG[name]
    result = runner.invoke(app, ["federate", "pilot", str(written(tmp_path, (old, new)))])
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr
    assert not (tmp_path / "pilot").exists()


def test_too_few_rows(root: Path) -> None:
    with pytest.raises(InputError, match=r"60 public rows are fewer than .* need \(62\)"):
        pilot(configured(root, ("held_out = 20", "held_out = 60")))
    with pytest.raises(ConfigError, match="expected_batch is 30; it must be from 1 to records = 20"):
        pilot(configured(root, ("expected_batch = 4", "expected_batch = 30"), ("kaiming", "orthonormal")))


def test_a_delta_too_large_for_the_rows(root: Path) -> None:
    with pytest.raises(ConfigError, match="delta is 0.1; it must be below 1/records"):
        pilot(configured(root, ("delta = 1e-3", "delta = 0.1")))


def test_a_trial_is_what_its_line_says() -> None:
    tried = Tried(Trial(Point("kaiming", 0.5, 1.0), "none", 3, "search"), 0.5, 10, 0.1, 20, None, "")
    assert Tried.of_json(json.loads(json.dumps(asdict(tried))), where="trials") == tried
    with pytest.raises(FormatError, match="trials: no trial of a pilot"):
        Tried.of_json({"trial": {}}, where="trials")


def test_the_pilot_of_the_documentation_is_sound() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "federated.md").read_text()
    block = next(text for text in page.split("```") if text.startswith("toml\nbase = "))
    config = checked(tomllib.loads(block.removeprefix("toml\n")), PilotRun, where="docs")
    assert config.go.epsilon == 8.0


def test_what_is_written_as_toml_is_read_again() -> None:
    content = {
        "text": 'a "quoted" \\ line\n\x7fé',
        "numbers": [1, 2.5, 1e-30],
        "yes": True,
        "table": {"odd key": 1, "inner": {"empty": {}, "names": ["a", "b"]}},
    }
    assert tomllib.loads(toml_text({**content, "nothing": None})) == content | {
        "table": {"odd key": 1, "inner": {"names": ["a", "b"]}}
    }
