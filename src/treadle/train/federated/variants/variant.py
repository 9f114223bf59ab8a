"""What a way of federating LoRA must say: what clients train and send in a round, and how it is joined."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from treadle.errors import FormatError, MismatchError
from treadle.family.factors import Factors
from treadle.train.federated.aggregation import Deviation, Update, deviation, in_order, mean_of, shares, together
from treadle.train.federated.factors import GlobalState, key_of_A
from treadle.train.federated.freezing import Freezing


@dataclass(frozen=True)
class Work:
    """What every client does in one round: trains these factors, and sends them.

    Attributes:
        lora_A: the modules whose A is trained.
        lora_B: the modules whose B is trained.
    """

    lora_A: frozenset[str]
    lora_B: frozenset[str]

    @property
    def both(self) -> frozenset[str]:
        """The modules of which both factors move: there a mean of factors is no mean of products."""
        return self.lora_A & self.lora_B

    def reply(self, factors: Factors) -> dict[str, Tensor]:
        """The tensors of `factors` that a client sends after this work, by name."""
        sent = {name: B for name, B in factors.lora_B.items() if name in self.lora_B}
        return sent | {key_of_A(name): A for name, A in factors.lora_A.items() if name in self.lora_A}


@dataclass(frozen=True)
class Aggregate:
    """What a round made.

    Attributes:
        state: the server's, for the next round.
        deviations: how far each module's new B·A is from the mean of the clients' products; only the modules where it
            is not the same by construction.
    """

    state: GlobalState
    deviations: Mapping[str, Deviation] = field(default_factory=dict[str, Deviation])

    @property
    def deviation(self) -> Deviation:
        """Of those modules together; nothing missed where there is none."""
        return together(list(self.deviations.values()))


class Variant(ABC):
    """A way of federating LoRA.

    Attributes:
        name: as configurations spell it.
        exact: whether the new B·A is the mean of the clients' products for every module, up to float32 rounding.
            Where it is not, modules whose A is frozen are joined exactly all the same (`is_exact`).
        averages: whether the updates count through their weighted mean alone, so that noise on the mean is noise on
            all that is released (client-level differential privacy).
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    averages: ClassVar[bool]

    @property
    @abstractmethod
    def leaves_family(self) -> bool:
        """Whether any A may move, so that what comes out may be no member of the family."""

    @abstractmethod
    def work(self, server_round: int) -> Work:
        """What clients train and send in this round, counted from 1."""

    @abstractmethod
    def aggregate(self, state: GlobalState, updates: Sequence[Update], *, server_round: int) -> Aggregate:
        """The state after this round, a function of the set of updates: in which order they came counts for nothing.

        Raises:
            InputError: no update, a weight that is not positive.
            MismatchError: two updates of one client, or one that is not what `work` asked for.
            FormatError: an update holds NaN or Inf.
        """

    def is_exact(self, server_round: int) -> bool:
        """Whether this round's aggregation is the mean of the clients' products, up to float32 rounding."""
        return self.exact or not self.work(server_round).both


@dataclass(frozen=True)
class FrozenA(Variant):
    """A variant that trains B alone, so that what comes out is a member of the family.

    Attributes:
        modules: of the plan.
    """

    modules: tuple[str, ...]

    @property
    def leaves_family(self) -> bool:
        """Never."""
        return False

    def work(self, server_round: int) -> Work:
        """Every B."""
        return Work(frozenset(), frozenset(self.modules))


@dataclass(frozen=True)
class MovingA(Variant):
    """A variant under which the A that are not frozen move.

    Attributes:
        freezing: which those are, by round.
    """

    freezing: Freezing

    @property
    def leaves_family(self) -> bool:
        """Unless every A stays frozen."""
        return not self.freezing.always


@dataclass(frozen=True)
class TrainedTogether(MovingA):
    """A variant whose clients train A and B in the same round."""

    def work(self, server_round: int) -> Work:
        """Every B, and the A that are not frozen."""
        modules = frozenset(self.freezing.modules)
        return Work(modules - self.freezing.frozen(server_round), modules)


def check(state: GlobalState, work: Work, update: Update) -> None:
    """Return if the update is what `work` asked for; B may have fewer columns, those of nested rows of A.

    Raises:
        MismatchError: a tensor is missing, unknown or of another shape.
        FormatError: a value is NaN or infinite.
    """
    expected = {name: tuple(state.lora_B[name].shape) for name in work.lora_B}
    expected |= {key_of_A(name): tuple(state.lora_A[name].shape) for name in work.lora_A}
    if wrong := update.tensors.keys() ^ expected.keys():
        raise MismatchError(
            f"{min(wrong)!r} is missing or was not asked for", where=update.client, remedy="send what the round trains"
        )
    for key, (height, width) in expected.items():
        tensor = update.tensors[key]
        narrow = key in work.lora_B and key not in work.both
        fits = tensor.ndim == 2 and tensor.shape[0] == height
        if not fits or not (1 <= tensor.shape[1] <= width if narrow else tensor.shape[1] == width):
            raise MismatchError(
                f"{key!r} is {tuple(tensor.shape)}, not {(height, width)}", where=update.client, remedy="use one family"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{key!r} holds NaN or Inf", where=update.client, remedy="leave this update out")


def checked(state: GlobalState, work: Work, updates: Sequence[Update]) -> list[Update]:
    """The updates in the order in which they are summed, once each is what `work` asked for.

    Raises:
        InputError: as `Variant.aggregate`.
    """
    for update in updates:
        check(state, work, update)
    return in_order(updates)


def averaged(state: GlobalState, work: Work, ordered: Sequence[Update]) -> GlobalState:
    """The state whose trained factors are the weighted means of the clients', A and B each for itself."""
    weights = [update.weight for update in ordered]

    def mean(key: str, rank: int) -> Tensor:
        return mean_of([update.tensors[key] for update in ordered], weights, rank=rank)

    return state.with_factors(
        lora_A={name: mean(key_of_A(name), state.lora_A[name].shape[1]) for name in sorted(work.lora_A)},
        lora_B={name: mean(name, state.lora_B[name].shape[1]) for name in sorted(work.lora_B)},
    )


def products(
    state: GlobalState, ordered: Sequence[Update], module: str
) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """(A_i, B_i) of every client, the factor that it did not train being the state's, and the clients' shares."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for update in ordered:
        B = update.tensors.get(module, state.lora_B[module])
        A = update.tensors.get(key_of_A(module), state.lora_A[module])
        pairs.append((A[: B.shape[1]], B))
    return pairs, shares(ordered)


def deviations(
    before: GlobalState, after: GlobalState, ordered: Sequence[Update], modules: frozenset[str]
) -> dict[str, Deviation]:
    """How far the new product of each of these modules is from the mean of the clients' products."""
    return {
        name: deviation(after.lora_A[name], after.lora_B[name], *products(before, ordered, name))
        for name in after.lora_B
        if name in modules
    }
