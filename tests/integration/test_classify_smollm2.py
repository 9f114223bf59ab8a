"""SmolLM2 votes: on this machine, and behind a real HTTP server that speaks the protocol of chat completions."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from treadle.configs.classify import ClassifyRun
from treadle.data.prompts import Example
from treadle.evaluation.answers import candidate_scores, generated
from treadle.models.loading import load_model, load_tokenizer
from treadle.recipes.classify import classify
from treadle.toml import checked

pytestmark = pytest.mark.integration

QUESTIONS = {
    "What is the capital of France?": "system1",
    "What colour is the sky on a clear day?": "system1",
    "Bob is twice as old as Cy was when Bob was as old as Cy is now. Cy is 18. How old is Bob?": "system2",
}


@pytest.fixture(scope="module")
def served(smollm2: Path) -> Iterator[tuple[str, list[dict]]]:
    """A server with SmolLM2 behind it, and the requests that it got.

    A demanded form is kept by choosing the likeliest of the replies that it allows, as a constrained decoder would.
    """
    model, tokenizer = load_model(str(smollm2), device="cpu"), load_tokenizer(str(smollm2))
    bodies: list[dict] = []

    def reply(body: dict) -> dict:
        prompt = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        form = body.get("response_format")
        if form is None:
            (text,) = generated(model, tokenizer, [Example(prompt, "")], body["max_tokens"])
        else:
            names = form["json_schema"]["schema"]["properties"]["system"]["enum"]
            replies = tuple(json.dumps({"system": name}) for name in names)
            text = replies[int(candidate_scores(model, tokenizer, [Example(prompt, "", candidates=replies)]).argmax())]
        usage = {"prompt_tokens": len(tokenizer(prompt).input_ids), "completion_tokens": len(tokenizer(text).input_ids)}
        return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": usage}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = json.dumps(reply(bodies[-1])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies
    server.shutdown()
    server.server_close()
    thread.join()


def test_smollm2_votes_the_same_over_http_and_on_this_machine(
    served: tuple[str, list[dict]], smollm2: Path, tmp_path: Path
) -> None:
    url, bodies = served
    rows = [{"question": question, "truth": truth} for question, truth in QUESTIONS.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    voters = [
        {"kind": "endpoint", "name": "far", "url": url, "model": "smollm2", "template": "plain", "parallel": 1},
        {"kind": "local", "name": "near", "model": str(smollm2), "template": "plain", "device": "cpu"},
        {"kind": "endpoint", "name": "free", "url": url, "model": "smollm2", "structured": False, "parallel": 1}
        | {"parameters": {"temperature": 0, "max_tokens": 6}},
    ]
    run = {
        "data": {"source": str(tmp_path / "rows.jsonl"), "question": "{question}"},
        "out": str(tmp_path / "labelled.jsonl"),
        "target": "SmolLM2-135M-Instruct",
        "voters": voters,
        "undecided": "keep",
        "quorum": 1,
    }
    found = classify(checked(run, ClassifyRun, where="run"))
    far, near, free = (found.ballots[name] for name in ("far", "near", "free"))
    assert [vote.system for vote in far.votes] == [vote.system for vote in near.votes]
    assert all(vote.system is not None for vote in far.votes)
    # the tokens that the server counts are those that this machine counts
    assert far.cost == near.cost
    assert len(bodies) == 6
    assert ["response_format" in body for body in bodies] == [True] * 3 + [False] * 3
    for vote in free.votes:  # what a model of this size writes freely may name no system, and then it says so
        assert vote.system is not None or vote.reason.startswith("its reply names no system: ")
    assert free.cost.completion_tokens <= 3 * 6
    labelled = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    assert [row["system_votes"]["near"] for row in labelled] == [vote.system for vote in near.votes]
    again = classify(checked({**run, "overwrite": True}, ClassifyRun, where="run"))
    assert (again.verdicts, len(bodies)) == (found.verdicts, 6)
