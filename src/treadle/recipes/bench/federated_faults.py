"""`federated-faults`: what may go wrong in a federation, made to go wrong, one case a function.

Where nothing was lost between debit and kept reply, the final B is that of the unbroken run, bit for bit; where it was,
a second debit stands in the ledger and the run ends all the same. A bad update is named, and the round goes on.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from treadle import files
from treadle.configs.bench.federated import FederatedFaultsRun
from treadle.errors import TreadleError, UnavailableError
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.progress import Progress, silent
from treadle.recipes.bench.fault_world import CLIENTS, Delivered, Train, World, new_world, same
from treadle.recipes.bench.result import BenchmarkResult, Metric, commit, device_name
from treadle.train.federated.checkpoint import STATE
from treadle.train.federated.client import LocalResult
from treadle.train.federated.messages import Order
from treadle.train.federated.run import FIRST_NODE, Message
from treadle.train.federated.standing import ClientRow, RoundReport

NAME = "federated-faults"
VICTIM = "south"

Case = Callable[[Path, Mapping[str, Tensor]], bool]
"""Whether the federation survived, in this folder; given the final B of the unbroken run."""


class _KilledError(Exception):
    """A process that is gone."""


def unbroken(root: Path) -> dict[str, Tensor]:
    """The final B of the run in which nothing goes wrong."""
    return dict(new_world(root).run().progressed.state.lora_B)


@dataclass
class _Once:
    """Something that happens the first time alone."""

    left: int = 1

    def now(self) -> bool:
        """Whether it happens this time."""
        self.left -= 1
        return self.left >= 0


def _final(world: World) -> Mapping[str, Tensor]:
    return world.run().progressed.state.lora_B


def _failing_once(server_round: int, *, after: bool) -> Callable[[Train], Train]:
    """Training that dies once in this round, before it does anything or once all is done and kept."""
    once = _Once()

    def wrapped(inner: Train) -> Train:
        def train(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
            dies = order.server_round == server_round and once.now()
            if dies and not after:
                raise _KilledError
            made = inner(family, order, factors)
            if dies:
                raise _KilledError
            return made

        return train

    return wrapped


def client_killed_before_debit(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """Nothing was spent, so it is asked again and pays once."""
    world = new_world(root)
    world.wrapped[VICTIM] = _failing_once(2, after=False)
    return same(_final(world), expected) and world.debits(VICTIM) == 3


def client_killed_after_keeping(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """The kept bytes are sent again, and paid once."""
    world = new_world(root)
    world.wrapped[VICTIM] = _failing_once(2, after=True)
    return same(_final(world), expected) and world.debits(VICTIM) == 3


def client_killed_between_debit_and_keeping(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """The debit stands, a second one is paid, and the noise is fresh."""
    world, once = new_world(root), _Once()

    def opened(client: str, order: Order) -> None:
        if client == VICTIM and order.server_round == 2 and once.now():
            raise _KilledError

    world.before_rows = opened
    return not same(_final(world), expected) and world.debits(VICTIM) == 4


def client_disk_full(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """The client says that something is missing, and is asked again once there is room."""
    world, once, reasons = new_world(root), _Once(), list[str]()

    def wrapped(inner: Train) -> Train:
        def train(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
            if order.server_round == 2 and once.now():
                raise UnavailableError("cannot write (No space left on device)", where=root)
            return inner(family, order, factors)

        return train

    world.wrapped[VICTIM] = wrapped
    world.told = lambda report: reasons.append(str(report.attempts))
    return same(_final(world), expected) and reasons == ["1", "2", "1"]


def _stopped(world: World, server_round: int) -> bool:
    """Run until the server dies right after this round; whether it did."""

    def told(report: RoundReport) -> None:
        if report.server_round == server_round:
            raise _KilledError

    world.told = told
    try:
        world.run()
    except _KilledError:
        world.told = lambda report: None
        return True
    return False


def server_killed_between_rounds(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """It goes on from its state, asking nobody for what it has."""
    world = new_world(root)
    return _stopped(world, 2) and same(_final(world), expected) and _debits(world) == [3, 3, 3]


def server_killed_before_its_state(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """Replies had come but the round was not kept: the clients send the same bytes again, for nothing."""
    world = new_world(root)
    before = root / "before"
    if not _stopped(world, 1):
        return False
    shutil.copy(root / "run" / STATE, before)
    if not _stopped(world, 2):
        return False
    shutil.copy(before, root / "run" / STATE)
    return same(_final(world), expected) and _debits(world) == [3, 3, 3]


def server_and_client_killed(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """Both go on from what they have on disk."""
    world = new_world(root)
    world.wrapped[VICTIM] = _failing_once(3, after=True)
    return _stopped(world, 2) and same(_final(world), expected) and _debits(world) == [3, 3, 3]


def server_disk_full(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """The run stops with an error; the state is that of the last kept round."""
    world, once, write = new_world(root), _Once(left=1), files.write_bytes

    def full(path: Path, content: bytes) -> None:
        if path.name == STATE and len(world.reports) == 1 and once.now():
            raise UnavailableError("cannot write (No space left on device)", where=path)
        write(path, content)

    files.write_bytes = full
    try:
        world.run()
        return False
    except UnavailableError:
        return same(_final(world), expected) and _debits(world) == [3, 3, 3]
    finally:
        files.write_bytes = write


def _debits(world: World) -> list[int]:
    return [world.debits(client) for client in CLIENTS]


def _from_victim(message: Message) -> bool:
    return message.metadata.src_node_id == FIRST_NODE + CLIENTS.index(VICTIM) and message.has_content()


def _is_update(message: Message) -> bool:
    return message.has_content() and bool(message.content.array_records)


def _at_round(server_round: int, change: Callable[[Message], Sequence[Message]], *, once: bool = True) -> Delivered:
    """What becomes of the victim's reply of this round, the first time or every time."""
    first = _Once(1 if once else 1000)

    def delivered(replies: Sequence[Message]) -> Sequence[Message]:
        found: list[Message] = []
        for message in replies:
            mine = _from_victim(message) and _is_update(message) and message.metadata.group_id == str(server_round)
            found.extend(change(message) if mine and first.now() else [message])
        return found

    return delivered


