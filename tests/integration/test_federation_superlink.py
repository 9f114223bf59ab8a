"""A real SuperLink and SuperNodes over TLS with registered keys, each a process of its own, on a tiny model.

The commands are those of docs/federated.md; what the command line adds to them is imported here, to save its start.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.configs.federate import FederateRun, SiloRun
from treadle.configs.toml import load_toml
from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.privacy.ledger import Ledger
from treadle.recipes.superlink import Command, admit, submit, superlink_command, supernode_command

NAMES = ("north", "south")
SECONDS = 600.0  # a quiet machine needs one of them; a busy one must not fail for it

RUN = """
family = "{root}/family"
name = "signs"
out = "{root}/signs"
[work]
rounds = 1
expected_batch = 4
learning_rate = 0.1
[rules]
clients = ["north", "south"]
pause = 2
timeout = 240
[superlink]
port = {port}
certificate = "{root}/server.pem"
private_key = "{root}/server.key"
root_certificates = "{root}/ca.pem"
"""

SILO = """
name = "{name}"
base = "{root}/base"
folder = "{root}/{name}"
[data]
source = "{root}/{name}.jsonl"
prompt = "question {{text}} answer"
completion = " {{label}}"
[privacy]
epsilon = 8.0
delta = 1e-3
records = 12
[ledger]
path = "{root}/{name}.ledger"
data = "{name}-signs"
[supernode]
superlink = "127.0.0.1:{port}"
root_certificates = "{root}/ca.pem"
private_key = "{root}/{name}.key"
port = {own}
"""

CERTIFICATES = """
openssl req -x509 {key} -nodes -days 30 -subj /CN=consortium -keyout ca.key -out ca.pem
openssl req {key} -nodes -subj /CN=server -keyout server.key -out server.csr
openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -extfile server.ext -out server.pem
""".replace("{key}", "-newkey ec -pkeyopt ec_paramgen_curve:P-384")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def root(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A base, a family, an authority, a server's certificate, and three silos: two of the run and a stranger."""
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2] / "src"))
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    plan = RankPlan.uniform(linear_shapes(tiny_llama, ["q_proj", "v_proj"]), rank=2, scaling=2.0)
    AdapterFamily.create(base=str(tmp_path / "base"), plan=plan, seed=4).save(tmp_path / "family")
    (tmp_path / "server.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    for line in CERTIFICATES.strip().splitlines():
        subprocess.run(line.split(), check=True, capture_output=True)
    port = free_port()
    for name in (*NAMES, "stranger"):
        rows = [{"text": f"{name[0]} w{40 + i}", "label": "good" if i % 2 else "bad"} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.toml").write_text(SILO.format(root=tmp_path, name=name, port=port, own=free_port()))
        Ledger.create(tmp_path / f"{name}.ledger")
        subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"{name}.key"], check=True)
    (tmp_path / "run.toml").write_text(RUN.format(root=tmp_path, port=port))
    return tmp_path


class Processes:
    """Processes whose output goes to files, ended with the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Command) -> subprocess.Popen[bytes]:
        with (self.root / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command.arguments, env=dict(command.environment), stdout=log, stderr=log
            )
        return self.running[name]

    def wait_for(self, name: str, words: str) -> None:
        end = time.monotonic() + SECONDS
        while words not in (text := (self.root / f"{name}.log").read_text()):
            assert time.monotonic() < end, text
            assert self.running[name].poll() is None, text
            time.sleep(0.2)


@pytest.fixture
def processes(root: Path) -> Iterator[Processes]:
    started = Processes(root)
    yield started
    for process in reversed(started.running.values()):
        process.terminate()
    for process in started.running.values():
        process.wait(timeout=60)


def test_silos_with_registered_keys_make_an_adapter_over_tls(root: Path, processes: Processes) -> None:
    run = load_toml(root / "run.toml", FederateRun)
    processes.start("server", superlink_command(run))
    processes.wait_for("server", "startup complete")
    for name in NAMES:
        admit(run, root / f"{name}.key.pub")
    stranger = supernode_command(load_toml(root / "stranger.toml", SiloRun), root / "stranger.toml")
    refused = processes.start("stranger", stranger)
    for name in NAMES:
        line = (sys.executable, "-c", "from treadle.cli.app import main; main()", "federate", "silo", f"{name}.toml")
        processes.start(name, Command(line, os.environ))
    for name in NAMES:
        processes.wait_for(name, "SuperNode ID")
    made = submit(run, root / "run.toml")

    assert refused.wait(timeout=SECONDS) != 0  # its key is not registered
    family = AdapterFamily.load(root / "family")
    stored = Adapter.load(root / "signs", family=family)
    assert stored.family == family.fingerprint
    assert all(bool(B.any()) for B in stored.lora_B.values())
    assert [row.outcome for row in made.reports[0].clients] == ["accepted", "accepted"]
    # Calibrated for one round of ε = 8 and no reserve: what was spent is what was promised.
    assert stored.provenance.epsilon == pytest.approx(8.0, rel=0.01)
    for name in NAMES:
        assert [line.runs[0].releases for line in Ledger.open(root / f"{name}.ledger").statements()] == [1]
        assert (root / name / family.fingerprint / "lora_A.safetensors").exists()  # sent at the start
