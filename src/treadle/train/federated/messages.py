"""What crosses between server and clients: named tensors and few facts, checked on arrival.

An order is what the server sends for a round, a reply what a client sends back; `Welcome` is a client's answer to the
server's first question. Tensors travel as float32 arrays without pickles, their names are modules of the family.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from treadle import files
from treadle.errors import ConfigError, FormatError
from treadle.family.family import AdapterFamily
from treadle.train.federated.settings import LocalWork

WELCOME, FAMILY, TRAIN = "query.welcome", "query.family", "train.steps"
"""Message types: who are you, here is the family, do this round's steps."""

_TENSORS, _FACTS = "tensors", "facts"
_LAST_ROUND = 2**31
_REFUSED = "check that both sides run the same release of treadle"


@dataclass(frozen=True)
class Order:
    """A round's work as the server sends it.

    Attributes:
        run: name of the run, drawn once.
        server_round: from 1.
        family: fingerprint.
        work: what to do.
        trained: names of the tensors that are trained and sent back.
        tensors: B by module, folded (scaling 1), as the round finds them, and MODULE/A of every A that is not, or will
            not stay, the family's.
    """

    run: str
    server_round: int
    family: str
    work: LocalWork
    trained: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    @property
    def request(self) -> str:
        """SHA-256 of all that decides the work but its round: family, settings, names, shapes and bytes of tensors."""
        total = hashlib.sha256(files.canonical_json([self.family, self.work.facts(), self.trained]))
        for name, tensor in sorted(self.tensors.items()):
            total.update(f"{name}\x00{tuple(tensor.shape)}\x00".encode())
            total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class Reply:
    """A client's answer to an order.

    Attributes:
        client: its name.
        run: the order's.
        server_round: likewise.
        request: the order's digest.
        task_type: PEFT's name of the kind of model, or None; a fact about the base.
        transposed: whether the adapted layers are Conv1D; likewise.
        epsilon: what the client's data have spent in all, at `delta`; None where nothing is accounted.
        delta: belongs to epsilon.
        tensors: those that the order wants trained.
    """

    client: str
    run: str
    server_round: int
    request: str
    task_type: str | None
    transposed: bool
    epsilon: float | None
    delta: float | None
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Welcome:
    """Who a client is, as it says itself.

    Attributes:
        client: its name.
        has_family: whether it holds the family that was asked for.
        records: how many records it has, where it declares that public; else None.
    """

    client: str
    has_family: bool
    records: int | None


def order_records(order: Order) -> RecordDict:
    """The order as Flower's records."""
    facts = {"run": order.run, "server_round": order.server_round, "family": order.family}
    work = {"work": json.dumps(asdict(order.work)), "trained": json.dumps(order.trained)}
    return RecordDict({_TENSORS: array_record(order.tensors), _FACTS: ConfigRecord({**facts, **work})})


def order_of(message: Message) -> Order:
    """The order in a message.

    Raises:
        FormatError: it holds none.
    """
    facts = _facts(message)
    try:
        work = LocalWork(**json.loads(_text(facts, "work")))
        trained = tuple(str(name) for name in json.loads(_text(facts, "trained")))
    except (TypeError, ValueError, ConfigError) as error:
        raise FormatError(f"the server's order has no sound work ({error})", remedy=_REFUSED) from error
    run, family = _text(facts, "run"), _text(facts, "family")
    server_round = _whole(facts, "server_round")
    if not 1 <= server_round <= _LAST_ROUND:
        raise FormatError(f"the server's order is for round {server_round}", remedy=_REFUSED)
    return Order(run, server_round, family, work, trained, _tensors(message))


def reply_records(reply: Reply) -> RecordDict:
    """The reply as Flower's records; what is None is left out."""
    facts = ConfigRecord({"client": reply.client, "run": reply.run, "server_round": reply.server_round})
    facts["request"], facts["transposed"] = reply.request, reply.transposed
    for name, value in (("task_type", reply.task_type), ("epsilon", reply.epsilon), ("delta", reply.delta)):
        if value is not None:
            facts[name] = value
    return RecordDict({_TENSORS: array_record(reply.tensors), _FACTS: facts})


