"""`treadle federate probe`: what a client can do, told without a look at its rows."""

import datetime
import http.server
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.superlink.main import create_app
from starlette.types import Message, Receive, Scope, Send
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from treadle.cli.app import app
from treadle.configs.federate import FederateRun, SiloRun
from treadle.errors import ConfigError, FormatError, InputError, UnavailableError
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.recipes.footprint import forget_peak, peak_bytes
from treadle.recipes.probe import MOST_LOCAL_STEPS, RANKS, probe
from treadle.toml import load_toml
from treadle.train.federated.bandwidth import on_this_machine, to_superlink

SILO = """
name = "northern-hospital"
base = "{root}/base"
folder = "{root}/north"
[data]
source = "{root}/secret-patients.jsonl"
prompt = "{{text}}"
completion = " {{label}}"
[privacy]
epsilon = 3.0
delta = 1e-5
records = 8765
[ledger]
path = "{root}/secret.ledger"
data = "patients"
"""

RUN = """
family = "{root}/family"
name = "signs"
out = "{root}/signs"
silos = ["{root}/north.toml"]
[work]
rounds = 3
expected_batch = 6
learning_rate = 0.1
local_steps = 2
max_length = 16
[rules]
clients = ["northern-hospital"]
timeout = 1e-6
"""


@pytest.fixture
def root(tmp_path: Path, tiny_base: Path, tiny_llama: LlamaForCausalLM) -> Path:
    """A silo whose rows and ledger are not even there, and a run over a family of rank 3."""
    plan = RankPlan.uniform(linear_shapes(tiny_llama, ["q_proj", "v_proj"]), rank=3)
    AdapterFamily.create(base=str(tiny_base), plan=plan, seed=4).save(tmp_path / "family")
    (tmp_path / "north.toml").write_text(SILO.format(root=tmp_path))
    (tmp_path / "run.toml").write_text(RUN.format(root=tmp_path))
    return tmp_path


def silo_of(root: Path) -> SiloRun:
    return load_toml(root / "north.toml", SiloRun)


def test_a_run_fixes_rank_batch_and_length(root: Path) -> None:
    found = probe(silo_of(root), load_toml(root / "run.toml", FederateRun))
    assert (found.tokens, found.expected_batch) == (16, 6)
    assert [row.micro_batch for row in found.measured] == [1, 2, 4]  # 8 would be more than the batch
    assert {row.rank for row in found.measured} == {3.0}
    assert found.proposal.rank_is_given
    assert found.proposal.micro_batch == min(found.measured, key=lambda row: row.row_seconds).micro_batch
    plan = AdapterFamily.load(root / "family").plan
    assert found.round_bytes == 2 * 4 * sum(3 * row.out_features for row in plan.modules.values())
    assert found.step_seconds > found.noise_seconds > 0
    assert found.asked is not None
    assert found.asked > 2 * found.step_seconds
    assert found.asked_fits is False  # nobody takes a step in a microsecond


def test_without_a_run_the_largest_rank_that_crosses_in_time(root: Path) -> None:
    found = probe(silo_of(root), round_seconds=3600.0)
    assert found.proposal.rank == 16  # k_proj has 16 outputs, and no room for more
    assert found.proposal.local_steps == MOST_LOCAL_STEPS
    assert found.round_seconds <= found.proposal.deadline
    hurried = probe(silo_of(root), round_seconds=1e-9)
    assert (hurried.proposal.rank, hurried.proposal.local_steps) == (RANKS[0], 1)


def test_memory_is_a_limit(root: Path) -> None:
    with pytest.raises(InputError, match="not even one row of 128 tokens fits into 1,000 bytes"):
        probe(silo_of(root), memory=1000)
    with pytest.raises(ConfigError, match="a limit is not above 0"):
        probe(silo_of(root), round_seconds=0.0)


def leaves(content: object) -> list[object]:
    """Every key and every value in what JSON holds."""
    if isinstance(content, dict):
        return [leaf for key, value in content.items() for leaf in (key, *leaves(value))]
    if isinstance(content, list):
        return [leaf for value in content for leaf in leaves(value)]
    return [content]


