"""`treadle federate` in one process: TOMLs in, one PEFT folder out, and the state that survives a death."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.cli.app import main
from treadle.cli.federation_tables import page_of, watch
from treadle.configs.federate import FederateRun
from treadle.data.prompts import Example
from treadle.errors import ConfigError, InputError, UnavailableError
from treadle.family.adapter import Adapter
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.loading import load_model
from treadle.privacy.ledger import Ledger
from treadle.recipes.federate import Watched, federate_in_process, line_of, watched
from treadle.toml import load_toml
from treadle.train.accuracy import accuracy_of
from treadle.train.rows import encoded
from treadle.train.settings import PrivateSettings

NAMES = ("north", "south", "east")

RUN = """
family = "{root}/family"
name = "signs"
out = "{root}/signs"
silos = [{silos}]
[work]
rounds = 3
expected_batch = 4
learning_rate = 0.1
local_steps = 2
[rules]
clients = ["north", "south", "east"]
pause = 0
"""


@pytest.fixture
def root(tmp_path: Path, tiny_base: Path, tiny_llama: LlamaForCausalLM, silo_toml: str) -> Path:
    """A folder with a base, a family of it, three silos of twelve rows with their ledgers, and a run over them."""
    plan = RankPlan.uniform(linear_shapes(tiny_llama, ["q_proj", "v_proj"]), rank=2, scaling=2.0)
    AdapterFamily.create(base=str(tiny_base), plan=plan, seed=4).save(tmp_path / "family")
    for place, name in enumerate(NAMES):
        rows = [{"text": f"w{40 + 12 * place + i}", "label": "good" if i % 2 else "bad"} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.toml").write_text(silo_toml.format(root=tmp_path, name=name))
        Ledger.create(tmp_path / f"{name}.ledger")
    silos = ", ".join(f'"{tmp_path}/{name}.toml"' for name in NAMES)
    (tmp_path / "run.toml").write_text(RUN.format(root=tmp_path, silos=silos))
    return tmp_path


def test_three_silos_make_an_adapter_of_the_family(root: Path) -> None:
    made = federate_in_process(load_toml(root / "run.toml", FederateRun))
    family = AdapterFamily.load(root / "family")
    stored = Adapter.load(root / "signs", family=family)
    assert stored.family == family.fingerprint
    assert all(B.any() for B in stored.lora_B.values())
    assert [report.server_round for report in made.reports] == [1, 2, 3]
    assert {row.outcome for report in made.reports for row in report.clients} == {"accepted"}
    assert stored.provenance.epsilon is None


@pytest.mark.parametrize("name", ["ffa", "fedit", "flora", "rolora", "fedsvd"])
def test_every_variant_makes_an_adapter_that_says_what_it_is(root: Path, name: str) -> None:
    with (root / "run.toml").open("a") as file:
        file.write(f'[variant]\nname = "{name}"\n')
    made = federate_in_process(load_toml(root / "run.toml", FederateRun))
    family, stored = AdapterFamily.load(root / "family"), Adapter.load(root / "signs")
    assert all(B.any() for B in stored.lora_B.values())
    moved = [m for m, A in stored.lora_A.items() if not torch.equal(A, family.lora_A[m])]
    assert bool(moved) == (name != "ffa")
    assert stored.family == (None if moved else family.fingerprint)
    said = stored.provenance.settings
    assert said["variant"] == name
    assert said["aggregation"] == ("inexact" if name in ("fedit", "flora") else "exact")
    missed = max(report.missed for report in made.reports)
    # Rounding leaves 5e-8; flora, whose silos draw their rows afresh each time, from 1e-4 upwards.
    assert (missed > 1e-6) == (name in ("fedit", "flora"))
    if moved:
        own = AdapterFamily.of_tensors(
            base=family.base,
            plan=family.plan,
            lora_A=stored.lora_A,
            init=name,
            seed=family.seed,
            origin={"family": family.fingerprint},
        )
        assert said["family_of_its_A"] == own.fingerprint


def test_privacy_of_clients_is_warned_of_among_three_and_recorded(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (root / "run.toml").open("a") as file:
        file.write("[client_privacy]\nepsilon = 4.0\ndelta = 1e-2\nmax_update_norm = 0.1\n")
    federate_in_process(load_toml(root / "run.toml", FederateRun))
    said = Adapter.load(root / "signs").provenance
    assert 0 < float(said.settings["client_epsilon"] or 0) <= 4.0
    assert (said.settings["client_delta"], said.epsilon) == (1e-2, None)  # rows are promised nothing by it
    assert "client-level privacy is meaningless here: with 3 clients a round" in caplog.text

    clients = [name for name in said.settings if any(client in name for client in NAMES)]
    assert clients == []  # who took part is what it promises not to tell
    assert (said.settings["silos"], said.data) == (3, "3 silos")


def test_a_run_that_was_killed_goes_on_and_pays_for_no_round_twice(root: Path) -> None:
    for name in NAMES:
        text = (root / f"{name}.toml").read_text()
        (root / f"{name}.toml").write_text(text.replace('epsilon = "none"', "epsilon = 8.0"))
    config = load_toml(root / "run.toml", FederateRun)

    def dies(now: Watched) -> None:
        if len(now.reports) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate_in_process(config, seen=dies)
    assert not watched(config).finished
    with pytest.raises(InputError, match="a run has begun here; resume it"):
        federate_in_process(config)
    made = federate_in_process(config, resume=True)
    assert [report.server_round for report in made.reports] == [1, 2, 3]
    assert watched(config).finished
    for name in NAMES:
        (line,) = Ledger.open(root / f"{name}.ledger").statements()
        assert [(run.releases, run.repeated) for run in line.runs] == [(3, 0)]
        assert made.adapter.provenance.settings[f"epsilon of {name}"] == line.spent


JUDGE = """
[judge]
base = "{root}/base"
[judge.data]
source = "{root}/{rows}.jsonl"
prompt = "question {{text}} answer"
completion = " {{label}}"
"""


def test_the_server_measures_every_round_on_public_rows(root: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = (root / "run.toml").read_text().replace("local_steps = 2", "local_steps = 15")
    text = text.replace("expected_batch = 4\nlearning_rate = 0.1", "expected_batch = 12\nlearning_rate = 0.3")
    text = text.replace("[rules]", 'optimizer = "adam"\n[rules]')
    (root / "run.toml").write_text(text + JUDGE.format(root=root, rows="north"))
    page = root / "signs.html"
    made = federate_in_process(load_toml(root / "run.toml", FederateRun), seen=page_of(page))
    model, adapter = load_model(str(root / "base"), device="cpu"), made.adapter
    examples = [Example(f"question w{40 + i} answer", f" {'good' if i % 2 else 'bad'}") for i in range(12)]
    rows = encoded(model, tiny_tokenizer, examples, PrivateSettings())
    last = accuracy_of(model, Factors(adapter.lora_A, {name: 2.0 * B for name, B in adapter.lora_B.items()}), rows)
    measured = [report.accuracy for report in made.reports]
    assert (len(measured), measured[-1]) == (3, last)
    assert last > 0  # something was learnt, so that equal says something
    assert f"accuracy {last:.3f}" in line_of(made.reports[-1])
    assert "Accuracy on public rows" in page.read_text()


def test_a_judge_that_cannot_judge_is_told_before_anybody_pays(root: Path) -> None:
    with (root / "run.toml").open("a") as file:
        file.write(JUDGE.format(root=root, rows="gone"))
    with pytest.raises(InputError, match="gone.jsonl: no such file"):
        federate_in_process(load_toml(root / "run.toml", FederateRun))
    assert Ledger.open(root / "north.ledger").statements()[0].runs == ()


def test_a_run_killed_by_the_system_is_resumed_by_the_command_and_no_debit_is_lost(root: Path) -> None:
    """SIGKILL takes server and silos at once, wherever they are; whoever had paid without an answer pays again."""
    for name in NAMES:
        text = (root / f"{name}.toml").read_text()
        (root / f"{name}.toml").write_text(text.replace('epsilon = "none"', "epsilon = 8.0"))
    text = (root / "run.toml").read_text()
    (root / "run.toml").write_text(text.replace("rounds = 3", "rounds = 8\nreserve_rounds = 1"))
    command = [sys.executable, "-c", "from treadle.cli.app import main; main()", "federate", "run", f"{root}/run.toml"]
    rounds = root / ".signs.federation" / "rounds.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (rounds.exists() and rounds.read_bytes().count(b"\n") >= 2):
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read() if process.stderr else ""
    before = {name: Ledger.open(root / f"{name}.ledger").spent(f"{name}-signs") for name in NAMES}
    with pytest.raises(SystemExit) as ended:
        main(["federate", "resume", str(root / "run.toml")])
    assert ended.value.code == 0
    made = watched(load_toml(root / "run.toml", FederateRun))
    assert [report.server_round for report in made.reports] == list(range(1, 9))
    stated = Adapter.load(root / "signs").provenance.settings
    for name in NAMES:
        (line,) = Ledger.open(root / f"{name}.ledger").statements()
        (run,) = line.runs
        assert run.releases - run.repeated == 8
        assert run.repeated <= 1  # only the round that was cut short
        assert stated[f"epsilon of {name}"] == line.spent > before[name] > 0


def test_watching_ends_with_a_run_that_ended_early() -> None:
    now = Watched("signs", "ffa", 3, (), finished=False)
    looks = iter([now, replace(now, finished=True)])
    watch(lambda: next(looks))  # it would ask a third time
    assert next(looks, None) is None


def test_a_base_that_is_missing_costs_no_silo_anything(root: Path) -> None:
    for name in NAMES:
        text = (root / f"{name}.toml").read_text()
        text = text.replace('epsilon = "none"', "epsilon = 8.0")
        (root / f"{name}.toml").write_text(text.replace(f'base = "{root}/base"', f'base = "{root}/gone"'))
    (root / "run.toml").write_text((root / "run.toml").read_text().replace("pause = 0", "pause = 0\npatience = 4"))
    with pytest.raises(UnavailableError, match="its own log says why"):
        federate_in_process(load_toml(root / "run.toml", FederateRun))
    assert Ledger.open(root / "north.ledger").spent("north-signs") == 0.0


def test_no_order_is_refused_for_the_length_of_a_row(root: Path) -> None:
    rows = [{"text": f"w{40 + i}", "label": "good " * (12 if i == 5 else 1)} for i in range(12)]
    (root / "north.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (root / "run.toml").read_text()
    (root / "run.toml").write_text(text.replace("local_steps = 2", "local_steps = 2\nmax_length = 4"))
    made = federate_in_process(load_toml(root / "run.toml", FederateRun))
    assert {row.outcome for report in made.reports for row in report.clients} == {"accepted"}


def test_local_is_no_federation(root: Path) -> None:
    with (root / "run.toml").open("a") as file:
        file.write('[variant]\nname = "local"\n')
    with pytest.raises(ConfigError, match="variant local joins nothing; run `treadle train` in every silo"):
        load_toml(root / "run.toml", FederateRun)
