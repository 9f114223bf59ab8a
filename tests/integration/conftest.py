"""A consortium on loopback: an authority, a server, silos with keys and ledgers, and their processes."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from treadle.configs.federate import FederateRun
    from treadle.recipes.superlink import Command

SECONDS = 600.0  # a quiet machine needs one of them; a busy one must not fail for it
KEPT_OF_A_LOG = 4000

RUN = """
family = "{root}/family"
name = "{task}"
out = "{root}/{task}"
[work]
{work}
[rules]
clients = [{clients}]
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
source = "{root}/{name}-{task}.jsonl"
prompt = "{prompt}"
completion = " {{label}}"
[privacy]
epsilon = {epsilon}
delta = 1e-3
records = {records}
[ledger]
path = "{root}/{name}.ledger"
data = "{name}-{task}"
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


@dataclass(frozen=True)
class Consortium:
    """A folder with base/, family/, certificates of a server on `port`, and processes that end with the test."""

    root: Path
    port: int
    running: dict[str, "subprocess.Popen[bytes]"]

    def silo(self, name: str) -> None:
        """Give a silo its key and its ledger."""
        from treadle.privacy.ledger import Ledger

        Ledger.create(self.root / f"{name}.ledger")
        key = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"{name}.key"]
        subprocess.run(key, check=True, cwd=self.root)

    def rows(
        self, name: str, task: str, rows: Sequence[Mapping[str, str]], *, prompt: str, epsilon: float = 8.0
    ) -> Path:
        """The TOML of a silo's rows for a task."""
        (self.root / f"{name}-{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = self.root / f"{name}-{task}.toml"
        given = {"root": self.root, "name": name, "task": task, "prompt": prompt, "records": len(rows)}
        path.write_text(SILO.format(**given, epsilon=epsilon, port=self.port, own=free_port()))
        return path

    def run(self, task: str, clients: Sequence[str], *, work: str) -> tuple["FederateRun", Path]:
        """A run over these clients, and its TOML."""
        from treadle.configs.federate import FederateRun
        from treadle.toml import load_toml

        path, quoted = self.root / f"{task}.toml", ", ".join(f'"{name}"' for name in clients)
        path.write_text(RUN.format(root=self.root, task=task, clients=quoted, port=self.port, work=work))
        return load_toml(path, FederateRun), path

    def start(self, name: str, command: "Command") -> "subprocess.Popen[bytes]":
        """A process whose output goes to a file."""
        with (self.root / f"{name}.log").open("wb") as log:
            started = subprocess.Popen(command.arguments, env=dict(command.environment), stdout=log, stderr=log)
        self.running[name] = started
        return started

    def start_silo(self, name: str, toml: Path) -> "subprocess.Popen[bytes]":
        """`treadle federate silo`."""
        from treadle.recipes.superlink import Command

        main = ("-c", "from treadle.cli.app import main; main()")
        return self.start(name, Command((sys.executable, *main, "federate", "silo", str(toml)), os.environ))

    def log(self, name: str) -> str:
        """What the process has printed."""
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, name: str, words: str) -> None:
        """Return once the process has said so."""
        end = time.monotonic() + SECONDS
        while words not in (text := self.log(name)):
            assert time.monotonic() < end, text
            assert self.running[name].poll() is None, text
            time.sleep(0.2)

    def stop(self, *names: str) -> None:
        """End these processes, as Ctrl-C would."""
        for name in names:
            self.running[name].terminate()
        for name in names:
            self.running.pop(name).wait(timeout=SECONDS)


@pytest.fixture
def consortium(
    tmp_path: Path,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Consortium]:
    """A base, a family with the ranks that a probe gives it, an authority and a server's certificate."""
    from treadle.family.family import AdapterFamily
    from treadle.family.injection import linear_shapes
    from treadle.ranks.allocation import AllocationSettings, mean_rank_budget, plan_of_scores
    from treadle.ranks.inputs import ProbeInputs
    from treadle.ranks.jacobian import jacobian

    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2] / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # seven processes that each take every core starve Flower's heartbeats
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    shapes = linear_shapes(tiny_llama, ["v_proj", "gate_proj", "up_proj"])
    texts = ProbeInputs.of_texts(tiny_tokenizer, ["what is the colour of the answer", "is 1 + 2 a number"])
    scores = replace(jacobian(tiny_llama, texts, shapes), text="public: made up")  # else no ε would cover the ranks
    budget = mean_rank_budget(shapes, 8)
    plan = plan_of_scores(scores, budget=budget, settings=AllocationSettings(scaling=2.0))
    assert len({row.rank for row in plan.modules.values()}) > 1
    AdapterFamily.create(base=str(tmp_path / "base"), plan=plan, seed=4).save(tmp_path / "family")
    (tmp_path / "server.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    for line in CERTIFICATES.strip().splitlines():
        subprocess.run(line.split(), check=True, capture_output=True)
    made = Consortium(tmp_path, free_port(), {})
    yield made
    for name in made.running:  # a test that passes has stopped them itself; of one that fails, the logs say why
        print(f"--- the end of {name}.log\n{made.log(name)[-KEPT_OF_A_LOG:]}")
    made.stop(*reversed(made.running))
