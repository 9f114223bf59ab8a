"""One exchange with an OpenAI-compatible endpoint: the one importer of httpx.

Only the endpoint itself is spoken to: no proxy or credentials from the environment, no redirects. What a server
says is never repeated in an error, since it may repeat the key; in answers the key is struck out.
"""

import email.utils
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx

_MOST_BYTES = 4 * 2**20
_PASSING = {408, 409, 425, 429}


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and its tokens read and written; None where the endpoint does not count them."""

    text: str
    tokens: tuple[int, int] | None


@dataclass(frozen=True)
class Trouble:
    """No reply.

    Attributes:
        reason: in a few words.
        passing: whether the same request may succeed later.
        status: of HTTP; None where there was no response.
        after: seconds that the endpoint asks to wait.
    """

    reason: str
    passing: bool
    status: int | None = None
    after: float | None = None


@dataclass(frozen=True)
class Chat:
    """An endpoint that can be spoken to.

    Attributes:
        url: of its chat completions.
        key: sent as a bearer token; "" for none.
        timeout: seconds that one exchange may take in all.
        client: of httpx, made by `open_chat`.
    """

    url: str
    key: str = field(repr=False)
    timeout: float
    client: httpx.Client

    def exchange(self, body: Mapping[str, object]) -> Reply | Trouble:
        """The reply to one request, or why there is none."""
        end = time.monotonic() + self.timeout
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            with self.client.stream("POST", self.url, json=dict(body), headers=headers) as response:
                if not response.is_success:
                    return _trouble(response)
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > _MOST_BYTES:
                        return Trouble("an endless answer", passing=True)
                    if time.monotonic() > end:
                        return Trouble(f"no whole answer within {self.timeout:g} s", passing=True)
        except httpx.TimeoutException:
            return Trouble(f"no answer within {self.timeout:g} s", passing=True)
        except httpx.RequestError as error:
            return Trouble(f"no connection ({type(error).__name__})", passing=True)
        return self._reply(bytes(content))

    def _reply(self, content: bytes) -> Reply | Trouble:
        try:
            completion = json.loads(content)
        except (ValueError, RecursionError):
            return Trouble("an answer that is no JSON", passing=True)
        match completion:
            case {"choices": [{"message": {"content": str() | None as text}}, *_]}:
                return Reply(self._without_key(text or ""), _tokens(completion.get("usage")))
            case _:
                return Trouble("an answer that is no chat completion", passing=True)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text


def open_chat(url: str, *, key: str, timeout: float) -> Chat:
    """The endpoint under `url`, such as http://127.0.0.1:8000/v1, to which /chat/completions is added."""
    # Its debugging lines hold the response's headers, in which a server may repeat the key.
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    # Without TLS there is no certificate to verify, and loading the authorities takes longer than an exchange.
    encrypted = url.startswith("https:")
    client = httpx.Client(timeout=timeout, trust_env=False, follow_redirects=False, verify=encrypted)
    return Chat(f"{url.rstrip('/')}/chat/completions", key, timeout, client)


def _trouble(response: httpx.Response) -> Trouble:
    status = response.status_code
    passing = status in _PASSING or status >= 500
    return Trouble(f"HTTP {status}", passing, status, _seconds(response.headers.get("Retry-After")))


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header, seconds or a date; None where it is neither."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _tokens(usage: object) -> tuple[int, int] | None:
    match usage:
        case {"prompt_tokens": int(prompt), "completion_tokens": int(completion)} if prompt >= 0 and completion >= 0:
            return prompt, completion
        case _:
            return None
