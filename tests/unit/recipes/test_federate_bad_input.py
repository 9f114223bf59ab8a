"""What somebody can get wrong in a federation, and what they are told: one line, on the side that can act."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from transformers import PreTrainedTokenizerFast

from treadle.cli.app import main
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.privacy.ledger import Ledger

NAMES = ("north", "south")

RUN = """
family = "{root}/family"
name = "signs"
out = "{root}/signs"
silos = ["{root}/north.toml", "{root}/south.toml"]
[work]
rounds = 1
expected_batch = 4
learning_rate = 0.1
local_steps = 1
[rules]
clients = ["north", "south"]
too_few = "abort"
"""

LINK = """
[superlink]
certificate = "{root}/cert.pem"
private_key = "{root}/key.pem"
root_certificates = "{root}/cert.pem"
"""

NODE = """
[supernode]
superlink = "127.0.0.1:9093"
root_certificates = "{root}/cert.pem"
private_key = "{root}/key.pem"
"""


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> Path:
    """A base, a family, another family, two silos with rows, an old certificate and one that is in force."""
    root = tmp_path_factory.mktemp("federation")
    model = make.llama(width=16, layers=1, seed=3)
    model.save_pretrained(root / "base")
    tiny_tokenizer.save_pretrained(root / "base")
    plan = RankPlan.uniform(linear_shapes(model, ["q_proj"]), rank=2)
    for seed, name in enumerate(("family", "other")):
        AdapterFamily.create(base=str(root / "base"), plan=plan, seed=seed).save(root / name)
    for place, name in enumerate(NAMES):
        rows = [{"text": f"w{40 + 12 * place + i}", "label": "yes"} for i in range(12)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    key = ec.generate_private_key(ec.SECP256R1())
    name, begun = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "old")]), datetime(2020, 1, 1, tzinfo=UTC)
    for file, days in (("cert.pem", 1), ("new.pem", 36500)):
        certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, begun, begun + timedelta(days=days))
        (root / file).write_bytes(certificate.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (root / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return root


@pytest.fixture
def root(world: Path, tmp_path: Path, silo_toml: str) -> Path:
    """A copy of the world with its TOML files and new ledgers."""
    root = Path(shutil.copytree(world, tmp_path / "copy"))
    (root / "run.toml").write_text(RUN.format(root=root))
    for name in NAMES:
        (root / f"{name}.toml").write_text(silo_toml.format(root=root, name=name))
        Ledger.create(root / f"{name}.ledger")
    return root


Mistake = Callable[[Path], list[str]]


def exchanged(root: Path, file: str, old: str, new: str) -> None:
    text, old = (root / file).read_text(), old.replace("ROOT", str(root))
    assert old in text
    (root / file).write_text(text.replace(old, new).replace("ROOT", str(root)))


def run(old: str, new: str) -> Mistake:
    def mistake(root: Path) -> list[str]:
        exchanged(root, "run.toml", old, new)
        return ["federate", "run", str(root / "run.toml")]

    return mistake


def silo(old: str, new: str) -> Mistake:
    """A mistake in the file of north, found where the run is started in this process."""

    def mistake(root: Path) -> list[str]:
        exchanged(root, "north.toml", old, new)
        return ["federate", "run", str(root / "run.toml")]

    return mistake


def node(extra: str, *, old: str = "", new: str = "") -> Mistake:
    """A mistake of a silo that connects to a server."""

    def mistake(root: Path) -> list[str]:
        with (root / "north.toml").open("a") as file:
            file.write(extra.format(root=root))
        exchanged(root, "north.toml", old, new)
        return ["federate", "silo", str(root / "north.toml")]

    return mistake


def link(command: str, *more: str, old: str = "", new: str = "") -> Mistake:
    """A mistake of a server."""

    def mistake(root: Path) -> list[str]:
        text = RUN.format(root=root).replace("silos", "# silos").split("[work]")
        (root / "run.toml").write_text(text[0] + "[work]" + text[1] + LINK.format(root=root))
        exchanged(root, "run.toml", old, new)
        return ["federate", command, str(root / "run.toml"), *(part.replace("ROOT", str(root)) for part in more)]

    return mistake


def damaged_rows(root: Path) -> list[str]:
    (root / "north.csv").write_bytes(b"text,label\nw1,\xff\xfe\n")
    return silo("north.jsonl", "north.csv")(root)


def changed_budget(root: Path) -> list[str]:
    with pytest.raises(SystemExit) as done:
        main(["federate", "run", str(root / "run.toml")])
    assert done.value.code in (0, None)
    shutil.rmtree(root / "signs")
    shutil.rmtree(root / ".signs.federation")
    return silo('data = "north-signs"', 'data = "north-signs"\nepsilon = 3.0')(root)


def renamed(root: Path) -> list[str]:
    """The same rows under another name, as if nothing had been spent on them."""
    changed_budget(root)
    exchanged(root, "north.toml", 'data = "north-signs"\nepsilon = 3.0', 'data = "new-signs"')
    return ["federate", "run", str(root / "run.toml")]


def begun(root: Path) -> list[str]:
    with pytest.raises(SystemExit):
        main(["federate", "run", str(root / "run.toml")])
    shutil.rmtree(root / "signs")
    return ["federate", "run", str(root / "run.toml")]


def done(root: Path) -> list[str]:
    (root / "signs").mkdir()
    return ["federate", "run", str(root / "run.toml")]


MISTAKES: dict[str, tuple[Mistake, int, str]] = {
    # the run
    "no rounds": (run("rounds = 1", "rounds = 0"), 2, "rounds is 0; it must be at least 1"),
    "no batch": (run("expected_batch = 4", "expected_batch = 0"), 2, "expected_batch is 0"),
    "no step": (run("local_steps = 1", "local_steps = 0"), 2, "local_steps is 0"),
    "no learning": (run("learning_rate = 0.1", "learning_rate = 0"), 2, "learning_rate is 0"),
    "clip 0": (run("local_steps = 1", "max_grad_norm = 0"), 2, "max_grad_norm is 0"),
    "momentum 1": (run("local_steps = 1", "momentum = 1"), 2, "momentum is 1"),
    "no such optimiser": (run("local_steps = 1", 'optimizer = "lion"'), 2, "key 'work.optimizer'"),
    "negative reserve": (run("local_steps = 1", "reserve_rounds = -1"), 2, "reserve_rounds is -1"),
    "no clients": (run('["north", "south"]', "[]"), 2, "clients is []"),
    "a client twice": (run('["north", "south"]', '["north", "north"]'), 2, "it must be a list of different names"),
    "a sample beyond all": (run('too_few = "abort"', "sample = 3"), 2, "sample is 3; it must be from 1 to 2"),
    "a minimum beyond all": (run('too_few = "abort"', "minimum = 3"), 2, "minimum is 3; it must be from 1 to 2"),
    "no time": (run('too_few = "abort"', "timeout = 0"), 2, "timeout is 0"),
    "no patience": (run('too_few = "abort"', "patience = 0"), 2, "patience is 0"),
    "no update permitted": (run('too_few = "abort"', "max_update_norm = 0"), 2, "max_update_norm is 0"),
    "too few, unknown": (run('"abort"', '"shrug"'), 2, "key 'rules.too_few'"),
    "unknown weighting": (run('too_few = "abort"', 'weighting = "loud"'), 2, "key 'rules.weighting'"),
    "ranks of nobody": (run('too_few = "abort"', "rank_share = {west = 0.5}"), 2, "rank_share of west is 0.5"),
    "no such variant": (run("[work]", '[variant]\nname = "fedprox"\n[work]'), 2, "no such variant 'fedprox'"),
    "unknown key": (run("name =", "adress = 1\nname ="), 2, "key 'adress'"),
    "a climbing name": (run('"signs"', '"../signs"'), 2, "'../signs' cannot be a name"),
    "no family": (run("/family", "/famly"), 2, "famly/family.json: no such file"),
    "neither silos nor server": (run("silos =", "# silos ="), 2, "give either silos"),
    "a simulation without Ray": (run("[work]", 'grid = "simulation"\n[work]'), 1, "Flower's simulation needs Ray"),
    "a simulation of real silos": (
        link("run", old="[work]", new='grid = "simulation"\n[work]'),
        2,
        "grid 'simulation' has silos in the place of superlink",
    ),
    "other clients": (run('["north", "south"]', '["north", "west"]'), 2, "rules.clients says north, west"),
    "the adapter exists": (done, 2, "already exists"),
    "a run has begun": (begun, 2, "a run has begun here; resume it"),
    "nothing to resume": (
        lambda root: ["federate", "resume", str(root / "run.toml")],
        2,
        "no run has begun here",
    ),
    # a silo
    "ε of 0": (silo('epsilon = "none"', "epsilon = 0"), 2, "key 'privacy.epsilon"),
    "ε below 0": (silo('epsilon = "none"', "epsilon = -1.0"), 2, "key 'privacy.epsilon"),
    "δ of 0": (silo("delta = 1e-3", "delta = 0"), 2, "key 'privacy.delta'"),
    "δ of 1/n": (silo("delta = 1e-3", "delta = 0.1"), 2, "delta is 0.1; it must be below 1/records = 0.0833"),
    "no records": (silo("records = 12", "records = 0"), 2, "key 'privacy.records'"),
    "no ledger": (silo("north.ledger", "nort.ledger"), 2, "nort.ledger"),
    "no rows": (silo("north.jsonl", "nort.jsonl"), 2, "nort.jsonl: no such file"),
    "rows of another encoding": (damaged_rows, 2, "north.csv"),
    "a field that rows lack": (silo("{text}", "{txt}"), 2, "no field 'txt'"),
    "a pinned family that is not there": (silo("[data]", 'family = "ROOT/famly"\n[data]'), 2, "famly"),
    "one name for two silos": (silo('"north"', '"south"'), 2, "the silos are called south, south"),
    "a budget changed by hand": (changed_budget, 2, "its budget in the ledger is"),
    "the same rows under another name": (renamed, 2, "these are the data of 'north-signs', whose spending"),
    "a data set that is no name": (
        silo('data = "north-signs"', 'data = "south/signs"'),
        2,
        "'south/signs' cannot be a name",
    ),
    "fewer rows than a batch": (
        silo("records = 12", "records = 3"),
        1,
        "north: its configuration or data cannot be used",
    ),
    "a plan that is not the silo's": (silo("[data]", 'family = "ROOT/other"\n[data]'), 1, "north: it is not connected"),
    "rows too odd to train on": (silo('" {label}"', '" "'), 1, "north: its conf"),
    "a limit under a promise": (
        silo('[privacy]\nepsilon = "none"', "limit = 9\n[privacy]\nepsilon = 4.0"),
        2,
        "data.limit lets one row push out another",
    ),
    "no base of its own": (silo('base = "ROOT/base"', ""), 2, "neither base nor family is given"),
    "ranks of some where A moves": (
        run('too_few = "abort"', 'rank_share = {north = 0.5}\n[variant]\nname = "fedit"'),
        2,
        "rules.rank_share: fedit trains A, and every client needs all ranks",
    ),
    "ranks of some where A and B take turns": (
        run(
            "rounds = 1\nexpected_batch = 4\nlearning_rate = 0.1\nlocal_steps = 1\n[rules]",
            "rounds = 2\nexpected_batch = 4\nlearning_rate = 0.1\n"
            '[variant]\nname = "rolora"\n[rules]\nrank_share = {north = 0.5}',
        ),
        2,
        "rules.rank_share: rolora trains A, and every client needs all ranks",
    ),
    "private clients whose updates are stacked": (
        run("[rules]", '[variant]\nname = "flora"\n[client_privacy]\nepsilon = 4.0\ndelta = 1e-2\n[rules]'),
        2,
        "flora needs more of the updates than their mean",
    ),
    "private clients that weigh": (
        run("[rules]", '[client_privacy]\nepsilon = 4.0\ndelta = 1e-2\n[rules]\nweighting = "records"'),
        2,
        "clients that are private count alike",
    ),
    "rows too odd for a silo": (
        node(NODE.replace("cert.pem", "new.pem"), old='" {label}"', new='" "'),
        2,
        "example 1: its completion is empty",
    ),
    "no micro-batch": (silo("[data]", "micro_batch = 0\n[data]"), 2, "key 'micro_batch'"),
    # real servers and silos
    "a silo without a server": (node(""), 2, "key 'supernode' is missing"),
    "an old certificate at the silo": (node(NODE), 2, "the certificate is valid from 2020-01-01 to 2020-01-02"),
    "no certificate at the silo": (node(NODE, old="cert.pem", new="crt.pem"), 2, "crt.pem: no such file"),
    "a key for a certificate": (node(NODE, old="cert.pem", new="key.pem"), 2, "not a certificate in PEM"),
    "no key at the silo": (
        node(NODE.replace("/cert.pem", "/new.pem").replace("/key", "/kye")),
        2,
        "kye.pem: no such file",
    ),
    "no key at the server": (
        link("serve", old='cert.pem"\nprivate_key = "ROOT/key.pem', new='new.pem"\nprivate_key = "ROOT/kye.pem'),
        2,
        "kye.pem: no such file",
    ),
    "an old certificate at the server": (link("serve"), 2, "the certificate is valid from 2020-01-01"),
    "no certificate at the server": (link("serve", old="/cert.pem", new="/crt.pem"), 2, "crt.pem: no such file"),
    "serving what runs in one process": (
        lambda root: ["federate", "serve", str(root / "run.toml")],
        2,
        "key 'superlink' is missing",
    ),
    "admitting nobody": (link("admit", "ROOT/north.pub"), 2, "north.pub: no such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake, code, message = MISTAKES[name]
    arguments = mistake(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("treadle: ")]
    assert stopped.value.code == code, printed.err
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_there_are_twenty_five_and_the_unspoilt_folder_works(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(MISTAKES) >= 25
    with pytest.raises(SystemExit) as stopped:
        main(["federate", "run", str(root / "run.toml"), "--json"])
    assert stopped.value.code in (0, None), capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["rounds"] == 1


def test_the_server_is_told_nothing_of_a_silos_rows(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (root / "north.jsonl").open("w") as file:  # sound while the silo reads, and useless once it trains
        file.write("".join(json.dumps({"text": f"secret{i}", "label": " "}) + "\n" for i in range(12)))
    with pytest.raises(SystemExit):
        main(["federate", "run", str(root / "run.toml")])
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    logged = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any("its configuration or data cannot be used; its own log says why" in line for line in told)
    assert any("example 1: its completion is empty" in line for line in logged)
    assert not any("example" in line or "secret" in line for line in told)