def _damaged(message: Message) -> list[Message]:
    record = next(iter(message.content.array_records.values()))
    array = next(iter(record.values()))
    array.data = array.data[: len(array.data) // 2]
    return [message]


def reply_corrupt(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """It is refused by name; asked again, the client sends the same bytes, whole."""
    world = new_world(root)
    world.delivered = _at_round(2, _damaged)
    return same(_final(world), expected) and _debits(world) == [3, 3, 3]


def reply_twice(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """It counts once."""
    world = new_world(root)
    world.delivered = _at_round(2, lambda message: [message, message])
    same_B = same(_final(world), expected)
    return same_B and _row(world, 2).reason == "a second reply was refused"


def reply_late(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """Nothing comes in time; asked again, the client sends what it kept."""
    world = new_world(root)
    world.delivered = _at_round(2, lambda message: [])
    return same(_final(world), expected) and world.reports[1].attempts == 2 and _debits(world) == [3, 3, 3]


def reply_of_an_earlier_round(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """A late reply of round 1 in round 2 is refused; asked again, the client answers round 2."""
    world, kept, once = new_world(root), list[Message](), _Once()

    def delivered(replies: Sequence[Message]) -> Sequence[Message]:
        updates = [message for message in replies if _from_victim(message) and _is_update(message)]
        kept.extend(updates)
        if len(kept) == 2 and updates and once.now():
            return [message for message in replies if message is not updates[0]] + [kept[0]]
        return replies

    world.delivered = delivered
    return same(_final(world), expected) and world.reports[1].attempts == 2


def reply_under_another_name(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """Whoever answers as somebody else is refused."""

    def renamed(message: Message) -> list[Message]:
        facts = next(iter(message.content.config_records.values()))
        facts["client"] = "north"
        return [message]

    world = new_world(root)
    world.delivered = _at_round(2, renamed)
    return same(_final(world), expected) and world.reports[1].attempts == 2


def _row(world: World, server_round: int, client: str = VICTIM) -> ClientRow:
    report = world.reports[server_round - 1]
    return next(row for row in report.clients if row.client == client)


def _without_victim(root: Path, change: Callable[[LocalResult], LocalResult], words: str) -> bool:
    """Whether a bad update of the victim in every round is named, and the others' mean is what comes of the rounds."""
    world = new_world(root / "bad", minimum=2)

    def wrapped(inner: Train) -> Train:
        return lambda family, order, factors: change(inner(family, order, factors))

    world.wrapped[VICTIM] = wrapped
    bad = _final(world)
    others = new_world(root / "others", minimum=2)

    def absent(inner: Train) -> Train:
        def train(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
            raise _KilledError

        return train

    others.wrapped[VICTIM] = absent
    named = all(row.outcome == "rejected" and words in row.reason for row in (_row(world, n) for n in (1, 2, 3)))
    return named and same(bad, _final(others))


def _with_first(made: LocalResult, change: Callable[[Tensor], Tensor]) -> LocalResult:
    name, tensor = next(iter(made.tensors.items()))
    return replace(made, tensors={**made.tensors, name: change(tensor)})


def update_nan(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """One value that is no number."""
    return _without_victim(
        root, lambda made: _with_first(made, lambda B: B.index_fill(0, torch.tensor([0]), math.nan)), "NaN"
    )


def update_of_another_shape(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """One row too few."""
    return _without_victim(root, lambda made: _with_first(made, lambda B: B[1:]), "is (")


def update_outsized(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """A norm beyond the declared bound."""
    return _without_victim(root, lambda made: _with_first(made, lambda B: B + 1e6), "max_update_norm")


def update_incomplete(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """A module is missing."""
    return _without_victim(root, lambda made: replace(made, tensors=dict(list(made.tensors.items())[1:])), "missing")


def update_of_another_family(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """A silo that works for another family refuses, and the round goes on without it."""
    world = new_world(root, minimum=2)
    stranger = AdapterFamily.create(base=world.federation.family.base, plan=world.federation.family.plan, seed=99)
    world.pinned = {VICTIM: stranger.fingerprint}
    world.run()
    return all(_row(world, number).outcome in ("refused", "absent") for number in (1, 2, 3))


def too_few(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """The round is never averaged over fewer: the run stops with the client's name, and goes on once it is back."""
    world = new_world(root, too_few="abort")

    def absent(inner: Train) -> Train:
        def train(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
            if order.server_round == 2:
                raise _KilledError
            return inner(family, order, factors)

        return train

    world.wrapped[VICTIM] = absent
    try:
        world.run()
        return False
    except UnavailableError as error:
        named = VICTIM in str(error) and "2 of 3" in str(error)
    del world.wrapped[VICTIM]
    return named and same(_final(world), expected)


def _exhausted(root: Path, *, minimum: int | None, exhausted: str) -> World:
    world = new_world(root, minimum=minimum, exhausted=exhausted)
    world.epsilon = 8.0
    once = _Once(2)

    def opened(client: str, order: Order) -> None:  # two crashes between debit and reply: one more than the reserve
        if client == VICTIM and order.server_round == 1 and once.now():
            raise _KilledError

    world.before_rows = opened
    return world


def budget_spent_and_the_rest_go_on(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """A client that crashed more often than its reserve drops out, says why, and is not asked again."""
    world = _exhausted(root, minimum=None, exhausted="continue")
    finished = world.run()
    member = finished.progressed.member(VICTIM)
    over = world.ledger(VICTIM).spent(VICTIM) > 8.0
    return finished.progressed.server_round == 3 and member.exhausted and not over


def budget_spent_and_the_run_ends(root: Path, expected: Mapping[str, Tensor]) -> bool:
    """The same where the rules end the run: what was averaged before stands."""
    world = _exhausted(root, minimum=None, exhausted="end")
    finished = world.run()
    over = world.ledger(VICTIM).spent(VICTIM) > 8.0
    return finished.progressed.server_round == 2 and VICTIM in finished.why and not over


CASES: Sequence[Case] = (
    client_killed_before_debit,
    client_killed_between_debit_and_keeping,
    client_killed_after_keeping,
    client_disk_full,
    server_killed_between_rounds,
    server_killed_before_its_state,
    server_and_client_killed,
    server_disk_full,
    reply_corrupt,
    reply_twice,
    reply_late,
    reply_of_an_earlier_round,
    reply_under_another_name,
    update_nan,
    update_of_another_shape,
    update_outsized,
    update_incomplete,
    update_of_another_family,
    too_few,
    budget_spent_and_the_rest_go_on,
    budget_spent_and_the_run_ends,
)


def federated_faults(config: FederatedFaultsRun, *, work: Path, progress: Progress = silent) -> BenchmarkResult:
    """How many of the cases a federation survives."""
    expected, rows = unbroken(work / "unbroken"), list[dict[str, object]]()
    for place, case in enumerate(CASES):
        progress(case.__name__.replace("_", " "), place, len(CASES))
        try:
            survived = case(work / case.__name__, expected)
        except TreadleError:
            survived = False
        rows.append({"case": case.__name__, "survived": survived, "what": (case.__doc__ or "").splitlines()[0]})
    count = sum(bool(row["survived"]) for row in rows)
    metrics = {
        "cases": Metric.against(float(len(CASES)), "cases", at_least=float(config.cases)),
        "survived": Metric.against(float(count), "cases", at_least=float(len(CASES))),
    }
    return BenchmarkResult(NAME, device_name(), commit(), {"rounds": 3, "clients": list(CLIENTS)}, metrics, rows)
