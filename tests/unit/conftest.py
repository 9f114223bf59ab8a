"""One small fleet on disk: a base, a family, three members, one foreign adapter, a public text; and a chat server."""

import json
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

MEMBERS = ("sums", "films", "colours")


@pytest.fixture(scope="session")
def small_fleet(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, make: SimpleNamespace
) -> Path:
    """A folder with base/, family/, sums/, films/, colours/ (members), foreign/ (PEFT's alone), public.txt.

    sums states ε = 3, films ε = 1, the others none.
    """
    from treadle.family.adapter import Adapter, Provenance, package_versions
    from treadle.family.family import AdapterFamily
    from treadle.family.injection import linear_shapes
    from treadle.family.plan import RankPlan
    from treadle.models.identity import identify_folder

    root = tmp_path_factory.mktemp("fleet")
    model = make.llama(seed=3)
    model.save_pretrained(root / "base")
    tiny_tokenizer.save_pretrained(root / "base")
    plan = RankPlan.uniform(linear_shapes(model, ["q_proj", "v_proj", "up_proj"]), rank=4)
    identity = identify_folder(root / "base", str(root / "base"))  # a label that leads to it, as a catalogue name does
    family = AdapterFamily.create(base=identity, plan=plan, seed=0)
    family.save(root / "family")
    privacy = {"sums": (3.0, 1e-5), "films": (1.0, 1e-5)}
    for place, name in enumerate((*MEMBERS, "foreign")):
        generator = torch.Generator().manual_seed(place)
        B = {m: 0.1 * torch.randn(row.out_features, 4, generator=generator) for m, row in plan.modules.items()}
        epsilon, delta = privacy.get(name, (None, None))
        provenance = Provenance("sft", f"data of {name}", epsilon, delta, versions=package_versions())
        Adapter.of_family(family, name, B, provenance=provenance, task_type="CAUSAL_LM").save(root / name)
    (root / "foreign" / "treadle.json").unlink()
    (root / "public.txt").write_text(
        "\n\n".join(f"the film is not w{i} and the answer of a question" for i in range(40))
    )
    return root


@pytest.fixture(scope="session")
def built_bank(small_fleet: Path) -> Path:
    """A bank of the three members and the foreign adapter, calibrated on the public text; never to be changed."""
    from treadle.recipes.bank import AdapterPath, PublicSource, build_bank

    folder = small_fleet / "bank"
    paths = [AdapterPath(small_fleet / name) for name in (*MEMBERS, "foreign")]
    source = PublicSource(str(small_fleet / "public.txt"), limit=8, words=10)
    build_bank(folder, small_fleet / "family", paths, source=source)
    return folder


@pytest.fixture
def bank_copy(built_bank: Path, tmp_path: Path) -> Path:
    """A copy of that bank, for a test to change."""
    return Path(shutil.copytree(built_bank, tmp_path / "bank"))


@pytest.fixture
def steps() -> tuple[list[str], Callable[[str, int, int], None]]:
    """What was told, and the progress that writes it down."""
    told: list[str] = []
    return told, lambda description, done, total: told.append(description)


@dataclass(frozen=True)
class Answer:
    """What the server sends: a status, headers, bytes; cut off after half of them, or only after so many seconds."""

    content: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    seconds: float = 0.0
    drip: bool = False


def said(text: str | None, *, tokens: tuple[int, int] | None = (20, 5)) -> Answer:
    """A chat completion with this text."""
    completion: dict[str, object] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    if tokens is not None:
        completion["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return Answer(json.dumps(completion).encode())


def voting(system: str) -> Answer:
    return said(json.dumps({"system": system}))


@dataclass
class Server:
    """Where it listens, what it was asked, and how it answers: a function of the request's number, from 0, and body."""

    url: str
    answer: Callable[[int, dict], Answer]
    bodies: list[dict] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most: int = 0


@pytest.fixture
def chat_server() -> Iterator[Server]:
    """A server that votes for system1 until a test tells it otherwise."""
    state = Server("", lambda number, body: voting("system1"))
    lock, under_way = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.paths.append(self.path)
                state.keys.append(self.headers.get("Authorization"))
                under_way[0] += 1
                state.most = max(state.most, under_way[0])
            answer = state.answer(number, body)
            time.sleep(answer.seconds)
            with lock:
                under_way[0] -= 1
            try:
                self._send(answer)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer.content)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if answer.drip:
                for place in range(len(answer.content)):
                    self.wfile.write(answer.content[place : place + 1])
                    time.sleep(0.05)
                return
            self.wfile.write(answer.content[: len(answer.content) // 2] if answer.cut else answer.content)
            if answer.cut:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    listening.block_on_close = False
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
    yield state
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.fixture(scope="session")
def reply() -> SimpleNamespace:
    """The functions above, since test modules cannot import this file."""
    return SimpleNamespace(said=said, voting=voting, raw=Answer)


@pytest.fixture
def quiet_trl() -> Iterator[None]:
    """TRL, peft and transformers warn of one another: of names that the next release drops, and of their own models."""
    with warnings.catch_warnings():
        for module in ("transformers", "trl", "peft", "accelerate", "torch"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
        yield
