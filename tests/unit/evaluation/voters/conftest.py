"""A real HTTP server on loopback that answers chats as a test says, well or badly; and polls to vote in."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from treadle.configs.classify import SYSTEMS
from treadle.evaluation.voters import Poll, Question


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
def server() -> Iterator[Server]:
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


@pytest.fixture
def poll(tmp_path: Path) -> Callable[[int], Poll]:
    """A poll of so many rows about the two systems."""

    def made(count: int) -> Poll:
        rows = [{"question": f"what is {i} + {i}", "steps": "a " * i} for i in range(count)]
        questions = [Question(str(row["question"]), "yes") for row in rows]
        return Poll(rows, questions, SYSTEMS, "SmolLM2", tmp_path / "answers", "rows.jsonl")

    return made


@pytest.fixture(scope="session")
def reply() -> SimpleNamespace:
    """The functions above, since test modules cannot import this file."""
    return SimpleNamespace(said=said, voting=voting, raw=Answer)
