"""What a federation is told: its local work, which every client checks and accounts for itself, and its rounds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from treadle.errors import require
from treadle.privacy.plan import clips

Weighting = Literal["uniform", "records"]
"""Whether every client counts alike, or by the number of records that it declares public."""


@dataclass(frozen=True)
class LocalWork:
    """What a client does in one round; sent with every round, so that a client can account for it.

    None of it can weaken a client's guarantee: the client calibrates its own noise for these numbers.

    Attributes:
        rounds: in which a client is to take part, at least 1.
        reserve_rounds: further ones that the noise is calibrated for, to be spent where a crash costs a second debit.
        local_steps: private steps a round, at least 1.
        expected_batch: mean size of a Poisson-sampled batch, at least 1.
        learning_rate: above 0, at scaling 1.
        max_grad_norm: norm to which one example's gradient of all B is clipped, from 1e-12 to 1e12.
        optimizer: of the local steps; its state begins anew in every round.
        momentum: of "sgd", in [0, 1).
        max_length: tokens of one example; what is longer loses the beginning of its prompt.

    Raises:
        ConfigError: a value is out of its range.
    """

    rounds: int
    expected_batch: int
    learning_rate: float
    local_steps: int = 1
    reserve_rounds: int = 0
    max_grad_norm: float = 1.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.0
    max_length: int = 512

    def __post_init__(self) -> None:
        """Hold every number to its range."""
        for name in ("rounds", "expected_batch", "local_steps", "reserve_rounds", "max_length"):
            value = getattr(self, name)  # a server's JSON may say 1.0, which no ledger can read again
            require(name, value, isinstance(value, int) and not isinstance(value, bool), "a whole number")
        for name in ("rounds", "expected_batch", "local_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("learning_rate", self.learning_rate, 0 < self.learning_rate < float("inf"), "a positive number")
        require("max_grad_norm", self.max_grad_norm, *clips(self.max_grad_norm))
        require("reserve_rounds", self.reserve_rounds, self.reserve_rounds >= 0, "0 or more")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        require("max_length", self.max_length, self.max_length >= 2, "at least 2")
        require("optimizer", self.optimizer, self.optimizer in ("sgd", "adam"), "sgd or adam")
        require("momentum", self.momentum, self.momentum == 0 or self.optimizer == "sgd", "0 with adam")

    def facts(self) -> dict[str, str | int | float | bool | None]:
        """The settings by name."""
        return asdict(self)


@dataclass(frozen=True)
class RoundRules:
    """How the server runs its rounds.

    Attributes:
        clients: names of those who may take part, in the order in which their updates are added up.
        sample: how many of them are asked in a round, drawn from the seed; None asks all. A client that the server
            chooses gets no amplification of its privacy from it.
        minimum: accepted updates that a round needs; None for all that are asked. Fewer are never averaged.
        too_few: whether a round with too few "wait"s and asks again those that are missing, or the run "abort"s.
        timeout: seconds to wait for a round's replies before those that came are counted.
        patience: how often in all a round's missing clients are asked before "wait" gives up as well.
        pause: seconds between two such attempts.
        exhausted: whether the run goes on ("continue") without a client whose budget is spent, or "end"s there.
        weighting: of the average, declared here and written into the adapter.
        max_update_norm: Frobenius norm, over all modules, of the greatest change of B that one client may send.
        rank_share: of some clients: the share in (0, 1] of every module's ranks that they train, the first ones.
        seed: of the sampling of clients.

    Raises:
        ConfigError: a value is out of its range, or a name stands twice.
    """

    clients: tuple[str, ...]
    sample: int | None = None
    minimum: int | None = None
    too_few: Literal["wait", "abort"] = "wait"
    timeout: float = 3600.0
    patience: int = 10
    pause: float = 30.0
    exhausted: Literal["continue", "end"] = "continue"
    weighting: Weighting = "uniform"
    max_update_norm: float = 100.0
    rank_share: Mapping[str, float] = field(default_factory=dict[str, float])
    seed: int = 0

    def __post_init__(self) -> None:
        """Hold every number to its range."""
        count = len(self.clients)
        require("clients", list(self.clients), count >= 1, "at least one name")
        twice = [name for name in self.clients if self.clients.count(name) > 1]
        require("clients", twice[:1], not twice, "a list of different names")
        if self.sample is not None:
            require("sample", self.sample, 1 <= self.sample <= count, f"from 1 to {count}, the number of clients")
        asked = self.asked
        if self.minimum is not None:
            require("minimum", self.minimum, 1 <= self.minimum <= asked, f"from 1 to {asked}, the clients of a round")
        for name in ("timeout", "max_update_norm"):
            value = getattr(self, name)
            require(name, value, 0 < value < float("inf"), "a positive number")
        require("patience", self.patience, self.patience >= 1, "at least 1")
        require("pause", self.pause, 0 <= self.pause < float("inf"), "0 or more")
        for name, share in self.rank_share.items():
            require(f"rank_share of {name}", share, name in self.clients and 0 < share <= 1, "a client's, in (0, 1]")

    @property
    def asked(self) -> int:
        """How many clients a round asks."""
        return len(self.clients) if self.sample is None else self.sample
