"""A voter behind a server that behaves, and behind one that does not."""

import email.utils
import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from treadle.errors import ConfigError, InputError, TreadleError, UnavailableError
from treadle.evaluation.voters import Ballots, Poll, prepared
from treadle.evaluation.voters.endpoint_settings import EndpointVoter
from treadle.progress import silent

KEY = "sk-very-secret-4711"
Polls = Callable[[int], Poll]


def voter(chat_server: SimpleNamespace, **changes: object) -> EndpointVoter:
    settings = {"url": chat_server.url, "model": "teacher", "backoff": 0.001, "parallel": 1, "timeout": 5.0} | changes
    return EndpointVoter("endpoint", "teacher", **settings)


def cast(chat_server: SimpleNamespace, poll: Poll, **changes: object) -> Ballots:
    return prepared(voter(chat_server, **changes), poll)(silent)


def systems(ballots: Ballots) -> list[str | None]:
    return [vote.system for vote in ballots.votes]


def asked_about(body: dict, count: int = 100) -> int:
    """Which row of the poll a request is about."""
    text = body["messages"][-1]["content"]
    return next(i for i in range(count) if f"what is {i} + {i}\n" in text)


def files_under(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


class TestAServerThatBehaves:
    def test_each_row_is_asked_once_and_the_request_is_what_the_protocol_says(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        chat_server.answer = lambda number, body: reply.voting(f"system{1 + asked_about(body) % 2}")
        found = cast(chat_server, poll(5), parameters={"temperature": 0.5, "seed": 3})
        assert systems(found) == ["system1", "system2", "system1", "system2", "system1"]
        assert (found.cost.requests, found.cost.prompt_tokens, found.cost.completion_tokens) == (5, 100, 25)
        assert set(chat_server.paths) == {"/v1/chat/completions"}
        assert set(chat_server.keys) == {None}
        body = chat_server.bodies[0]
        assert (body["model"], body["temperature"], body["seed"]) == ("teacher", 0.5, 3)
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert "You are SmolLM2" in body["messages"][0]["content"]
        form = body["response_format"]["json_schema"]
        assert body["response_format"]["type"] == "json_schema"
        assert form["schema"]["properties"]["system"]["enum"] == ["system1", "system2"]
        assert set(body) == {"model", "messages", "temperature", "seed", "response_format"}

    def test_several_at_a_time_give_the_same_votes(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        def answer(number: int, body: dict) -> object:
            row = asked_about(body)
            return reply.raw(reply.voting(f"system{1 + row % 2}").content, seconds=0.02 * (row % 3))

        chat_server.answer = answer
        found = cast(chat_server, poll(12), parallel=4)
        assert systems(found) == [f"system{1 + row % 2}" for row in range(12)]
        assert 2 <= chat_server.most <= 4

    def test_equal_questions_are_asked_once(self, chat_server: SimpleNamespace, poll: Polls) -> None:
        two = poll(2)
        doubled = Poll(two.rows * 2, [*two.questions, *two.questions], two.systems, "x", two.cache, "rows")
        assert systems(cast(chat_server, doubled)) == ["system1"] * 4
        assert len(chat_server.bodies) == 2

    def test_a_second_run_asks_nothing_and_one_with_more_rows_only_these(
        self, chat_server: SimpleNamespace, poll: Polls
    ) -> None:
        first = cast(chat_server, poll(3))
        assert (len(chat_server.bodies), first.cost.kept) == (3, 0)
        again = cast(chat_server, poll(3))
        assert (again.votes, again.cost.kept, len(chat_server.bodies)) == (first.votes, 3, 3)
        assert cast(chat_server, poll(5)).cost.requests == len(chat_server.bodies) == 5

    @pytest.mark.parametrize(
        "change",
        [{"model": "other"}, {"template": "plain"}, {"parameters": {"temperature": 1.0}}, {"structured": False}],
    )
    def test_other_settings_ask_again_but_pace_and_patience_do_not(
        self, chat_server: SimpleNamespace, poll: Polls, change: dict[str, object]
    ) -> None:
        cast(chat_server, poll(2))
        cast(chat_server, poll(2), timeout=9.0, attempts=2, parallel=2, request_limit=50)
        assert len(chat_server.bodies) == 2
        cast(chat_server, poll(2), **change)
        assert len(chat_server.bodies) == 4

    def test_the_pace_is_kept(self, chat_server: SimpleNamespace, poll: Polls) -> None:
        begin = time.monotonic()
        cast(chat_server, poll(4), requests_per_minute=1200.0, parallel=4)
        assert time.monotonic() - begin >= 3 * 60 / 1200


class TestTrouble:
    @pytest.mark.parametrize(
        ("first", "said"),
        [
            ({"content": b"{}", "status": 500}, "HTTP 500"),
            ({"content": b"", "status": 503, "headers": {"Retry-After": "0"}}, "HTTP 503"),
            ({"content": b"slow down", "status": 429}, "HTTP 429"),
            ({"content": b"slow down", "status": 429, "headers": {"Retry-After": "0.01"}}, "HTTP 429"),
            ({"content": b"<html>\xff\xfe garbage"}, "no JSON"),
            ({"content": b"[" * 100_000}, "no JSON"),
            ({"content": b'{"choices": []}'}, "no chat completion"),
            ({"content": b'{"choices": [{"message": {"content": 7}}]}'}, "no chat completion"),
            ({"content": b"[1, 2]"}, "no chat completion"),
            ({"content": b"x" * 1000, "cut": True}, "no connection"),
            ({"content": b"{}", "seconds": 0.3}, "no answer within 0.1 s"),
            ({"content": b"x" * 40, "drip": True}, "no whole answer within 0.1 s"),
            ({"content": b"x" * (5 * 2**20)}, "an endless answer"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_passes_is_tried_again(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls, first: dict, said: str
    ) -> None:
        chat_server.answer = lambda number, body: reply.raw(**first) if number == 0 else reply.voting("system2")
        found = cast(chat_server, poll(2), timeout=0.1 if "0.1 s" in said else 5.0)
        assert systems(found) == ["system2", "system2"]
        assert found.cost.requests == len(chat_server.bodies) == 3
        assert any(said in remark for remark in found.remarks)

    def test_a_server_that_asks_for_no_wait_is_given_one(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        chat_server.answer = lambda number, body: (
            reply.raw(b"", status=503, headers={"Retry-After": "0"}) if number < 2 else reply.voting("system2")
        )
        begin = time.monotonic()
        assert systems(cast(chat_server, poll(1), backoff=0.2, attempts=3)) == ["system2"]
        assert time.monotonic() - begin >= 0.2 + 0.4

    def test_a_server_that_is_not_there_is_one_error(self, chat_server: SimpleNamespace, poll: Polls) -> None:
        with pytest.raises(UnavailableError, match=r"voter 'teacher': the endpoint does not answer \(no connection"):
            cast(chat_server, poll(4), url="http://127.0.0.1:9/v1", attempts=2)

    def test_three_rows_in_a_row_end_the_run_and_the_next_run_goes_on(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        chat_server.answer = lambda number, body: reply.voting("system1") if number < 2 else reply.raw(b"", status=500)
        with pytest.raises(UnavailableError) as stopped:
            cast(chat_server, poll(9), attempts=2)
        assert "(HTTP 500, 2 times); 2 of the 9 answers that it lacked came and are kept; run again" in str(
            stopped.value
        )
        assert len(chat_server.bodies) == 2 + 3 * 2
        chat_server.answer = lambda number, body: reply.voting("system2")
        found = cast(chat_server, poll(9))
        assert systems(found) == ["system1"] * 2 + ["system2"] * 7
        assert (len(chat_server.bodies), found.cost.requests, found.cost.kept) == (8 + 7, 15, 2)

    def test_a_row_that_always_fails_has_no_vote_and_a_reason(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        chat_server.answer = lambda number, body: (
            reply.raw(b"", status=500) if asked_about(body) == 1 else reply.voting("system1")
        )
        found = cast(chat_server, poll(3), attempts=3)
        assert systems(found) == ["system1", None, "system1"]
        assert found.votes[1].reason == "HTTP 500, 3 times"

    def test_a_prompt_that_is_refused_costs_its_row_the_vote(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        chat_server.answer = lambda number, body: (
            reply.raw(b"content filter", status=400) if asked_about(body) else reply.voting("system1")
        )
        found = cast(chat_server, poll(5))
        assert systems(found) == ["system1", None, None, None, None]
        assert found.votes[4].reason == "HTTP 400"
        assert found.remarks == ()

    @pytest.mark.parametrize(
        ("status", "key", "remedy"),
        [
            (401, None, "name a key in api_key_env"),
            (401, KEY, "check the key in TEACHER_KEY"),
            (403, KEY, "check the key in TEACHER_KEY"),
            (404, None, "check url and model"),
            (301, None, "check url and model"),
        ],
    )
    def test_an_endpoint_that_refuses_is_asked_once(
        self,
        chat_server: SimpleNamespace,
        reply: SimpleNamespace,
        poll: Polls,
        monkeypatch: pytest.MonkeyPatch,
        status: int,
        key: str | None,
        remedy: str,
    ) -> None:
        monkeypatch.setenv("TEACHER_KEY", key or "")
        chat_server.answer = lambda number, body: reply.raw(
            b"no", status=status, headers={"Location": f"{chat_server.url}/else"}
        )
        with pytest.raises(UnavailableError, match=rf"refuses \(HTTP {status}\).*; {remedy}"):
            cast(chat_server, poll(5), api_key_env="TEACHER_KEY" if key else None)
        assert len(chat_server.bodies) == 1

    def test_an_endpoint_that_asks_for_an_hour_ends_the_run(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        later = email.utils.format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
        chat_server.answer = lambda number, body: reply.raw(b"", status=429, headers={"Retry-After": later})
        with pytest.raises(UnavailableError, match=r"asks to wait 3[56]\d\d s \(HTTP 429\)"):
            cast(chat_server, poll(2))


class TestReplies:
    def test_a_vote_that_cannot_be_read_is_none_and_is_not_asked_again(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        texts = ["maybe both", None, '{"system": "system9"}', "system 2"]
        chat_server.answer = lambda number, body: reply.said(texts[asked_about(body)])
        for _ in range(2):
            found = cast(chat_server, poll(4))
            assert systems(found) == [None, None, None, "system2"]
            assert [vote.reason for vote in found.votes[:2]] == [
                "its reply names no system: 'maybe both'",
                "its reply is empty",
            ]
        assert len(chat_server.bodies) == 4

    def test_an_endpoint_without_response_format_is_asked_in_text(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        chat_server.answer = lambda number, body: (
            reply.raw(b"unknown field", status=400) if "response_format" in body else reply.said("I say System-2.")
        )
        found = cast(chat_server, poll(4))
        assert systems(found) == ["system2"] * 4
        assert ["response_format" in body for body in chat_server.bodies] == [True, False, False, False, False]
        assert found.remarks == ("the endpoint takes no response_format; replies were read as text",)


class TestLimits:
    def test_requests(self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls) -> None:
        # Nobody is answered before all four have come: a fifth would close the gate before the fourth is through it.
        all_four = threading.Barrier(4, timeout=5.0)

        def together(number: int, _: dict) -> object:
            if number < 4:
                all_four.wait()
            return reply.voting("system1")

        chat_server.answer = together
        for parallel in (4, 1):  # the second run has spent what it may before it begins
            with pytest.raises(UnavailableError) as stopped:
                cast(chat_server, poll(9), request_limit=4, parallel=parallel)
            assert "voter 'teacher': request_limit = 4 is reached; " in str(stopped.value)
            assert len(chat_server.bodies) == 4
        assert systems(cast(chat_server, poll(9), request_limit=9, parallel=4)) == ["system1"] * 9
        assert len(chat_server.bodies) == 9

    def test_failed_requests_count(self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls) -> None:
        chat_server.answer = lambda number, body: reply.raw(b"", status=500)
        with pytest.raises(UnavailableError, match=r"request_limit = 3 is reached; 0 of the 5 answers"):
            cast(chat_server, poll(5), request_limit=3)
        assert len(chat_server.bodies) == 3

    def test_tokens(self, chat_server: SimpleNamespace, poll: Polls) -> None:
        with pytest.raises(UnavailableError, match=r"token_limit = 60 is reached, 75 are spent; 3 of the 9 answers"):
            cast(chat_server, poll(9), token_limit=60)  # a reply costs 25
        assert len(chat_server.bodies) == 3

    def test_tokens_that_nobody_counts_are_no_limit(
        self, chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
    ) -> None:
        chat_server.answer = lambda number, body: reply.said('{"system": "system1"}', tokens=None)
        with pytest.raises(UnavailableError, match="does not count tokens, so token_limit cannot be kept"):
            cast(chat_server, poll(9), token_limit=60)
        assert len(chat_server.bodies) == 1
        assert systems(cast(chat_server, poll(2))) == ["system1"] * 2


class TestKeys:
    def test_a_key_is_sent_and_is_nowhere_else(
        self,
        chat_server: SimpleNamespace,
        reply: SimpleNamespace,
        poll: Polls,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        tmp_path: Path,
    ) -> None:
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("TEACHER_KEY", f" {KEY}\n")
        blabbing = [f"your key {KEY} is good", json.dumps({"system": "system1", "key": KEY})]
        chat_server.answer = lambda number, body: reply.said(blabbing[number])
        found = cast(chat_server, poll(2), api_key_env="TEACHER_KEY")
        assert chat_server.keys == [f"Bearer {KEY}"] * 2
        chat_server.answer = lambda number, body: reply.raw(KEY.encode(), status=401, headers={"WWW-Authenticate": KEY})
        with pytest.raises(TreadleError) as refused:
            cast(chat_server, poll(3), api_key_env="TEACHER_KEY")
        assert "[key]" in str(found.votes[0].reason)
        assert found.votes[1].system == "system1"
        told = f"{caplog.text} {found} {refused.getrepr()} {voter(chat_server)}".encode()
        assert KEY.encode() not in told + files_under(tmp_path)
        assert files_under(tmp_path).count(b'"answer"') == 3  # the grep above had something to read

    @pytest.mark.parametrize(
        ("value", "said"), [("", "the environment has no TEACHER_KEY"), ("käse", "what TEACHER_KEY holds is no key")]
    )
    def test_a_missing_key_is_said_before_anything_is_sent(
        self, chat_server: SimpleNamespace, poll: Polls, monkeypatch: pytest.MonkeyPatch, value: str, said: str
    ) -> None:
        monkeypatch.setenv("TEACHER_KEY", value)
        with pytest.raises(ConfigError, match=said) as refused:
            prepared(voter(chat_server, api_key_env="TEACHER_KEY"), poll(2))
        assert "käse" not in str(refused.value)
        assert chat_server.bodies == []

    def test_a_key_in_the_place_of_its_variable_is_not_repeated(self, chat_server: SimpleNamespace) -> None:
        with pytest.raises(ValueError, match="api_key_env is the name of a variable") as refused:
            voter(chat_server, api_key_env="sk-very-secret")
        assert "secret" not in str(refused.value)

    def test_proxies_and_credentials_of_the_environment_are_left_alone(
        self, chat_server: SimpleNamespace, poll: Polls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        assert systems(cast(chat_server, poll(1))) == ["system1"]
        assert chat_server.keys == [None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": "127.0.0.1:8000/v1"}, "url must begin with http"),
        ({"url": "ftp://host/v1"}, "url must begin with http"),
        ({"url": f"https://me:{KEY}@host/v1"}, "url must hold no user"),
        ({"url": f"https://host/v1?key={KEY}"}, "url must hold no user"),
        ({"url": f"https://me:{KEY}/x@host/v1"}, "url is no address"),
        ({"url": "http://[host/v1"}, "url is no address"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"parameters": {"stream": True}}, "parameters.stream is not yours to set"),
        ({"attempts": 0}, "attempts is 0; it must be above 0"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"requests_per_minute": -1.0}, "requests_per_minute is -1.0"),
        ({"request_limit": 0}, "request_limit is 0"),
        ({"parallel": 0}, "parallel is 0"),
        ({"backoff": -1.0}, "backoff is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_without_repeating_secrets(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        voter(SimpleNamespace(url="http://host/v1"), **changes)
    assert KEY not in str(refused.value)


def test_two_runs_do_not_ask_one_voter_at_the_same_time(
    chat_server: SimpleNamespace, reply: SimpleNamespace, poll: Polls
) -> None:
    refused: list[str] = []

    def answer(number: int, body: dict) -> object:
        with pytest.raises(InputError) as error:
            cast(chat_server, poll(1))
        refused.append(str(error.value))
        return reply.voting("system1")

    chat_server.answer = answer
    cast(chat_server, poll(1))
    assert refused == ["voter 'teacher': another process asks this voter; wait for it"]
