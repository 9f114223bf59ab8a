"""`treadle train`: one TOML in, one PEFT folder out, or one line that says why not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import LlamaForCausalLM

from treadle.configs.train import TrainRun
from treadle.errors import BudgetError, ConfigError, InputError, MismatchError, TreadleError
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.privacy.accounting import MechanismEvent
from treadle.privacy.ledger import Budget, Ledger, ReleaseKey
from treadle.recipes.train import train_adapter
from treadle.toml import load_toml

TOML = """
base = "{root}/base"
family = "{root}/family"
name = "signs"
out = "{root}/adapters/signs"
{top}
[data]
source = "{root}/signs.jsonl"
prompt = "question {{text}} answer"
completion = " {{label}}"
{data}
[sft]
learning_rate = 0.01
batch_size = 4
{sft}
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def root(tmp_path: Path, tiny_base: Path, tiny_llama: LlamaForCausalLM) -> Path:
    """A folder with a base, a family of it and twelve rows."""
    plan = RankPlan.uniform(linear_shapes(tiny_llama), rank=2)
    AdapterFamily.create(base=str(tiny_base), plan=plan, seed=4).save(tmp_path / "family")
    rows = [{"text": f"w{40 + i}", "label": "good" if i % 2 else "bad"} for i in range(12)]
    (tmp_path / "signs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


Configure = Callable[..., TrainRun]


@pytest.fixture
def configure(root: Path) -> Configure:
    """A function from lines for three places of the TOML to the configuration."""

    def write(*, top: str = "", data: str = "", sft: str = "") -> TrainRun:
        (root / "run.toml").write_text(TOML.format(root=root, top=top, data=data, sft=sft))
        return load_toml(root / "run.toml", TrainRun)

    return write


def test_a_run_leaves_an_adapter_and_nothing_else(root: Path, configure: Configure) -> None:
    seen: list[str] = []
    made = train_adapter(configure(), lambda text, _, __: seen.append(text))
    assert any("tokens/s" in text for text in seen)
    assert {file.name for file in (root / "adapters" / "signs").iterdir()} >= {"adapter_config.json", "treadle.json"}
    assert not (root / "adapters" / ".signs.checkpoint").exists()
    family = AdapterFamily.load(root / "family")
    stored = Adapter.load(root / "adapters" / "signs", family=family)
    assert (stored.name, stored.family, stored.provenance.data) == ("signs", family.fingerprint, "signs.jsonl")
    assert all(torch.equal(B, made.adapter.lora_B[name]) for name, B in stored.lora_B.items())
    assert made.result.examples == 12


def test_private_data_leave_no_digest_and_no_path(root: Path, configure: Configure) -> None:
    train_adapter(configure())
    text = (root / "adapters" / "signs" / "treadle.json").read_text()
    provenance = json.loads(text)["provenance"]
    assert provenance["data_sha256"] is None
    assert str(root) not in json.dumps(provenance)


def test_public_data_are_named_by_their_digest(configure: Configure) -> None:
    made = train_adapter(configure(top="public = true", data='name = "film-signs"'))
    assert made.adapter.provenance.data == "film-signs"
    assert made.adapter.provenance.data_sha256 is not None


def test_a_share_of_bare_prompts_changes_the_adapter(configure: Configure) -> None:
    full = train_adapter(configure())
    half = train_adapter(configure(top="bare_share = 0.5\noverwrite = true", data='bare = "{text}"'))
    assert half.result.tokens == full.result.tokens - 6 * 2  # "question" and "answer" are missing from six


def test_a_share_of_variants_takes_turns(configure: Configure) -> None:
    full = train_adapter(configure())
    top, data = (
        "variant_share = 0.5\noverwrite = true",
        'variants = ["{text}", "question question question {text} answer"]',
    )
    mixed = train_adapter(configure(top=top, data=data))
    assert mixed.result.examples == 12
    change = mixed.result.tokens - full.result.tokens  # the first variant lacks two tokens, the second has two more
    assert change in {2 * second - 2 * (6 - second) for second in range(1, 6)}


def test_a_task_is_data_too(root: Path, configure: Configure) -> None:
    task = """
name = "signs"
summary = "Which sign?"
prompt = "question {text} answer"
paraphrases = ["{text} : answer", "question : {text}"]
bare = "{text}"
completion = " {label}"
metric = { kind = "exact-match", field = "label", max_new_tokens = 2 }
data = { train = "signs.jsonl" }
"""
    (root / "signs.toml").write_text(task)
    configure()
    text = (root / "run.toml").read_text()
    begin, end = text.index("[data]"), text.index("[sft]")
    (root / "run.toml").write_text(
        f'{text[:begin]}[data]\ntask = "{root}/signs.toml"\nroot = "{root}"\nlimit = 7\n{text[end:]}'
    )
    made = train_adapter(load_toml(root / "run.toml", TrainRun))
    assert (made.adapter.provenance.data, made.result.examples) == ("signs", 7)


def test_a_run_cut_short_is_continued_and_its_checkpoint_belongs_to_it(root: Path, configure: Configure) -> None:
    unbroken = train_adapter(configure())

    class StoppedError(Exception):
        pass

    def stop(text: str, done: int, _: int) -> None:
        if "tokens/s" in text and done == 2:
            raise StoppedError

    often = "checkpoint_seconds = 0"
    with pytest.raises(StoppedError):
        train_adapter(configure(top="overwrite = true", sft=often), stop)
    with pytest.raises(MismatchError, match="the checkpoint's seed is 0, this run's 1"):
        train_adapter(configure(top="overwrite = true", sft="seed = 1"))
    resumed = train_adapter(configure(top="overwrite = true", sft=often))
    assert resumed.result.resumed_at == 2
    assert all(torch.equal(B, unbroken.adapter.lora_B[name]) for name, B in resumed.adapter.lora_B.items())


def test_what_exists_is_not_trained_over(root: Path, configure: Configure) -> None:
    (root / "adapters" / "signs").mkdir(parents=True)
    with pytest.raises(InputError, match="signs: already exists; choose another out folder or set overwrite"):
        train_adapter(configure())


def test_two_processes_do_not_train_one_adapter(root: Path, configure: Configure) -> None:
    (root / "adapters").mkdir()
    with (
        FileLock(root / "adapters" / ".signs.lock"),
        pytest.raises(InputError, match="another process trains this adapter"),
    ):
        train_adapter(configure())


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"top": 'nam = "x"'}, r"run\.toml: unknown key 'nam'; did you mean 'name'\?"),
        ({"top": "bare_share = 2.0"}, "key 'bare_share'"),
        ({"top": "bare_share = 0.5"}, "bare_share above 0 needs data.bare"),
        ({"top": "variant_share = 0.5"}, "variant_share above 0 needs data.variants"),
        (
            {"top": "bare_share = 0.6\nvariant_share = 0.6", "data": 'bare = "{text}"\nvariants = ["{text}!"]'},
            "bare_share and variant_share add up to more than 1",
        ),
        ({"data": "limit = 0"}, "key 'data.source.limit'"),
        ({"data": 'sprit = "train"'}, "unknown key 'data.source.sprit'; delete the key"),
        ({"sft": "epochs = 0"}, "run.toml: epochs is 0; it must be at least 1"),
        ({"sft": 'epochs = "many"'}, "key 'sft.epochs'"),
        ({"sft": "learning_rat = 1"}, "unknown key 'sft.learning_rat'; did you mean 'learning_rate'"),
        ({"sft": 'overlong = "wrap"'}, "key 'sft.overlong'"),
    ],
)
def test_a_wrong_key_is_named(configure: Configure, places: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(**places)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "signs"', 'name = "../signs"', "key 'name': '../signs' cannot be a name"),
        ("signs.jsonl", "sign.jsonl", r"sign\.jsonl: no such file"),
        ("{text}", "{txt}", r"row 1: no field 'txt'; the fields are: label, text"),
        ("/family", "/famly", r"family\.json: no such file"),
        ('" {label}"', '""', "example 1: its completion is empty"),
        ("batch_size = 4", "max_tokens = 3", "max_tokens = 3 is less than one example needs"),
    ],
)
def test_a_wrong_input_is_named(root: Path, configure: Configure, old: str, new: str, message: str) -> None:
    configure()
    text = (root / "run.toml").read_text()
    assert old in text
    (root / "run.toml").write_text(text.replace(old, new))
    with pytest.raises(TreadleError, match=message):
        train_adapter(load_toml(root / "run.toml", TrainRun))
    assert not (root / "adapters" / "signs").exists()