def test_nothing_of_the_silo_is_said(root: Path) -> None:
    result = CliRunner().invoke(app, ["federate", "probe", str(root / "north.toml"), str(root / "run.toml"), "--json"])
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["proposal"]["micro_batch"] >= 1
    assert content["transfer"]["way"] == "local"
    for secret in ("northern-hospital", "patients", "secret", str(root)):
        assert secret not in result.stdout
    # The number of records is looked for as a value and in every text: the digits of a measured time may hold it.
    said = leaves(content)
    assert 8765 not in said
    assert not any("8765" in value for value in said if isinstance(value, str))
    plain = CliRunner().invoke(app, ["federate", "probe", str(root / "north.toml"), str(root / "run.toml")])
    assert "of serialising and hashing on this machine; no SuperLink is named" in plain.stdout
    assert "the rank is the family's" in plain.stdout
    assert "which is beyond its time-out" in plain.stdout


def test_somebody_must_name_a_base(root: Path) -> None:
    with pytest.raises(ConfigError, match="neither a family nor a base is named"):
        probe(silo_of(root).model_copy(update={"base": None}))


def test_the_peak_is_that_of_what_happened_since() -> None:
    device = torch.device("cpu")
    forget_peak(device)
    before = peak_bytes(device)
    held = torch.ones(50 * 2**20 // 4)
    assert peak_bytes(device) - before > 0.8 * held.numel() * 4
    del held


def certified(folder: Path) -> Path:
    """The certificate of 127.0.0.1, signed by itself; its key lies beside it."""
    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    (folder / "ca.pem").write_bytes(certificate.public_bytes(encoding))
    return folder / "ca.pem"


@dataclass(frozen=True)
class Link:
    """Flower's own SuperLink on loopback: where, whom it is trusted by, and what it has read of each request."""

    address: str
    certificate: Path
    read: list[tuple[str, str, int]]


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[Link]:
    certificate, read = certified(tmp_path), list[tuple[str, str, int]]()
    app = create_app()

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def heard() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":  # noted before the client can go on
                read.append((scope["path"], scope["http_version"], size))
            await send(message)

        await app(scope, heard, told)

    keys = {"ssl_certfile": certificate, "ssl_keyfile": certificate.with_name("key.pem")}
    server = uvicorn.Server(uvicorn.Config(counted, ws="none", log_config=None, **keys))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Link(f"127.0.0.1:{bound.getsockname()[1]}", certificate, read)
        server.should_exit = True
        thread.join()


def test_bandwidth_is_that_of_an_upload_as_a_supernode_makes_it(superlink: Link, tmp_path: Path) -> None:
    found = to_superlink(superlink.address, superlink.certificate)
    assert found.way == "superlink"
    assert found.bytes_per_second > 1e5
    assert found.seconds(10**6) > found.latency > 0
    assert {(path, version) for path, version, _ in superlink.read} == {("/v1/fleet/push-object", "1.1")}
    sizes = [size for _, _, size in superlink.read]
    # Read whole, so that its time is that of the way; a few bytes are protobuf's own.
    assert 4 * 2**20 < max(sizes) < 4 * 2**20 + 64
    assert len(sizes) == 7
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:\d+: the SuperLink's certificate is not trusted: self"):
        to_superlink(superlink.address, certified(tmp_path / "other"))
    assert len(superlink.read) == 7  # not a byte went to a server that is not trusted


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.pem: cannot be read"):
        to_superlink("127.0.0.1:9", tmp_path / "none.pem")
    (tmp_path / "ca.pem").write_bytes(b"\xff not PEM")
    with pytest.raises(FormatError, match=r"ca\.pem: not a certificate in PEM"):
        to_superlink("127.0.0.1:9", tmp_path / "ca.pem")


def test_a_server_that_is_not_there(root: Path) -> None:
    certificate = certified(root)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9: the SuperLink does not answer"):
        to_superlink("127.0.0.1:9", certificate)
    with pytest.raises(UnavailableError, match="no SuperLink of this Flower; check the address: HOST:PORT"):
        to_superlink("127.0.0.1:port", certificate)
    node = f'[supernode]\nsuperlink = "127.0.0.1:9"\nroot_certificates = "{certificate}"\nprivate_key = "x"\n'
    (root / "north.toml").write_text(SILO.format(root=root) + node)
    with pytest.raises(UnavailableError, match="does not answer"):
        probe(silo_of(root), load_toml(root / "run.toml", FederateRun))


def test_a_server_of_another_kind(tmp_path: Path) -> None:
    certificate = certified(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(UnavailableError, match=r"what answers is no SuperLink of this Flower \(HTTP 501\)"):
            to_superlink(f"127.0.0.1:{server.server_port}", certificate)
        thread.join()


def test_bandwidth_without_a_server_is_this_machines() -> None:
    found = on_this_machine()
    assert found.way == "local"
    assert found.bytes_per_second > 1e6
