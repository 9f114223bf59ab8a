"""What the TOML says of a voter behind an endpoint."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from treadle.evaluation.voters.gate import Limits
from treadle.evaluation.voters.wording import ROLE_PLAY

Parameter = str | int | float | bool

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = ("model", "messages", "response_format", "stream", "n")


@dataclass(frozen=True)
class EndpointVoter:
    """A model behind an endpoint.

    Attributes:
        name: the voter's.
        url: to which /chat/completions is added, such as "http://127.0.0.1:8000/v1". Nothing else is spoken to.
        model: as the endpoint calls it.
        api_key_env: the environment variable that holds the key; None for an endpoint without one.
        template: a shipped template's name, or a file.
        parameters: sent as they are; without them temperature 0 and at most 256 tokens.
        structured: whether the reply's form is demanded with `response_format`; an endpoint that cannot do that is
            asked without.
        timeout: seconds that one request may take.
        attempts: requests that a row may take.
        backoff: seconds before the second attempt, doubled for each further one.
        longest_wait: seconds beyond which neither grows, and an endpoint that asks for more ends the run.
        requests_per_minute: the pace.
        request_limit: requests over all runs with this cache, failed ones included.
        token_limit: tokens likewise, as the endpoint counts them.
        parallel: requests under way at a time.
    """

    kind: Literal["endpoint"]
    name: str
    url: str
    model: str
    api_key_env: str | None = None
    template: str = ROLE_PLAY
    parameters: Mapping[str, Parameter] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 256})
    structured: bool = True
    timeout: float = 60.0
    attempts: int = 5
    backoff: float = 1.0
    longest_wait: float = 120.0
    requests_per_minute: float | None = None
    request_limit: int | None = None
    token_limit: int | None = None
    parallel: int = 4
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        """Refuse what cannot be asked, without repeating what may hold a secret."""
        try:
            parts = urlsplit(self.url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # it quotes the port, which may be a password
            raise ValueError("url is no address") from None
        if not whole:
            raise ValueError("url must begin with http:// or https:// and a host")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("url must hold no user, password, query or fragment; name a key's variable in api_key_env")
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError(
                "api_key_env is the name of a variable, in letters, digits and _, and never the key itself"
            )
        ours = [key for key in _OURS if key in self.parameters]
        if ours:
            raise ValueError(f"parameters.{ours[0]} is not yours to set")
        positive = ("timeout", "attempts", "longest_wait", "requests_per_minute", "request_limit", "token_limit")
        for key in (*positive, "parallel"):
            value: float | None = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{key} is {value}; it must be above 0")
        if not 0 <= self.backoff < math.inf:
            raise ValueError(f"backoff is {self.backoff}; it must not be negative")

    @property
    def limits(self) -> Limits:
        """What it may ask for."""
        return Limits(self.requests_per_minute, self.request_limit, self.token_limit)
