"""The factors that a server holds between rounds, what clients get of them, and the names of tensors on the way.

A module's B, scaling folded in, goes by the module's name; its A, where that moves, by MODULE/A.
What belongs to one client alone goes by MODULE/own/CLIENT, and only into checkpoints.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from treadle.errors import FormatError, MismatchError
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily

_A, _OWN = "/A", "/own/"


@dataclass(frozen=True)
class GlobalState:
    """What a round leaves behind, float32 on the CPU.

    Attributes:
        lora_A: (rank, in_features) a module, as they stand.
        lora_B: (out_features, rank) a module, scaling folded in.
        moved: the modules whose A is no longer the family's.
        own: client → its own lora_B, where every client keeps one.
    """

    lora_A: Mapping[str, Tensor]
    lora_B: Mapping[str, Tensor]
    moved: frozenset[str] = frozenset()
    own: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Mapping[str, Tensor]])

    def __post_init__(self) -> None:
        for name in ("lora_A", "lora_B", "own"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @staticmethod
    def start(family: AdapterFamily) -> "GlobalState":
        """Before the first round: the family's A, and B zero."""
        lora_B = {name: torch.zeros(row.out_features, row.rank) for name, row in family.plan.modules.items()}
        return GlobalState(family.lora_A, lora_B)

    def with_factors(
        self, *, lora_A: Mapping[str, Tensor] | None = None, lora_B: Mapping[str, Tensor] | None = None
    ) -> "GlobalState":
        """This state with other factors for the modules named; a module given an A counts as moved."""
        A = {name: tensor.float().cpu().contiguous() for name, tensor in (lora_A or {}).items()}
        B = {name: tensor.float().cpu().contiguous() for name, tensor in (lora_B or {}).items()}
        return replace(self, lora_A={**self.lora_A, **A}, lora_B={**self.lora_B, **B}, moved=self.moved | frozenset(A))

    def left_family(self, family: AdapterFamily, *, variant: str) -> AdapterFamily:
        """The family of the A as they stand: `family` itself where none has moved, else a new one that names it.

        Args:
            family: in which the run began.
            variant: by which its A moved. Only fedsvd moves them by what was released already; elsewhere they are
                trained on the clients' rows, and are as private as B is.
        """
        if not self.moved:
            return family
        return AdapterFamily.of_tensors(
            base=family.base,
            plan=family.plan,
            lora_A=self.lora_A,
            init=variant,
            seed=family.seed,
            origin={"family": family.fingerprint},
        )

    def of_client(self, client: str) -> Factors:
        """The factors that this client goes on from: its own B where it keeps one, else everybody's."""
        return Factors(self.lora_A, self.own.get(client, self.lora_B))

    def message(self, client: str, *, rank_share: float = 1.0) -> dict[str, Tensor]:
        """What this client is sent: every B, and every A that is not the family's, cut to its share of the ranks."""
        factors, sent = self.of_client(client), dict[str, Tensor]()
        for name, B in factors.lora_B.items():
            rank = nested_rank(B.shape[1], rank_share)
            sent[name] = B[:, :rank].contiguous()
            if name in self.moved:
                sent[key_of_A(name)] = factors.lora_A[name][:rank].contiguous()
        return sent

    def tensors(self) -> dict[str, Tensor]:
        """All of this state that the family does not say, by name: what a checkpoint keeps."""
        kept = {**self.lora_B, **{key_of_A(name): self.lora_A[name] for name in sorted(self.moved)}}
        for client, lora_B in self.own.items():
            kept |= {f"{name}{_OWN}{client}": B for name, B in lora_B.items()}
        return kept

    @staticmethod
    def of_tensors(family: AdapterFamily, tensors: Mapping[str, Tensor]) -> "GlobalState":
        """The state that `tensors` wrote.

        Raises:
            MismatchError: a module or a shape is not the family's.
        """
        own: dict[str, dict[str, Tensor]] = {}
        shared: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            module, mark, client = key.partition(_OWN)
            (own.setdefault(client, {}) if mark else shared)[module] = tensor
        factors = received(family.lora_A, shared)
        for lora_B in (factors.lora_B, *(received(family.lora_A, mine).lora_B for mine in own.values())):
            for name, row in family.plan.modules.items():
                if tuple(lora_B[name].shape) != (row.out_features, row.rank):
                    raise MismatchError(
                        f"lora_B is {tuple(lora_B[name].shape)}, not {(row.out_features, row.rank)}",
                        where=name,
                        remedy="go on in the family that the run began in",
                    )
        moved = frozenset(name for name in family.plan.modules if key_of_A(name) in shared)
        return GlobalState(factors.lora_A, factors.lora_B, moved, own)


def check_order(trained: Sequence[str], factors: Factors) -> None:
    """Return if steps can be done from these factors on what a message asks to train, so that nobody pays in vain.

    Raises:
        FormatError: a factor is not finite; what is to be trained is nothing, unknown, or stands twice.
    """
    tensors = {**factors.lora_B, **{key_of_A(name): A for name, A in factors.lora_A.items()}}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError("holds NaN or Inf", where=name, remedy="resume from a round before it")
    if not trained or len(set(trained)) < len(trained) or not tensors.keys() >= set(trained):
        raise FormatError(f"cannot train {', '.join(trained) or 'nothing'}", remedy="ask for modules of the family")


def key_of_A(module: str) -> str:
    """The name under which the module's A travels."""
    return f"{module}{_A}"


def nested_rank(rank: int, share: float) -> int:
    """How many of `rank` rows of A a client trains that has this share of them, in (0, 1]: rounded half up, at least 1.

    Reference: arXiv 2401.06432 (a rank for each client, nested in the largest).
    """
    return max(1, math.floor(share * rank + 0.5))


def received(lora_A: Mapping[str, Tensor], message: Mapping[str, Tensor]) -> Factors:
    """The factors that a client has after a message: the A sent, else the family's first rows that go with B.

    Args:
        lora_A: the family's.
        message: as `GlobalState.message` makes it.

    Raises:
        MismatchError: a module is missing or unknown, or a shape does not go with the family's A.
    """
    expected = set(lora_A) | {key_of_A(name) for name in lora_A}
    wrong = [name for name in lora_A if name not in message] + [key for key in message if key not in expected]
    if wrong:
        raise MismatchError("missing, or unknown to the family", where=wrong[0], remedy="use one family everywhere")
    A, B = dict[str, Tensor](), dict[str, Tensor]()
    for name, whole in lora_A.items():
        B[name] = message[name]
        rank = B[name].shape[-1] if B[name].ndim == 2 else 0
        A[name] = message.get(key_of_A(name), whole[:rank])
        if not 1 <= rank <= len(whole) or tuple(A[name].shape) != (rank, whole.shape[1]):
            raise MismatchError(
                f"A {tuple(A[name].shape)} and B {tuple(B[name].shape)} do not go with the family's "
                f"{tuple(whole.shape)}",
                where=name,
                remedy="use one family everywhere",
            )
    return Factors(A, B)
