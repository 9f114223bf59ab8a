"""A federation of three silos on a tiny random model, whose parts can be made to fail at a chosen moment.

Everything is real but the size: ledgers, private steps, Flower's messages, the server's state on disk. The randomness
of the silos is seeded by client, round, request and attempt, so that an answer is repeated only if it was kept.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.family.injection import linear_shapes
from treadle.family.plan import RankPlan
from treadle.models.identity import BaseIdentity
from treadle.privacy.entries import Budget, ReleaseKey
from treadle.privacy.ledger import Ledger
from treadle.privacy.noise import PrivateRandomness, SeededRandomness, SystemRandomness
from treadle.train.federated.checkpoint import RunFolder, facts_of
from treadle.train.federated.client import LocalResult, Silo
from treadle.train.federated.federation import Federation
from treadle.train.federated.local import OpenedSilo, Terms, local_training
from treadle.train.federated.messages import Order
from treadle.train.federated.run import Finished, Message, federate, in_process_grid
from treadle.train.federated.settings import LocalWork, RoundRules
from treadle.train.federated.standing import RoundReport
from treadle.train.federated.variants import VariantSettings
from treadle.train.rows import Row, shuffled

CLIENTS = ("north", "south", "east")
ROWS = 12

Train = Callable[[AdapterFamily, Order, Factors], LocalResult]
Delivered = Callable[[Sequence[Message]], Sequence[Message]]


@dataclass(frozen=True)
class _GuardedRow(Row):
    """A row that tells when training looks at it."""

    told: Callable[[], None] = lambda: None

    @property
    def tokens(self) -> int:
        """What it costs, once that is told."""
        self.told()
        return len(self.prompt) + len(self.target)


@dataclass
class World:
    """The federation in one folder.

    Attributes:
        root: the folder.
        model: of all silos.
        federation: what is run.
        epsilon: of every silo; inf for seeded answers without a promise.
        wrapped: client → what stands before its training, to fail there.
        before_rows: called after the debit, before a silo's rows are read.
        delivered: what becomes of replies on their way.
        pinned: client → fingerprint of the only family that it works for.
        told: called after every round.
        reports: of all rounds so far.
    """

    root: Path
    model: LlamaForCausalLM
    federation: Federation
    epsilon: float = float("inf")
    wrapped: dict[str, Callable[[Train], Train]] = field(default_factory=dict[str, Callable[[Train], Train]])
    before_rows: Callable[[str, Order], None] = lambda client, order: None
    delivered: Delivered = lambda replies: replies
    pinned: dict[str, str] = field(default_factory=dict[str, str])
    told: Callable[[RoundReport], None] = lambda report: None
    reports: list[RoundReport] = field(default_factory=list[RoundReport])
    _attempts: dict[ReleaseKey, int] = field(default_factory=dict[ReleaseKey, int])

    def run(self) -> Finished:
        """The federation from where its folder stands to its end, every part opened anew."""
        silos = [self._silo(name) for name in self.federation.rules.clients]
        folder = RunFolder(self.root / "run", facts_of(self.federation))

        def told(report: RoundReport) -> None:
            self.reports.append(report)
            self.told(report)

        return federate(self.federation, in_process_grid(silos, self.delivered), folder, told)

    def ledger(self, client: str) -> Ledger:
        """The client's ledger, its chain checked."""
        path = self.root / f"{client}.ledger"
        return Ledger.open(path) if path.exists() else Ledger.create(path)

    def debits(self, client: str) -> int:
        """How many releases the client has paid for."""
        return sum(run.releases for line in self.ledger(client).statements() for run in line.runs)

    def _silo(self, name: str) -> Silo:
        ledger = self.ledger(name)
        ledger.register(name, budget=Budget(self.epsilon, 1e-3), source=name.encode())
        terms = Terms(name, ledger, self.epsilon, 1e-3, ROWS)

        def opened(family: AdapterFamily, order: Order) -> OpenedSilo:
            told = partial(self.before_rows, name, order)
            return OpenedSilo(self.model, [_GuardedRow(row.prompt, row.target, told=told) for row in rows_of(name)])

        train = local_training(terms, opened, lambda key: self._randomness(name, key))
        return Silo(name, self.root / name, self.wrapped.get(name, lambda inner: inner)(train), self.pinned.get(name))

    def _randomness(self, client: str, key: ReleaseKey) -> PrivateRandomness:
        if self.epsilon < float("inf"):
            return SystemRandomness()
        mine = replace(key, run=client)
        self._attempts[mine] = self._attempts.get(mine, 0) + 1
        text = f"{client}/{key.server_round}/{key.request}/{self._attempts[mine]}"
        return SeededRandomness(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


def new_world(root: Path, **rules: float | int | str | None) -> World:
    """A world in a new folder; `rules` are those of `RoundRules` that differ from three rounds that need everybody."""
    root.mkdir(parents=True)
    model = _model()
    plan = RankPlan.uniform(linear_shapes(model, ["q_proj", "v_proj"]), rank=2, scaling=2.0)
    family = AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=1)
    work = LocalWork(rounds=3, expected_batch=4, learning_rate=0.5, local_steps=2, reserve_rounds=1)
    variant = VariantSettings().variant(list(plan.modules), rounds=work.rounds)
    settings = {"pause": 0.0, "patience": 3, **rules}
    return World(root, model, Federation(family, variant, work, RoundRules(CLIENTS, **settings)))  # type: ignore[arg-type]


def _model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def rows_of(client: str) -> list[Row]:
    """The client's rows: short sequences drawn from its name."""
    return [Row(tuple(shuffled(30, index, client)[:4]), (index % 2 + 1, 2)) for index in range(ROWS)]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