def test_another_base_is_refused(root: Path, configure: Configure, tiny_llama: LlamaForCausalLM) -> None:
    with torch.no_grad():
        tiny_llama.model.norm.weight[0] += 1
    tiny_llama.save_pretrained(root / "base")
    with pytest.raises(MismatchError, match="its weights are .*, those of the base"):
        train_adapter(configure())


PRIVATE = """
base = "{root}/base"
family = "{root}/family"
name = "signs"
out = "{root}/adapters/signs"
public = {public}
[data]
source = "{root}/signs.jsonl"
prompt = "question {{text}} answer"
completion = " {{label}}"
{data}
[privacy]
epsilon = {epsilon}
delta = 1e-3
records = {records}
expected_batch = {batch}
steps = 3
accountant = "rdp"
{more}
"""


def private(root: Path, **changes: object) -> TrainRun:
    values = {"public": "false", "data": "", "epsilon": 4.0, "records": 12, "batch": 4, "more": ""} | changes
    (root / "run.toml").write_text(PRIVATE.format(root=root, **values))
    return load_toml(root / "run.toml", TrainRun)


@pytest.mark.parametrize(("epsilon", "stated"), [(4.0, 4.0), ('"none"', None)])
def test_a_private_run_leaves_an_adapter_that_states_its_epsilon(root: Path, epsilon: object, stated: object) -> None:
    told: list[str] = []
    made = train_adapter(
        private(root, epsilon=epsilon, more="[dp_sgd]\nlearning_rate = 0.5"), lambda text, *_: told.append(text)
    )
    assert "private step" in told
    stored = json.loads((root / "adapters" / "signs" / "treadle.json").read_text())["provenance"]
    assert (made.adapter.provenance.epsilon, stored["method"]) == (stated, "dp-sgd")
    assert stored["data_sha256"] is None
    assert stored["settings"]["learning_rate"] == 0.5
    assert [path.name for path in (root / "adapters").iterdir() if "checkpoint" in path.name] == []


