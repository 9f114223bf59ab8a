"""The same federation under Flower's simulation; runs where Ray is installed (`pip install 'treadle[simulation]'`)."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.privacy.ledger import Ledger

NAMES = ("north", "south")
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
"""
RUN = """
family = "{root}/family"
name = "signs"
out = "{root}/signs"
silos = ["{root}/north.toml", "{root}/south.toml"]
grid = "simulation"
[work]
rounds = 2
expected_batch = 4
learning_rate = 0.1
[rules]
clients = ["north", "south"]
pause = 1
"""


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'treadle[simulation]'")
def test_simulated_silos_make_the_adapter_and_pay_from_their_ledgers(
    tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    plan = RankPlan.uniform(linear_shapes(tiny_llama, ["q_proj", "v_proj"]), rank=2)
    AdapterFamily.create(base=str(tmp_path / "base"), plan=plan, seed=4).save(tmp_path / "family")
    for name in NAMES:
        rows = [{"text": f"{name[0]} w{i}", "label": "good" if i % 2 else "bad"} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.toml").write_text(SILO.format(root=tmp_path, name=name))
        Ledger.create(tmp_path / f"{name}.ledger")
    (tmp_path / "run.toml").write_text(RUN.format(root=tmp_path))
    main = "from treadle.cli.app import main; main()"
    source = str(Path(__file__).resolve().parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", main, "federate", "run", str(tmp_path / "run.toml"), "--json"],
        env={**os.environ, "PYTHONPATH": source, "TREADLE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stored = Adapter.load(tmp_path / "signs", family=AdapterFamily.load(tmp_path / "family"))
    assert all(bool(B.any()) for B in stored.lora_B.values())
    for name in NAMES:
        (line,) = Ledger.open(tmp_path / f"{name}.ledger").statements()
        assert (line.runs[0].releases, line.spent) == (2, stored.provenance.settings[f"epsilon of {name}"])
