"""`treadle audit`: a promise that is kept is not refuted, no promise and a planted bug are."""

import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from treadle.cli.app import main
from treadle.configs.audit import AuditRun
from treadle.errors import ConfigError, InputError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.recipes.audited_training import audit
from treadle.toml import load_toml

AUDIT = """
family = "{root}/family"
base = "{root}/base"
canaries = 1200
planted = 0.1
[data]
source = "{root}/rows.jsonl"
prompt = "question {{text}} answer"
completion = " {{label}}"
[privacy]
epsilon = 1.0
delta = 1e-6
records = 100
expected_batch = 10
steps = 20
[dp_sgd]
learning_rate = 0.1
"""


@pytest.fixture
def root(tmp_path: Path, tiny_base: Path, tiny_llama: LlamaForCausalLM) -> Path:
    """A base, a family with room for 1200 canaries, sixteen public rows, and an audit of them."""
    plan = RankPlan.uniform(linear_shapes(tiny_llama, ["q_proj", "up_proj"]), rank=8)
    AdapterFamily.create(base=str(tiny_base), plan=plan, seed=4).save(tmp_path / "family")
    rows = [{"text": f"w{40 + i}", "label": "good" if i % 2 else "bad"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "audit.toml").write_text(AUDIT.format(root=tmp_path))
    return tmp_path


def changed(root: Path, old: str, new: str) -> Path:
    text = (root / "audit.toml").read_text()
    assert old in text
    (root / "audit.toml").write_text(text.replace(old, new))
    return root / "audit.toml"


def test_a_kept_promise_stands_and_a_planted_bug_is_caught(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(root / "audit.toml"), "--json"])
    assert ended.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert (found["epsilon"], found["delta"], found["steps"], found["rows"], found["canaries"]) == (
        *(1.0, 1e-6, 20),
        *(16, 1200),
    )
    assert found["sample_rate"] == pytest.approx(0.1, rel=0.02)  # of the promise; a batch is a whole number
    honest = [row for row in found["findings"] if row["noise_left"] == 1.0]
    planted = [row for row in found["findings"] if row["noise_left"] == 0.1]
    assert len(honest) == len(planted) == 2
    assert all(row["epsilon_at_least"] < 1.0 for row in honest)
    # noise is never seeded here: 1.51 to 1.98 in twelve executions, mean 1.68, deviation .14; what is claimed is 1
    assert max(row["epsilon_at_least"] for row in planted) > 1.0
    assert (found["holds"], found["caught"]) == (True, True)


def test_without_noise_nothing_is_promised_and_much_is_refuted(root: Path) -> None:
    changed(root, "planted = 0.1", "")
    found = audit(load_toml(changed(root, "epsilon = 1.0", 'epsilon = "none"'), AuditRun))
    # 450 sure guesses refute ln(450 / 3.7) = 4.8
    assert all(finding.epsilon_at_least > 4.0 and not finding.refutes for finding in found.findings)
    assert (found.holds, found.caught) == (True, None)


def test_what_it_cannot_audit_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="9999 canaries for 1152 entries of lora_B|9999 canaries for"):
        audit(load_toml(changed(root, "canaries = 1200", "canaries = 9999"), AuditRun))
    with pytest.raises(InputError, match="planted is set, and epsilon = 'none' has no noise"):
        audit(load_toml(changed(root, "epsilon = 1.0", 'epsilon = "none"'), AuditRun))
