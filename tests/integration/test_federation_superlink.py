"""A real SuperLink and SuperNodes over TLS with registered keys, each a process of its own, on a tiny model.

The commands are those of docs/federated.md; what the command line adds to them is imported here, to save its start.
"""

import ssl
from pathlib import Path

import httpx
import pytest

from treadle.family.adapter import Adapter
from treadle.family.family import AdapterFamily
from treadle.privacy.ledger import Ledger
from treadle.recipes.superlink import admit, submit, superlink_command

NAMES = ("north", "south")
PROMPT = "question {text} answer"


def rows(name: str) -> list[dict[str, str]]:
    return [{"text": f"{name[0]} w{40 + i}", "label": "good" if i % 2 else "bad"} for i in range(12)]


def test_silos_with_registered_keys_make_an_adapter_over_tls(consortium) -> None:
    root: Path = consortium.root
    files = {}
    for name in (*NAMES, "stranger", "twin"):
        consortium.silo(name)
        files[name] = consortium.rows(name, "signs", rows(name), prompt=PROMPT)
    run, path = consortium.run("signs", NAMES, work="rounds = 1\nexpected_batch = 4\nlearning_rate = 0.1")
    consortium.start("server", superlink_command(run))
    consortium.wait_for("server", "startup complete")
    link = run.superlink
    assert link is not None
    asked = {"verify": ssl.create_default_context(cafile=link.root_certificates), "headers": {"X-Forwarded-For": "::1"}}
    for asks, refused in (
        ("control/register-node", True),
        ("runtime/acquire-task", True),
        ("fleet/pull-object", False),
    ):
        answer = httpx.post(f"https://{link.host}:{link.port}/v1/{asks}", **asked)
        assert (answer.status_code == 403) == refused
    for name in NAMES:
        admit(run, root / f"{name}.key.pub")
    stranger = consortium.start_silo("stranger", files["stranger"])  # its key is not registered
    for name in NAMES:
        consortium.start_silo(name, files[name])
    for name in NAMES:
        consortium.wait_for(name, "SuperNode ID")
    files["twin"].write_text(files["twin"].read_text().replace("twin.key", "north.key"))
    twin = consortium.start_silo("twin", files["twin"])  # north is connected with it
    made = submit(run, path)

    for name, process, key in (("stranger", stranger, "stranger.key"), ("twin", twin, "north.key")):
        assert process.wait(timeout=600.0) == 1
        (line,) = [line for line in (root / f"{name}.log").read_text().splitlines() if line.startswith("treadle: ")]
        assert f"{key}: the SuperLink does not let this key in; have it admitted" in line
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