def test_a_private_run_is_paid_for_before_its_adapter_is_written_and_refused_over_budget(root: Path) -> None:
    ledger, told = Ledger.create(root / "silo.ledger"), list[str]()
    table = f'[ledger]\npath = "{root}/silo.ledger"\ndata = "ward"'
    config = private(root, more=table)
    train_adapter(config)
    assert 3.0 < ledger.spent("ward") <= 4.0  # by loss distributions, of noise that Rényi moments asked for
    (ward,) = ledger.statements()
    assert [(run.releases, run.repeated) for run in ward.runs] == [(1, 0)]
    before = (root / "adapters" / "signs" / "adapter_model.safetensors").read_bytes()

    again = config.model_copy(update={"overwrite": True})
    with pytest.raises(BudgetError, match="data set 'ward': 3 steps with noise"):
        train_adapter(again, lambda text, *_: told.append(text))
    assert "private step" not in told  # not even trained
    assert (root / "adapters" / "signs" / "adapter_model.safetensors").read_bytes() == before
    assert ledger.statements() == (ward,)


def test_an_adapter_that_cannot_be_paid_for_any_more_is_not_written(root: Path) -> None:
    """Another run spends the budget while this one trains."""
    ledger = Ledger.create(root / "silo.ledger")
    config = private(root, more=f'[ledger]\npath = "{root}/silo.ledger"\ndata = "ward"')

    def spends(text: str, done: int, of: int) -> None:
        if (text, done) == ("private step", 3):
            ledger.debit("ward", ReleaseKey("another", 1, "0" * 64), MechanismEvent(1.0, 1.0, 1))

    ledger.register("ward", budget=Budget(4.0, 1e-3), source=root / "signs.jsonl")
    with pytest.raises(BudgetError):
        train_adapter(config, spends)
    assert not (root / "adapters" / "signs").exists()


def test_a_ledger_needs_a_promise_and_a_file(root: Path, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"\[ledger\] needs \[privacy\]"):
        configure(sft='[ledger]\npath = "a"\ndata = "b"')
    with pytest.raises(InputError, match="gone.ledger: "):
        train_adapter(private(root, more=f'[ledger]\npath = "{root}/gone.ledger"\ndata = "ward"'))


def test_the_digest_of_public_data_may_be_stated(root: Path) -> None:
    assert train_adapter(private(root, public="true")).adapter.provenance.data_sha256 is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epsilon": 0}, "run.toml: epsilon is 0.0; it must be above 0"),
        ({"epsilon": '"all"'}, "run.toml: key 'privacy.epsilon"),
        ({"records": 1001, "batch": 1}, "run.toml: delta is 0.001; it must be below 1/records"),
        ({"batch": 13}, "run.toml: expected_batch is 13; it must be from 1 to records = 12"),
        ({"more": "max_grad_norm = 0.0"}, "run.toml: max_grad_norm is 0.0"),
        ({"more": "[dp_sgd]\nmomentum = 2.0"}, "run.toml: momentum is 2.0"),
        ({"more": "[sft]\nepochs = 1"}, r"run.toml: .*\[sft\] and \[privacy\] are two trainers"),
        ({"data": "limit = 5"}, "run.toml: .*data.limit lets one row push out another"),
        ({"public": "false\nbare_share = 0.5", "data": 'bare = "{{text}}"'}, "run.toml: .*deal forms out among all"),
    ],
)
def test_promises_that_would_be_false_are_refused(root: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        private(root, **change)
    assert "\n" not in str(caught.value)


def test_fewer_rows_than_stated_are_refused_without_saying_how_many(root: Path) -> None:
    with pytest.raises(InputError, match=r"fewer rows than privacy.records = 20; state a lower bound"):
        train_adapter(private(root, records=20))


def test_settings_of_private_steps_need_a_promise(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"\[dp_sgd\] needs \[privacy\]"):
        configure(sft="[dp_sgd]\nlearning_rate = 0.5")
