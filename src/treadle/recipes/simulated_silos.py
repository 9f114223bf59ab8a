"""Silos of public rows in one process: the same clients, messages and ledgers as in earnest, with seeded noise."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.privacy.entries import Budget, ReleaseKey
from treadle.privacy.ledger import Ledger
from treadle.privacy.noise import PrivateRandomness, SeededRandomness
from treadle.train.federated.client import LocalResult, Silo
from treadle.train.federated.local import OpenedSilo, Terms, local_training
from treadle.train.federated.messages import Order
from treadle.train.federated.settings import LocalWork
from treadle.train.rows import Row


@dataclass
class Clock:
    """What the silos' private steps took, all silos together."""

    seconds: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class SimulatedSilos:
    """Silos that share a model and have public rows each.

    Attributes:
        model: the base.
        rows: name → rows.
        epsilon: of each over one run; inf for no noise.
        delta: below 1 / the rows of each.
        micro_batch: rows in one forward pass.
        seed: of sampling and noise: a run can be repeated, and what it makes is not private.
        clock: is told what private steps take.
    """

    model: PreTrainedModel
    rows: Mapping[str, Sequence[Row]]
    epsilon: float
    delta: float
    micro_batch: int
    seed: int
    clock: Clock = field(default_factory=Clock)

    def opened(self, folder: Path, work: LocalWork) -> list[Silo]:
        """The silos, each with a folder of its own in `folder`.

        Raises:
            ConfigError: a silo cannot keep its terms over this work; said here, since a client tells no server.
        """
        return [self._silo(folder / name, name, work) for name in self.rows]

    def _silo(self, folder: Path, name: str, work: LocalWork) -> Silo:
        rows = self.rows[name]
        ledger = Ledger.create(folder / "ledger")
        # Seeded noise is accounted as none. The ledger is there because paying, keeping and fsyncing cost time.
        ledger.register(name, budget=Budget(float("inf"), self.delta), source=name.encode())
        terms = Terms(
            name, ledger, epsilon=self.epsilon, delta=self.delta, records=len(rows), micro_batch=self.micro_batch
        )
        terms.plan(work)

        def opened(family: AdapterFamily, order: Order) -> OpenedSilo:  # whatever is asked: they are open already
            return OpenedSilo(self.model, rows)

        train = local_training(terms, opened, lambda key: self._draws(name, key))

        def timed(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
            begun = time.perf_counter()
            made = train(family, order, factors)
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            self.clock.seconds += time.perf_counter() - begun
            self.clock.steps += order.work.local_steps
            return made

        return Silo(name, folder / "families", timed, records=len(rows))

    def _draws(self, name: str, key: ReleaseKey) -> PrivateRandomness:
        digest = hashlib.sha256(f"{self.seed}/{name}/{key.server_round}".encode()).digest()
        return SeededRandomness(int.from_bytes(digest[:6], "little"))
