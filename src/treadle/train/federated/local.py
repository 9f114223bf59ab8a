"""A client's round: pay, train, keep, send. The one way from a silo's rows to what leaves it."""

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from treadle.errors import FormatError
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.family.injection import trainable_factors
from treadle.privacy.accounting import Accountant
from treadle.privacy.entries import ReleaseKey
from treadle.privacy.ledger import Ledger, release
from treadle.privacy.noise import PrivateRandomness, SystemRandomness
from treadle.privacy.plan import DPPlan, Mechanism, PrivacySettings
from treadle.train.federated.client import LocalResult
from treadle.train.federated.factors import key_of_A
from treadle.train.federated.messages import Order
from treadle.train.federated.settings import LocalWork
from treadle.train.objectives import kind_of
from treadle.train.private import private_steps
from treadle.train.rows import Row
from treadle.train.settings import PrivateSettings
from treadle.train.unchanged import unchanged

_KIND = "kind"


@dataclass(frozen=True)
class OpenedSilo:
    """A silo's base model and rows, loaded."""

    model: PreTrainedModel
    rows: Sequence[Row]


@dataclass(frozen=True)
class Terms:
    """What a silo insists on, whatever a server asks.

    Attributes:
        data: name of its data set, under which its ledger keeps all spending.
        ledger: its own.
        epsilon: of one run, at `delta`; inf for no noise and no promise.
        delta: below 1 / records.
        records: how many rows it has, or a public lower bound of that.
        accountant: "pld", or "rdp" to compare with articles.
        micro_batch: rows in one forward pass.
    """

    data: str
    ledger: Ledger
    epsilon: float
    delta: float
    records: int
    accountant: Accountant = "pld"
    micro_batch: int = 16

    def plan(self, work: LocalWork) -> DPPlan:
        """The plan that keeps these terms over all the rounds that a server announces; of more, nothing is released.

        Raises:
            ConfigError: the server's numbers and the silo's do not go together.
        """
        return _plan(
            PrivacySettings(
                epsilon=self.epsilon,
                delta=self.delta,
                records=self.records,
                expected_batch=work.expected_batch,
                rounds=work.rounds,
                local_steps=work.local_steps,
                reserve_rounds=work.reserve_rounds,
                max_grad_norm=work.max_grad_norm,
                accountant=self.accountant,
            )
        )


@lru_cache(maxsize=16)
def _plan(settings: PrivacySettings) -> DPPlan:
    return settings.plan()


def local_training(
    terms: Terms,
    opened: Callable[[AdapterFamily, Order], OpenedSilo],
    randomness: Callable[[ReleaseKey], PrivateRandomness] = lambda _: SystemRandomness(),
) -> Callable[[AdapterFamily, Order, Factors], LocalResult]:
    """The function that does an order's steps under these terms.

    Args:
        terms: of the silo.
        opened: loads model and rows; called only where something must be trained.
        randomness: of one release; anything but the default is for tests, and is not accounted as private.
    """

    def train(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
        plan = terms.plan(order.work)
        key = ReleaseKey(order.run, order.server_round, order.request)
        source = randomness(key)

        # Opened before it is paid for: a base that is missing must not cost a budget, try after try.
        silo = opened(family, order) if terms.ledger.reply(terms.data, key) is None else None

        def make() -> bytes:
            return _made(silo or opened(family, order), plan, source, factors, order, terms.micro_batch)

        event = plan.event(order.work.local_steps) if source.secret else None
        released = release(terms.ledger, terms.data, key, event, make, at_most=plan.steps)
        return _result(released.payload, terms)

    return train


def _made(
    silo: OpenedSilo,
    plan: DPPlan,
    randomness: PrivateRandomness,
    factors: Factors,
    order: Order,
    micro_batch: int,
) -> bytes:
    """The order's tensors after its private steps, as bytes that a ledger keeps."""
    work = order.work
    settings = PrivateSettings(
        learning_rate=work.learning_rate,
        optimizer=work.optimizer,
        momentum=work.momentum,
        micro_batch=micro_batch,
        max_length=work.max_length,
    )
    mechanism = plan.mechanism(len(silo.rows), randomness)
    tensors = stepped(silo, factors, order.trained, mechanism, settings, steps=work.local_steps)
    kind = {"task_type": kind_of(silo.model).value, "transposed": _is_transposed(silo.model, factors)}
    return save(tensors, {_KIND: json.dumps(kind)})


def stepped(
    silo: OpenedSilo,
    factors: Factors,
    names: Collection[str],
    mechanism: Mechanism,
    settings: PrivateSettings,
    *,
    steps: int,
) -> dict[str, Tensor]:
    """The factors of these names after private steps, on the CPU; model, rows and `factors` stay as they are.

    Args:
        silo: whose rows and model.
        factors: to begin from.
        names: of what is trained, a module for its B, `key_of_A` for its A.
        mechanism: made for as many rows.
        settings: of the steps.
        steps: how many.
    """
    train_A = [name for name in factors.lora_A if key_of_A(name) in names]
    train_B = [name for name in factors.lora_B if name in names]
    with (
        unchanged(silo.model, factors.lora_A),
        trainable_factors(silo.model, factors.lora_A, factors.lora_B, train_A=train_A, train_B=train_B) as (A, B),
    ):
        moving = {**B, **{key_of_A(name): parameter for name, parameter in A.items()}}
        private_steps(silo.model, moving, silo.rows, mechanism, settings, steps=steps)
        return {name: moving[name].detach().cpu().contiguous() for name in names}


def _is_transposed(model: PreTrainedModel, factors: Factors) -> bool:
    return isinstance(model.get_submodule(next(iter(factors.lora_B))), Conv1D)


def _result(payload: bytes, terms: Terms) -> LocalResult:
    """What the released bytes say, with what the data have spent by now."""
    spent = terms.ledger.spent(terms.data)
    epsilon, delta = (spent, terms.delta) if math.isfinite(spent) else (None, None)
    tensors, task_type, transposed = _unpacked(payload)
    return LocalResult(tensors, task_type, transposed, epsilon, delta)


def _unpacked(payload: bytes) -> tuple[dict[str, Tensor], str | None, bool]:
    length = int.from_bytes(payload[:8], "little")
    try:
        kind = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"][_KIND])
        return load(payload), kind["task_type"], kind["transposed"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormatError("a kept reply is damaged", remedy="restore the ledger") from error
