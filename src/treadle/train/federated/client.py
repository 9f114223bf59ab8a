"""The ClientApp: three questions that a server may ask a silo, and answers that keep private detail at home.

    query.welcome   who are you, and do you hold this family?
    query.family    here it is: A and plan, kept under the fingerprint that they must have
    train.steps     do this round's private steps and send B back

What goes wrong is logged in full on the client's own side; the server gets a code and one of a few fixed sentences,
because an error's text may quote a record. Only what is wrong with the server's own message is told back in full.
"""

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from treadle import files
from treadle.errors import BudgetError, InputError, MismatchError, TreadleError, UnavailableError
from treadle.family.factors import Factors
from treadle.family.family import METADATA, WEIGHTS, AdapterFamily
from treadle.train.federated.factors import check_order, received
from treadle.train.federated.messages import (
    Order,
    Reply,
    Welcome,
    asked_family,
    family_files,
    order_of,
    reply_records,
    welcome_records,
)
from treadle.train.federated.refusals import Refusal

_LOG = logging.getLogger("treadle.federated")


@dataclass(frozen=True)
class LocalResult:
    """What a client's round made, fit to be sent.

    Attributes:
        tensors: the order's, moved and noised.
        task_type: PEFT's name of the kind of model, or None.
        transposed: whether the adapted layers are Conv1D.
        epsilon: what the client's data have spent in all; None where nothing is accounted.
        delta: belongs to epsilon.
    """

    tensors: Mapping[str, Tensor]
    task_type: str | None
    transposed: bool
    epsilon: float | None
    delta: float | None


@dataclass(frozen=True)
class Silo:
    """One client, as its own configuration makes it.

    Attributes:
        name: what the server calls it.
        families: the folder where families that arrive are kept, each under its fingerprint.
        train: does an order's steps in a family, from the factors sent; whatever it returns has left the silo.
        pinned: fingerprint of the only family it works for; None for any over its base.
        records: how many records it has, if the server may know; else None.
    """

    name: str
    families: Path
    train: Callable[[AdapterFamily, Order, Factors], LocalResult]
    pinned: str | None = None
    records: int | None = None


def client_app(silo_of: Callable[[Context], Silo]) -> ClientApp:
    """The ClientApp of the silo that a node's context leads to."""
    app = ClientApp()

    @app.query("welcome")
    def _(message: Message, context: Context) -> Message:
        return _answered(message, context, silo_of, welcome)

    @app.query("family")
    def _(message: Message, context: Context) -> Message:
        return _answered(message, context, silo_of, keep_family)

    @app.train("steps")
    def _(message: Message, context: Context) -> Message:
        return _answered(message, context, silo_of, steps)

    return app


def _answered(
    message: Message,
    context: Context,
    silo_of: Callable[[Context], Silo],
    answer: Callable[[Silo, Message], RecordDict],
) -> Message:
    """The answer, or the refusal that an error becomes."""
    try:
        return Message(answer(silo_of(context), message), reply_to=message)
    except _OrderError as error:
        _LOG.error("refused the server's message: %s", error)
        return Message(Error(Refusal.ORDER.value, str(error)), reply_to=message)
    except Exception as error:
        _LOG.error("%s", error if isinstance(error, TreadleError) else f"{type(error).__name__}: {error}")
        refusal = _refusal_of(error)
        return Message(Error(refusal.value, refusal.sentence), reply_to=message)


class _OrderError(InputError):
    """The server's message itself is wrong, and says nothing about the silo's data."""


def _refusal_of(error: Exception) -> Refusal:
    if isinstance(error, BudgetError):
        return Refusal.BUDGET
    if isinstance(error, UnavailableError):
        return Refusal.UNAVAILABLE
    return Refusal.SILO if isinstance(error, InputError) else Refusal.FAILED


def welcome(silo: Silo, message: Message) -> RecordDict:
    """Who the silo is, and whether it holds the family asked for."""
    with _servers_fault():
        fingerprint = asked_family(message)
    held = bool(fingerprint) and fingerprint.isalnum() and (silo.families / fingerprint / METADATA).exists()
    return welcome_records(Welcome(silo.name, held, silo.records))


def keep_family(silo: Silo, message: Message) -> RecordDict:
    """The same, once the family in the message is kept.

    Raises:
        InputError: the family is damaged, or not the one that the silo works for.
    """
    with _servers_fault():
        metadata, weights = family_files(message)
    fingerprint = hashlib.sha256(metadata).hexdigest()
    if silo.pinned not in (None, fingerprint):
        raise _OrderError(
            f"client {silo.name!r} works for family {str(silo.pinned)[:12]}, not for {fingerprint[:12]}",
            remedy="give both sides one family",
        )
    with files.new_folder(silo.families / fingerprint, overwrite=True) as folder:
        (folder / METADATA).write_bytes(metadata)
        (folder / WEIGHTS).write_bytes(weights)
        with _servers_fault():
            AdapterFamily.load(folder)
    return welcome_records(Welcome(silo.name, True, silo.records))


def steps(silo: Silo, message: Message) -> RecordDict:
    """What an order's steps made."""
    with _servers_fault():
        order = order_of(message)
    family = _family(silo, order.family)
    with _servers_fault():
        factors = received(family.lora_A, order.tensors)
        check_order(order.trained, factors)
    made = silo.train(family, order, factors)
    return reply_records(
        Reply(
            client=silo.name,
            run=order.run,
            server_round=order.server_round,
            request=order.request,
            task_type=made.task_type,
            transposed=made.transposed,
            epsilon=made.epsilon,
            delta=made.delta,
            tensors=made.tensors,
        )
    )


def _family(silo: Silo, fingerprint: str) -> AdapterFamily:
    if silo.pinned not in (None, fingerprint):
        raise _OrderError(
            f"client {silo.name!r} works for family {str(silo.pinned)[:12]}, not for {fingerprint[:12]}",
            remedy="give both sides one family",
        )
    folder = silo.families / files.checked_name(fingerprint)
    if not folder.exists():
        raise _OrderError(f"client {silo.name!r} does not hold family {fingerprint[:12]}", remedy="send it first")
    family = AdapterFamily.load(folder)
    if family.fingerprint != fingerprint:
        raise MismatchError("its bytes are not those of its fingerprint", where=folder, remedy="delete the folder")
    return family


@contextlib.contextmanager
def _servers_fault() -> Iterator[None]:
    """A block whose complaints are about the server's message, so that they may be told to it."""
    try:
        yield
    except InputError as error:
        raise _OrderError(error.what, remedy=error.remedy) from error
