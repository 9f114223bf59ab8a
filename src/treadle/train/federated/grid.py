"""A Grid within one process: no sockets, no Ray, and every message passes as the bytes that Flower would send."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from treadle.errors import TreadleError


def wire_bytes(message: Message) -> int:
    """How many bytes the message is on the wire: all objects that Flower pushes for it, heads included."""
    return sum(map(len, _contents(message).values()))


def _contents(message: Message) -> dict[str, bytes]:
    objects: Mapping[str, InflatableObject] = get_all_nested_objects(message)
    return {name: item.deflate() for name, item in objects.items()}


def _sent(message: Message) -> Message:
    """The message as it arrives on the other side."""
    message_id = message.metadata.message_id
    received = inflate_object_from_contents(message.object_id, _contents(message))
    if not isinstance(received, Message):
        raise TreadleError("a message changed its kind on the way", remedy="report this as a bug")
    received.metadata.__dict__["_message_id"] = message_id
    return received


class InProcessGrid(Grid):
    """A Grid whose nodes are calls of one ClientApp, one after the other.

    Replies are there as soon as `push_messages` returns. A client that takes longer than `send_and_receive`'s time-out
    is late: nobody interrupts it, but its reply is left out as it would be by a server that had stopped waiting.

    Args:
        app: of all nodes, which it tells apart by their context.
        nodes: number → configuration.
        delivered: what becomes of a round's replies on their way; for tests of what may happen to them there.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: Mapping[int, UserConfig],
        delivered: Callable[[Sequence[Message]], Sequence[Message]] = lambda replies: replies,
    ) -> None:
        self._app, self._delivered = app, delivered
        self._nodes = dict(nodes)
        self._replies: dict[str, tuple[Message, float]] = {}
        self._states = {node: RecordDict() for node in nodes}
        self._run = Run.create_empty(run_id=1)
        # Flower's own processes are told who they are; a message cannot be made without it.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The numbers of all nodes."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """The identifiers of the messages, each answered already."""
        names: list[str] = []
        for message in messages:
            name = str(uuid4())
            message.metadata.__dict__["_message_id"] = name
            begun = time.monotonic()
            reply = self._answer(_sent(message))
            self._replies[name] = (_sent(reply), time.monotonic() - begun)
            names.append(name)
        return names

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self._nodes:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "there is no such node"), reply_to=message)
        context = Context(self._run.run_id, node, dict(self._nodes[node]), self._states[node], {})
        try:
            return self._app(message, context)
        except Exception:  # as a SuperNode does, though without the text, which may quote data
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the client app failed"), reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, each handed out once."""
        return [reply for reply, _ in self._pulled(message_ids)]

    def _pulled(self, message_ids: Iterable[str]) -> list[tuple[Message, float]]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies of those clients that took no longer than the time-out."""
        pulled = self._pulled(self.push_messages(messages))
        return self._delivered([reply for reply, seconds in pulled if timeout is None or seconds <= timeout])
