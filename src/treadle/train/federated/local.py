"""A client's round: pay, train, keep, send. The one way from a silo's rows to what leaves it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from treadle.errors import ConfigError, FormatError
from treadle.family.family import AdapterFamily
from treadle.family.injection import trainable
from treadle.family.plan import LayerShape
from treadle.privacy.entries import ReleaseKey
from treadle.privacy.ledger import Ledger, release
from treadle.train.federated.client import LocalResult
from treadle.train.federated.factors import Factors, key_of_A
from treadle.train.federated.messages import Order
from treadle.train.objectives import kind_of, summed_loss, weight
from treadle.train.rows import Row, shuffled


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
        epsilon: of one run, at `delta`; inf for no noise and no guarantee.
        delta: below 1 / records.
        records: how many rows it has, or a public lower bound of that.
    """

    data: str
    ledger: Ledger
    epsilon: float
    delta: float
    records: int


def local_training(
    terms: Terms, opened: Callable[[AdapterFamily, Order], OpenedSilo]
) -> Callable[[AdapterFamily, Order, Factors], LocalResult]:
    """The function that does an order's steps under these terms.

    Args:
        terms: of the silo.
        opened: loads model and rows; called only where something must be trained.
    """

    def train(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
        key = ReleaseKey(order.run, order.server_round, order.request)

        def make() -> bytes:
            silo = opened(family, order)
            tensors = _steps(silo, factors, order)
            header = {"task_type": kind_of(silo.model).value, "transposed": _transposed(silo.model, family)}
            return save(tensors, {"kind": json.dumps(header)})

        released = release(terms.ledger, terms.data, key, None, make)
        return _result(released.payload, terms)

    return train


def _result(payload: bytes, terms: Terms) -> LocalResult:
    """What the released bytes say, with what the data have spent by now."""
    spent = terms.ledger.spent(terms.data)
    known = math.isfinite(spent)
    tensors, kind = _unpacked(payload)
    return LocalResult(
        tensors, kind["task_type"], bool(kind["transposed"]), spent if known else None, terms.delta if known else None
    )


def _unpacked(payload: bytes) -> tuple[dict[str, Tensor], dict[str, str | None]]:
    length = int.from_bytes(payload[:8], "little")
    try:
        kind = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["kind"])
        return load(payload), {"task_type": kind["task_type"], "transposed": "yes" if kind["transposed"] else None}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormatError("a kept reply is damaged", remedy="restore the ledger") from error


def _transposed(model: PreTrainedModel, family: AdapterFamily) -> bool:
    return isinstance(model.get_submodule(next(iter(family.plan.modules))), Conv1D)


def _steps(silo: OpenedSilo, factors: Factors, order: Order) -> dict[str, Tensor]:
    """Plain SGD on batches in a shuffled order: the stand-in until the private step takes its place."""
    work = order.work
    if any(key_of_A(name) in order.trained for name in factors.lora_A):
        raise ConfigError("this client trains B alone", remedy="choose a variant that freezes A")
    shapes = {name: LayerShape(factors.lora_A[name].shape[1], B.shape[0]) for name, B in factors.lora_B.items()}
    with trainable(silo.model, factors.lora_A, shapes) as lora_B:
        with torch.no_grad():
            for name, B in lora_B.items():
                B.copy_(factors.lora_B[name])
        optimizer = torch.optim.SGD(lora_B.values(), lr=work.learning_rate, momentum=work.momentum)
        silo.model.eval()
        for step in range(work.local_steps):
            chosen = shuffled(len(silo.rows), order.server_round, f"step/{step}")[: work.expected_batch]
            batch = [(silo.rows[i].prompt, silo.rows[i].target) for i in chosen]
            optimizer.zero_grad()
            (summed_loss(silo.model, batch) / weight(kind_of(silo.model), batch)).backward()
            optimizer.step()
        return {name: B.detach().cpu().clone() for name, B in lora_B.items() if name in order.trained}