def reply_of(message: Message) -> Reply:
    """The reply in a message, its numbers finite.

    Raises:
        FormatError: it holds none.
    """
    facts = _facts(message)
    epsilon, delta = _number(facts, "epsilon"), _number(facts, "delta")
    if (epsilon is None) != (delta is None):
        raise FormatError("the message has ε without δ, or δ without ε", remedy=_REFUSED)
    return Reply(
        client=_text(facts, "client"),
        run=_text(facts, "run"),
        server_round=_whole(facts, "server_round"),
        request=_text(facts, "request"),
        task_type=_text(facts, "task_type") if "task_type" in facts else None,
        transposed=facts.get("transposed") is True,
        epsilon=epsilon,
        delta=delta,
        tensors=_tensors(message),
    )


def welcome_question(fingerprint: str) -> RecordDict:
    """The server's first question."""
    return RecordDict({_FACTS: ConfigRecord({"family": fingerprint})})


def asked_family(message: Message) -> str:
    """The fingerprint in the server's first question.

    Raises:
        FormatError: it holds none.
    """
    return _text(_facts(message), "family")


def welcome_records(welcome: Welcome) -> RecordDict:
    """The answer as Flower's records."""
    facts: dict[str, str | int | bool] = {"client": welcome.client, "has_family": welcome.has_family}
    if welcome.records is not None:
        facts["records"] = welcome.records
    return RecordDict({_FACTS: ConfigRecord({**facts})})


def welcome_of(message: Message) -> Welcome:
    """The answer in a message.

    Raises:
        FormatError: it holds none.
    """
    facts = _facts(message)
    records = _whole(facts, "records") if "records" in facts else None
    return Welcome(_text(facts, "client"), facts.get("has_family") is True, records)


def family_records(family: AdapterFamily) -> RecordDict:
    """The family's two files, byte for byte, so that its fingerprint can be checked on arrival."""
    return RecordDict({_FACTS: ConfigRecord({"metadata": family.metadata, "weights": family.weights})})


def family_files(message: Message) -> tuple[bytes, bytes]:
    """`family.json` and `lora_A.safetensors` of the family in a message.

    Raises:
        FormatError: it holds none.
    """
    facts = _facts(message)
    metadata, weights = facts.get("metadata"), facts.get("weights")
    if not isinstance(metadata, bytes) or not isinstance(weights, bytes):
        raise FormatError("the server sent no family", remedy=_REFUSED)
    return metadata, weights


def array_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """The tensors as Flower's arrays."""
    arrays = {name: Array(tensor.detach().cpu().float().contiguous().numpy()) for name, tensor in tensors.items()}
    return ArrayRecord(arrays)


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors in Flower's arrays.

    Raises:
        FormatError: an array is no float32, or its bytes are damaged.
    """
    tensors: dict[str, Tensor] = {}
    for name, array in record.items():
        try:
            values = array.numpy()
        except (TypeError, ValueError, EOFError, OSError) as error:
            raise FormatError(f"the array {name!r} is damaged", remedy=_REFUSED) from error
        if values.dtype != np.float32:
            raise FormatError(f"the array {name!r} is {values.dtype}, not float32", remedy=_REFUSED)
        tensors[name] = torch.from_numpy(values.copy())
    return tensors


def _tensors(message: Message) -> dict[str, Tensor]:
    record = message.content.array_records.get(_TENSORS) if message.has_content() else None
    if record is None:
        raise FormatError("the message has no tensors", remedy=_REFUSED)
    return tensors_of(record)


def _facts(message: Message) -> ConfigRecord:
    record = message.content.config_records.get(_FACTS) if message.has_content() else None
    if record is None:
        raise FormatError("the message has no facts", remedy=_REFUSED)
    return record


def _text(facts: ConfigRecord, name: str) -> str:
    value = facts.get(name)
    if not isinstance(value, str):
        raise FormatError(f"the message lacks {name!r}", remedy=_REFUSED)
    return value


def _whole(facts: ConfigRecord, name: str) -> int:
    value = facts.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormatError(f"the message lacks {name!r}", remedy=_REFUSED)
    return value


def _number(facts: ConfigRecord, name: str) -> float | None:
    value = facts.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise FormatError(f"the message's {name!r} is no number of 0 or more", remedy=_REFUSED)
    return float(value)
